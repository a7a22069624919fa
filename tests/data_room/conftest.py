"""A small real corpus (some of Python's own modules) and a tokenizer made from it."""

import pathlib
import sysconfig

import numpy as np
import pytest

from mixtral_jax import config_io
from mixtral_jax.data.tokenizer import Tokenizer, train_tokenizer

STDLIB = pathlib.Path(sysconfig.get_paths()["stdlib"])
MODULES = sorted((STDLIB / "json").glob("*.py")) + sorted((STDLIB / "email").glob("[a-h]*.py"))
VOCABULARY = 601


@pytest.fixture(scope="session")
def texts():
    """54 different documents of quite different lengths: files, and single lines of code."""
    files = [path.read_text(encoding="utf-8") for path in MODULES if path.stat().st_size < 9000]
    lines = "".join(files).splitlines()
    return list(dict.fromkeys(text for text in [*files, *lines] if text))[:54]


@pytest.fixture(scope="session")
def tokenizer(texts):
    return train_tokenizer(texts, VOCABULARY)


@pytest.fixture
def folder(tmp_path, texts):
    """A folder with the documents as .txt files."""
    for number, text in enumerate(texts):
        (tmp_path / f"{number:03}.txt").write_text(text, encoding="utf-8", newline="")
    return tmp_path


@pytest.fixture(scope="session")
def make_config():
    """make(train, ...): a config whose batch has 6 rows of 37 tokens; other keys may be given."""

    def make(train, *, data=(), run=(), **training):
        model = {"vocab_size": VOCABULARY, "hidden_size": 8, "num_attention_heads": 2}
        data = {"tokenizer": "train", "validation_fraction": 0, "interleave": 1, **dict(data)}
        return config_io.from_dict(
            {
                "model": {**model, "num_key_value_heads": 1},
                "training": {"batch_size": 6, "sequence_length": 37, **training},
                "data": {"train": train, **data},
                "run": dict(run),
            }
        )

    return make


@pytest.fixture(scope="session")
def read_row(tokenizer):
    """read(tokens, targets), each [sequences, L] of one row: the texts that the row has finished,
    and how many pairs of the next document it holds. Checks that no token between is lost."""

    def read(tokens_SL, targets_SL):
        tokens, targets = tokens_SL.ravel(), targets_SL.ravel()
        ends = np.flatnonzero(targets == tokenizer.eos_id) + 1
        starts = np.array([0, *ends])
        np.testing.assert_array_equal(tokens[starts[starts < len(tokens)]], tokenizer.bos_id)
        texts = []
        for start, end in zip(starts, ends):
            np.testing.assert_array_equal(tokens[start + 1 : end], targets[start : end - 1])
            texts.append(tokenizer.decode(tokens[start + 1 : end]))
        return texts, len(tokens) - starts[-1]

    return read


@pytest.fixture(scope="session")
def released():
    """The tokenizers that Mistral released, by version."""
    pytest.importorskip("mistral_common")
    return {v: Tokenizer.from_name_or_file(f"mistral-{v}") for v in ("v1", "v2", "v3")}
