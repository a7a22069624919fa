"""Files and folders appear whole or not at all."""

import os
import pathlib

import pytest

from mixtral_jax import files
from mixtral_jax.checks import InputError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_its_block_has_ended(tmp_path):
    for content in ("first", "second"):
        before = names(tmp_path)
        with files.whole_file(tmp_path / "x") as unfinished:
            unfinished.write_text(content)
            assert names(tmp_path) == sorted([*before, unfinished.name])
            assert unfinished.name.endswith(files.UNFINISHED)
        assert names(tmp_path) == ["x"]
        assert (tmp_path / "x").read_text() == content


@pytest.mark.parametrize("where", ["block", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_what_was_there(tmp_path, monkeypatch, where, error):
    def fail(*arguments):
        raise error

    (tmp_path / "x").write_text("old")
    if where == "block":
        write = fail
    else:
        write = pathlib.Path.write_text
        monkeypatch.setattr(files.os, where, fail)
    with pytest.raises(type(error)), files.whole_file(tmp_path / "x") as unfinished:
        write(unfinished, "half")
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_two_processes_write_the_same_file(tmp_path, monkeypatch):
    """Also where both are process 1 of their containers: the last one's is there, whole."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with files.whole_file(tmp_path / "x") as one, files.whole_file(tmp_path / "x") as other:
        one.write_text("one")
        other.write_text("other")
    assert (names(tmp_path), (tmp_path / "x").read_text()) == (["x"], "one")


@pytest.mark.parametrize("path", ["none/x", "folder", "n" * 300, "a\0b"])
def test_what_cannot_be_written_is_named(tmp_path, path):
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(InputError, match="the list cannot be written: "),
        files.naming("the list"),
        files.whole_file(tmp_path / path) as unfinished,
    ):
        unfinished.touch()
    assert names(tmp_path) == ["folder"]


def test_what_another_process_is_writing_stays(tmp_path, monkeypatch):
    """Also where it has the same name, as it may where both are process 1 of their containers."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "1")
    with files.new_folder(tmp_path / "target") as other:
        (other / "mine").touch()
        with (
            pytest.raises(InputError, match="File exists"),
            files.new_folder(tmp_path / "target"),
        ):
            pytest.fail("it is the other's")
        assert [path.name for path in other.iterdir()] == ["mine"]
    assert (tmp_path / "target" / "mine").exists()
