"""The kernels for a few tokens, interpreted, against each token by its own experts in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax import kernels
from mixtral_jax.kernels import few_rows, few_tokens
from mixtral_jax.kernels.experts import experts

D, F, E = 64, 192, 5
NONE = E
IDS = {
    "one token": [[3, 1]],
    "one token, one expert": [[4]],
    "an expert for all": [[2, 0], [1, 2], [2, 4]],
    "one of padding": [[0, 4], [NONE, NONE], [4, 2]],
    "nothing but padding": [[NONE, NONE], [NONE, NONE]],
    "more than a block": [[t % 3, 3 + t % 2] for t in range(19)],
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "interpret", lambda: jax.default_backend() == "cpu")
    monkeypatch.setattr(few_tokens, "INTO", few_rows.Tiles(32, 64))
    monkeypatch.setattr(few_tokens, "OUT_OF", few_rows.Tiles(64, 32, programs=16))


def operands(ids_TC):
    rng = np.random.default_rng(np.size(ids_TC))
    tokens = len(ids_TC)
    shapes = (tokens, D), (E, D, F), (E, D, F), (E, F, D)
    arrays = [(0.3 * rng.normal(size=shape)).astype(np.float32) for shape in shapes]
    weights_TC = rng.uniform(0.1, 1, size=np.shape(ids_TC)).astype(np.float32)
    return *arrays, np.int32(ids_TC), weights_TC


def expected(x_TD, gate_EDF, up_EDF, down_EFD, ids_TC, weights_TC):
    out_TD = np.zeros(x_TD.shape)
    for (token, choice), e in np.ndenumerate(ids_TC):
        if e != NONE:
            hidden_F = oracle.silu(x_TD[token] @ gate_EDF[e]) * (x_TD[token] @ up_EDF[e])
            out_TD[token] += weights_TC[token, choice] * (hidden_F @ down_EFD[e])
    return out_TD


def run(*arrays):
    return jax.jit(few_tokens.experts.__wrapped__)(*arrays)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_each_token_by_its_experts(ids):
    arrays = operands(ids)
    idle = np.setdiff1d(np.arange(E), ids)
    wanted = expected(*arrays)
    for w_EDF in arrays[1:4]:
        w_EDF[idle] = np.nan  # not read
    oracle.close(run(*arrays), wanted, rel=2e-6)


def test_what_overflows_in_another_token_s_expert_is_not_seen():
    ids_TC = [[0, 1], [2, 3]]
    x_TD, gate_EDF, up_EDF, *rest = operands(ids_TC)
    x_TD[0, 0], gate_EDF[2:4, 0], up_EDF[2:4, 0] = 1e15, 1e15, 1e15  # inf in token 0 by 2 and 3
    gate_EDF[:2, 0], up_EDF[:2, 0], x_TD[1, 0] = 0, 0, 0
    arrays = x_TD, gate_EDF, up_EDF, *rest
    oracle.close(run(*arrays), expected(*arrays), rel=2e-6)


@pytest.mark.gpu
def test_bfloat16_is_rounded_where_the_general_path_rounds_it():
    """Within the rounding of the hidden rows and of the result, as far as of the products too."""
    ids_TC = np.int32([[3, 0], [1, 3], [0, 1]])
    *arrays, ids_TC, weights_TC = operands(ids_TC)
    arrays = [a.astype(jnp.bfloat16) for a in arrays]
    wide = [np.asarray(a, np.float32) for a in arrays]
    out_TD = run(*arrays, ids_TC, weights_TC)
    assert out_TD.dtype == jnp.bfloat16
    wanted = expected(*wide, ids_TC, weights_TC)
    oracle.close(out_TD.astype(np.float32), wanted, rel=2**-7)
    order = np.argsort(ids_TC.reshape(-1), stable=True)
    sizes_E = np.bincount(ids_TC.reshape(-1), minlength=E)
    done_RD = experts(arrays[0][order // 2], *arrays[1:], jnp.int32(sizes_E))
    general_TD = np.zeros(wanted.shape)
    np.add.at(general_TD, order // 2, weights_TC.reshape(-1)[order, None] * np.float32(done_RD))
    oracle.close(out_TD.astype(np.float32), general_TD, rel=2**-6)


@pytest.mark.parametrize("ids", [IDS["one of padding"], IDS["an expert for all"]])
def test_gradients_are_those_of_plain_jax(ids):
    *arrays, ids_TC, weights_TC = operands(ids)
    g_TD = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)

    def plain(*arrays):
        *arrays, weights_TC = arrays
        return few_tokens._plain(ids_TC, *arrays, weights_TC)

    def kernels(*arrays):
        *arrays, weights_TC = arrays
        return few_tokens.experts(*arrays, ids_TC, weights_TC)

    @functools.partial(jax.jit, static_argnums=0)
    def both(function, *arrays):
        out, pull = jax.vjp(function, *arrays)
        return out, *pull(g_TD)

    actual = both(kernels, *arrays, weights_TC)
    oracle.close(actual, both(plain, *arrays, weights_TC), rel=1e-6)
    oracle.close(actual[0], expected(*arrays, ids_TC, weights_TC), rel=2e-6)


@pytest.mark.parametrize(
    ("platform", "tokens", "shape", "dtype", "takes"),
    [
        ("gpu", 1, (8, 4096, 14336), jnp.bfloat16, True),
        ("gpu", few_rows.MOST, (8, 64, 192), jnp.float16, True),
        ("gpu", few_rows.MOST + 1, (8, 64, 192), jnp.bfloat16, False),
        ("gpu", 1, (8, 4096, 14336), jnp.float32, False),
        ("gpu", 1, (8, 4096, 100), jnp.bfloat16, False),
        ("gpu", 1, (64, 4096, 14336), jnp.bfloat16, False),
        ("tpu", 1, (8, 4096, 14336), jnp.bfloat16, False),
    ],
)
def test_what_they_take(monkeypatch, platform, tokens, shape, dtype, takes):
    monkeypatch.setattr(few_rows, "platform", lambda: platform)
    assert few_tokens.fits(tokens, *shape, dtype) == takes
