"""Folders that hold no checkpoint or that a command cannot use: one line, and nothing is left."""

import dataclasses
import pathlib
import re
import shutil

import pytest
from checkpoint_faults import (
    ANY,
    FORMS,
    garbage_tokenizer,
    layers,
    message_of,
    pop,
    without_config,
)
from checkpoint_files import (
    CONFIG,
    Drawn,
    write,
    write_dense,
)

import mixtral_jax
from mixtral_jax.data.tokenizer import train_tokenizer
from mixtral_jax.interop import convert


def files(*names):
    def make(folder):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(b"{}")
        return folder

    return make


def a_file(folder):
    folder.write_bytes(b"")
    return folder


OTHERS = {
    "empty": (files(), "holds no checkpoint: name a run folder"),
    "tokenizer.json alone": (files("tokenizer.json"), "holds no checkpoint"),
    "config.json alone": (files("config.json"), "has config.json but no model.safetensors"),
    "params.json alone": (files("params.json"), "has params.json but no model.safetensors"),
    "a file": (a_file, "is a file: name its folder"),
    "nothing": (lambda folder: folder, "does not exist"),
    "below a file": (lambda folder: a_file(folder) / "x", "does not exist"),
    "a name too long": (lambda folder: folder.with_name("n" * 300), "File name too long"),
    "pytorch_model.bin": (files("config.json", "pytorch_model.bin"), "has pytorch_model.bin but"),
    "gguf": (files("config.json", "mixtral.Q4_K_M.gguf"), "has mixtral.Q4_K_M.gguf but no"),
    "other safetensors": (files("config.json", "a.safetensors"), "has a.safetensors but no"),
    "a line break": (lambda folder: files()(folder.with_name("two\nlines")), "holds no checkpoint"),
    "none with a line break": (lambda folder: folder.with_name("two\nlines"), "does not exist"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_no_checkpoint(tmp_path, case):
    make, words = OTHERS[case]
    assert words in message_of(make(tmp_path / "folder"))


def test_a_folder_whose_name_has_a_line_break(valid, tmp_path):
    """Every error that names a file of it is still one line."""
    folder = pathlib.Path(shutil.copytree(valid / "sharded", tmp_path / "two\nlines"))
    breaks = {"a tensor": pop("W2"), "layers": layers(3), "tokenizer": garbage_tokenizer}
    breaks |= {"config": without_config}
    for break_it in breaks.values():
        break_it(folder)
        message_of(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_config.json", "merge the adapter into the weights first"),
        ("quantize_config.json", "convert its quantized weights to bfloat16 first"),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_weights_that_are_not_the_model(copy, form, name, words):
    folder = copy(form)
    (folder / name).write_text("{}")
    assert message_of(folder).startswith(f"{folder} has {name}: {words}, ")


@pytest.mark.parametrize("form", ["huggingface", "mistral"])
def test_a_dense_model_says_how_to_make_a_sparse_one(tmp_path, form, refuses):
    one = Drawn(dataclasses.replace(CONFIG, num_local_experts=1, num_experts_per_tok=1))
    folder = write_dense(tmp_path / "dense", form, one)
    fix = f"python -m mixtral_jax.interop.convert {folder} TARGET --to orbax --upcycle 8"
    assert fix in message_of(folder)
    assert f"{folder} holds a dense model" in refuses(folder)


COMMANDS = ["missing tensor", "wrong shape", "int8", "cut in the data", "no config"]
COMMANDS += ["config not JSON", "more layers", "garbage tokenizer", "tensor with a line break"]


@pytest.mark.parametrize("form", FORMS[::2])
@pytest.mark.parametrize("fault", COMMANDS)
def test_the_commands_say_it_in_one_line_and_leave_nothing(copy, form, fault, refuses, capsys):
    folder = copy(form)
    ANY[fault](folder)
    assert refuses(folder) == f"error: {message_of(folder)}\n"
    before = sorted(folder.parent.iterdir())
    for to in ("huggingface", "mistral", "orbax"):
        target = folder.with_name("target")
        assert convert.main([str(folder), str(target), "--to", to]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err == f"error: {message_of(folder)}\n"
        assert sorted(folder.parent.iterdir()) == before


@pytest.mark.parametrize("case", OTHERS)
def test_the_commands_on_what_is_no_checkpoint(tmp_path, case, refuses, capsys):
    make, words = OTHERS[case]
    folder = make(tmp_path / "folder")
    assert words in refuses(folder)
    before = sorted(tmp_path.iterdir())
    assert convert.main([str(folder), str(tmp_path / "target"), "--to", "mistral"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert words in err
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words, the same again, a few words " * 9], 300)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, tokenizer):
    """A valid folder with a tokenizer."""
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    folder = tmp_path_factory.mktemp("spoken") / "valid"
    return write(folder, "mistral", Drawn(config), tokenizer)


def test_tokens_that_were_added_to_the_embedding(tmp_path, tokenizer):
    weights = Drawn(dataclasses.replace(CONFIG, vocab_size=320))
    folder = write(tmp_path / "tuned", "single", weights, tokenizer)
    message = message_of(folder)
    assert "300 pieces, but the embedding has 320 rows: tokens were added to it" in message
    assert "another model's" not in message
    (folder / "tokenizer.model").rename(folder / "tokenizer.model.old")
    assert mixtral_jax.load_model(folder)[1] is None


def test_what_does_not_fit_the_model_is_said_before_the_weights_are_read(spoken, refuses):
    limit = "--max-new-tokens=4"
    assert "mesh.expert=2 does not divide" in refuses(spoken, limit, "mesh.expert=2")
    assert "does not divide" in refuses(spoken, limit, "mesh.tensor=3")
    long = " ".join("abcdefghij" for _ in range(9))
    said = refuses(spoken, limit, "--prompt", long)
    assert re.search(r"has \d+ tokens, BOS included, .* context of 48", said), said
    assert "context of 48" in refuses(spoken, "--max-new-tokens=99")


def test_a_folder_without_a_tokenizer_cannot_be_prompted(valid, refuses):
    for form in FORMS:
        said = refuses(valid / form)
        assert f"{valid / form} has no tokenizer" in said
        assert "lacks tokenizer.model" in said
