"""What requests of one batch ask for, together in one program, with the kernels of the platform.

Runs on a GPU too (see conftest.py), where all of a step is one CUDA graph.
"""

import jax
import numpy as np
import pytest
from whole import KERNEL_SIZES

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.request import Options, Request
from mixtral_jax.model.mixtral import initialize

pytestmark = pytest.mark.gpu
CONFIG = ModelConfig(**KERNEL_SIZES, max_position_embeddings=128)
NEW = 24
DRAWN = {"temperature": 1.0, "seed": 3}
ASKED = {
    "greedy": {"logprobs": 20},
    "greedy alone": {},
    "top-k": {"top_k": 1, **DRAWN},
    "top-p": {"top_p": 1e-6, **DRAWN},
    "of three": {"top_k": 3, "logprobs": 20, **DRAWN},
    "hot": {"logprobs": 20, "temperature": 40.0},
    "penalized": {"repetition_penalty": 100.0},
    "forced": {"logit_bias": ((77, 100.0),)},
}


@pytest.fixture(scope="module")
def engine():
    model = initialize(CONFIG, jax.random.key(1), sharding.make_mesh(devices=jax.devices()[:1]))
    return Engine(model, rows=len(ASKED))


def ids(answer):
    """The ids of the most likely tokens at each place of an answer, best first."""
    return np.array([[token for _, token, _ in place.top] for place in answer.logprobs])


def test_each_row_gets_what_it_asks_for(engine):
    """The first turn's prompts have no row that is drawn, the last one's nothing but."""

    def ask(names):
        options = [Options(NEW, **{"temperature": 0.0, **ASKED[name]}) for name in names]
        answers = engine.generate([Request((1, 5, 9), some) for some in options])
        return dict(zip(names, (some[0] for some in answers)))

    plain = ask(["greedy alone"])["greedy alone"].tokens
    found = ask(ASKED)
    assert len(plain) == NEW
    for name in ("greedy", "greedy alone", "top-k", "top-p"):
        assert found[name].tokens == plain, name
    np.testing.assert_array_equal(ids(found["greedy"])[:, 0], plain)
    likely = [number for _, _, number in found["greedy"].logprobs[0].top]
    assert likely == sorted(likely, reverse=True)
    of_three, hot = np.array(found["of three"].tokens), np.array(found["hot"].tokens)
    assert (ids(found["of three"])[:, :3] == of_three[:, None]).any(axis=1).all()
    assert len({*of_three} - {*plain}) > 3
    assert (ids(found["hot"]) == hot[:, None]).any(axis=1).mean() < 0.5
    assert len({*found["penalized"].tokens}) == NEW
    assert found["forced"].tokens == [77] * NEW
    alone = ask(["of three", "hot"])
    for name, answer in alone.items():
        assert answer.tokens == found[name].tokens, name
