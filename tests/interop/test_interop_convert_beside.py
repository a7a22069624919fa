"""What lies beside the weights of a folder: what convert carries over, says of it and refuses."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
import sentencepiece
from checkpoint_files import CONFIG, CONFIG_JSON, Drawn, edit_json, write

import mixtral_jax
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.interop import own_arrays, saving

ROOT = pathlib.Path(__file__).parents[2]
FORMS = ("orbax", "huggingface", "mistral")
GENERATION = "generation_config.json"


def token_ids(folder):
    """bos, eos and pad, which both files of a Hugging Face folder say."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = [json.loads((folder / name).read_text()) for name in (CONFIG_JSON, GENERATION)]
    ids = [[values[key] for key in keys] for values in found]
    assert ids[0] == ids[1]
    return ids[0]


# ---- where a text begins and ends --------------------------------------------------------------


@pytest.fixture(scope="module")
def shifted():
    """A tokenizer whose BOS and EOS are 2 and 3."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words, the same again, a few words "] * 9),
        model_writer=model,
        **{"vocab_size": 30, "model_type": "bpe", "minloglevel": 2},
        **{"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3},
    )
    return Tokenizer.from_bytes(model.getvalue())


def test_the_ids_are_the_tokenizers(main, tmp_path, shifted):
    weights = Drawn(dataclasses.replace(CONFIG, vocab_size=shifted.vocab_size))
    source = write(tmp_path / "source", "mistral", weights, shifted)
    for number, form in enumerate(("huggingface", "orbax", "huggingface")):
        assert main(source, tmp_path / str(number), form)[0] == 0
        source = tmp_path / str(number)
        if form == "huggingface":
            assert token_ids(source) == [2, 3, None]
    mixtral_jax.save_model(*mixtral_jax.load_model(source), tmp_path / "saved", "huggingface")
    assert token_ids(tmp_path / "saved") == [2, 3, None]


@pytest.mark.parametrize("ids", [[1, 320, 0], [1, [2, 320], None], [None, 2, -1]], ids=str)
def test_the_ids_of_a_config_come_along(copy, main, ids):
    """A fine-tune's, which the tokenizer, if there is one, does not know."""
    source = copy("single")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    edit_json(source / CONFIG_JSON, lambda values: values.update(zip(keys, ids)))
    (source / GENERATION).unlink()
    assert main(source, source.with_name("target"), "huggingface")[0] == 0
    assert token_ids(source.with_name("target")) == ids


@pytest.mark.parametrize("ids", [{}, {"bos_token_id": "x", "eos_token_id": [2, True]}], ids=str)
def test_nothing_is_claimed_where_nothing_is_known(copy, main, ids):
    source = copy("single")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    edit_json(source / CONFIG_JSON, lambda values: [values.pop(key) for key in keys])
    edit_json(source / CONFIG_JSON, lambda values: values.update(ids))
    (source / GENERATION).unlink()
    for number, form in enumerate(
        ("huggingface", "mistral", "huggingface", "orbax", "huggingface")
    ):
        target = source.with_name(str(number))
        assert main(source, target, form)[0] == 0
        source = target
        if form == "huggingface":
            assert token_ids(target) == [None, None, None]


# ---- what becomes of the target ----------------------------------------------------------------


def test_a_file_beside_that_may_not_be_read(copy, main, monkeypatch):
    source, read = copy("single"), pathlib.Path.read_bytes

    def deny(path):
        if path.name == GENERATION:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", deny)
    code, _, err = main(source, source.with_name("target"), "huggingface")
    assert (code, err) == (2, f"error: {source / GENERATION} cannot be read: Permission denied\n")
    assert not source.with_name("target").exists()


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_nothing_can_be_renamed_over(valid, main, tmp_path, monkeypatch, form):
    """Said before anything is written."""
    source = valid / "single"
    monkeypatch.chdir(tmp_path)
    for target in (".", tmp_path):
        code, _, err = main(source, target, form)
        assert (code, err.count("\n")) == (2, 1)
        assert f"{target} is where a disk is mounted or this command runs: name a new" in err
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    for target in (tmp_path / "disk", tmp_path / "link"):
        assert "is where a disk is mounted" in main(source, target, form)[2]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "link"]


@pytest.mark.parametrize("form", FORMS)
def test_sigterm_leaves_nothing(valid, main, tmp_path, monkeypatch, form):
    def terminate(*arguments, **keywords):
        assert form == "mistral" or any(tmp_path.iterdir())
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(saving, "_write_json", terminate)
    monkeypatch.setattr(own_arrays.ocp.CompositeCheckpointHandler, "save", terminate)
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit) as stopped:
            main(valid / "single", tmp_path / "target", form)
        assert stopped.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.iterdir())


def test_what_orbax_writes_after_all_is_removed_as_the_program_ends(
    valid, main, tmp_path, monkeypatch
):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    at_end = []
    monkeypatch.setattr(own_arrays.ocp.CompositeCheckpointHandler, "save", interrupt)
    monkeypatch.setattr(own_arrays.atexit, "register", lambda *a, **k: at_end.append((a, k)))
    assert main(valid / "single", tmp_path / "target", "orbax") == (130, "", "")
    (tmp_path / "target.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    for (function, *arguments), keywords in at_end:
        function(*arguments, **keywords)
    assert not list(tmp_path.iterdir())


def test_a_target_whose_name_the_terminal_cannot_show(valid, tmp_path):
    target = tmp_path / "zwei\nZeilen für uns"
    command = [sys.executable, "-m", "mixtral_jax.interop.convert", valid / "mistral", target]
    here = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*command, "--to", "mistral"], capture_output=True, text=True, cwd=ROOT, env=here
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert r"zwei\nZeilen f\xfcr uns': mistral, 2 files, " in done.stdout
