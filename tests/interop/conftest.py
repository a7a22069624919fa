"""Valid checkpoint folders to break, and the commands in this process."""

import pathlib
import shutil

import pytest
from checkpoint_faults import FORMS
from checkpoint_files import write

import generate
from mixtral_jax import sharding
from mixtral_jax.interop import convert


@pytest.fixture(scope="session")
def valid(tmp_path_factory):
    """The same model in every form."""
    folder = tmp_path_factory.mktemp("valid")
    for form in FORMS:
        write(folder / form, form)
    return folder


@pytest.fixture
def copy(valid, tmp_path):
    """copy(form): a folder to break."""

    def make(form):
        return pathlib.Path(shutil.copytree(valid / form, tmp_path / "broken"))

    return make


@pytest.fixture
def refuses(monkeypatch, capsys):
    """refuses(folder): what generate.py says on standard error, with code 2 and nothing else."""
    monkeypatch.setattr(sharding, "start", lambda mesh: None)

    def run(folder, *arguments):
        capsys.readouterr()
        assert generate.main(["--checkpoint", str(folder), "--prompt", "a", *arguments]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err

    return run


@pytest.fixture
def main(monkeypatch, capsys):
    """main(source, target, to, *flags) of convert: (exit code, standard output and error)."""
    monkeypatch.setattr(sharding, "start", lambda mesh: None)  # the devices are there already

    def run(source, target, to, *flags):
        capsys.readouterr()
        code = convert.main([str(source), str(target), "--to", to, *flags])
        return code, *capsys.readouterr()

    return run
