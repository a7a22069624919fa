"""Small checkpoints to sample from, and generate.py in this process."""

import re

import numpy as np
import pytest
from tiny import make_config

import generate
from mixtral_jax import sharding
from mixtral_jax.data.tokenizer import train_tokenizer
from mixtral_jax.interop.own import Extras
from mixtral_jax.training.checkpoint import Checkpoints
from mixtral_jax.training.step import initial_state

TEXTS = [
    "def first(self, words):\n    return words[0] if words else None\n",
    "for word in words:\n    print(word, end=' ')\nself.words = sorted(words)\n",
    "class Words(list):\n    'a list of words'\n    def __init__(self, other=()):\n        pass\n",
]


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="session")
def save_run():
    """save(folder, tokenizers by step, **model): a run on eight devices, whose settings of
    training must not reach sampling."""

    def save(folder, tokenizers, **model):
        changes = {"exchange": "padded", "capacity_factor": 1.0, "remat": "full", **model}
        config = make_config(model=changes, mesh={"data": 2, "expert": 2, "tensor": 2})
        state = initial_state(config, sharding.make_mesh(data=2, expert=2, tensor=2))
        place = np.zeros((config.training.batch_size, 2), np.int64)
        checkpoints = Checkpoints(folder, keep=len(tokenizers))
        for step, tokenizer in tokenizers.items():
            checkpoints.save(step, state, Extras(config, place, tokenizer, None))
        checkpoints.close()
        return folder

    return save


@pytest.fixture(scope="session")
def run(tmp_path_factory, save_run, tokenizer):
    """The folder of a run; its first checkpoint has no tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    return save_run(folder, {3: None, 4: tokenizer}, vocab_size=tokenizer.vocab_size)


@pytest.fixture
def main(monkeypatch):
    """generate.main in this process, which has its devices already."""
    monkeypatch.setattr(sharding, "start", lambda mesh: None)
    return generate.main


@pytest.fixture
def refused(main, capsys):
    """refused(arguments, said): main ends with code 2, says that in one line and prints nothing."""

    def check(arguments, said):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert re.search(said, err), err

    return check
