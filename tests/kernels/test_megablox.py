"""JAX's megablox kernels, in interpret mode, against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax import kernels
from mixtral_jax.kernels import grouped_matmul, megablox
from mixtral_jax.kernels.experts import experts
from mixtral_jax.kernels.grouped_matmul import resolve

ROWS, D, F = 384, 128, 256
SIZES = {
    "across tiles": [100, 0, 156, 44],  # 84 rows left over
    "at the edges of tiles": [128, 128, 0, 128],
    "all to one": [0, 384, 0, 0],
    "no row": [0, 0, 0, 0],
}


@functools.partial(jax.jit, static_argnums=4)
def run(x_RD, w_EDF, sizes_E, g_RF, transposed):
    def product(x_RD, w):
        return megablox.grouped_matmul(x_RD, w, sizes_E, transposed)

    out, pull = jax.vjp(product, x_RD, w_EDF.swapaxes(1, 2) if transposed else w_EDF)
    dx, dw = pull(g_RF)
    return out, dx, dw.swapaxes(1, 2) if transposed else dw


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values_and_gradients(monkeypatch, sizes, transposed):
    """Rows past the last group are not read; they come out as zeros, and so does their gradient."""
    monkeypatch.setattr(kernels, "interpret", lambda: True)
    monkeypatch.setattr(megablox, "TILES", (128, 1024, 1024))
    rng, used = np.random.default_rng(0), sum(sizes)
    x_RD, w_EDF, g_RF = (
        rng.normal(size=shape).astype(np.float32) for shape in ((ROWS, D), (4, D, F), (ROWS, F))
    )
    x_RD[used:], g_RF[used:] = np.nan, np.nan
    out, dx, dw = np.zeros(g_RF.shape), np.zeros(x_RD.shape), np.zeros(w_EDF.shape)
    first = 0
    for expert, size in enumerate(sizes):
        rows = slice(first, first + size)
        out[rows] = x_RD[rows] @ w_EDF[expert]
        dx[rows] = g_RF[rows] @ w_EDF[expert].T
        dw[expert] = x_RD[rows].T @ g_RF[rows]
        first += size
    actual = run(x_RD, w_EDF, jnp.asarray(sizes, jnp.int32), g_RF, transposed)
    oracle.close(actual, (out, dx, dw), rel=2e-6)


def test_what_rows_past_the_last_group_come_out_as_goes_nowhere(monkeypatch):
    """SwiGLU makes use of that: neither its rows in use nor any gradient shows it."""
    monkeypatch.setattr(kernels, "interpret", lambda: True)
    monkeypatch.setattr(grouped_matmul, "platform", lambda: "tpu")
    rng, sizes = np.random.default_rng(0), jnp.array([100, 0, 128], jnp.int32)
    shapes, used = ((ROWS, D), (3, D, F), (3, D, F), (3, F, D), (ROWS, D)), 228
    *operands, g_RD = (0.1 * rng.normal(size=shape).astype(np.float32) for shape in shapes)

    def run(implementation):
        @jax.jit
        def both(*operands):
            swiglu = functools.partial(experts, implementation=implementation)
            out, pull = jax.vjp(lambda *args: swiglu(*args, sizes), *operands)
            return out[:used], *pull(g_RD)

        return both(*operands)

    left = megablox.grouped_matmul(*operands[:2], sizes, False, False)
    assert jnp.isnan(left[used:]).all(), "interpreted, what is never written is not a number"
    oracle.close(run("megablox"), run("ragged_dot"), rel=2e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_any_number_of_rows(monkeypatch, transposed):
    """As in decoding: the kernels get rows that are not in use behind them."""
    monkeypatch.setattr(kernels, "interpret", lambda: True)
    monkeypatch.setattr(grouped_matmul, "platform", lambda: "tpu")
    rng, sizes_E = np.random.default_rng(0), jnp.array([2, 0, 1], jnp.int32)
    x_RD, w_EDF, g_RF = (
        rng.normal(size=shape).astype(np.float32) for shape in ((5, D), (3, D, F), (5, F))
    )
    w = w_EDF.swapaxes(1, 2) if transposed else w_EDF

    def run(implementation):
        @jax.jit
        def both(x_RD, w):
            product = functools.partial(
                grouped_matmul.grouped_matmul,
                **{"group_sizes_E": sizes_E, "transposed": transposed},
                implementation=implementation,
            )
            out, pull = jax.vjp(product, x_RD, w)
            return out, *pull(g_RF)

        return both(x_RD, w)

    oracle.close(run("megablox"), run("ragged_dot"), rel=2e-6)


@pytest.mark.parametrize(
    ("kind", "shape", "tiles"),
    [
        ("TPU v5", (24576, 4096, 14336, 8), (512, 1024, 1024)),
        ("TPU v6 lite", (24576, 4096, 14336, 8), (1024, 1024, 2048)),
        ("TPU v6 lite", (8192, 4096, 14336, 8), (512, 1024, 2048)),
        ("TPU v6 lite", (1024, 4096, 14336, 8), (128, 1024, 2048)),
        ("TPU v5", (384, 640, 256, 1), (128, 128, 256)),
    ],
)
def test_tiles_divide_what_they_cut_and_suit_the_chip(monkeypatch, kind, shape, tiles):
    monkeypatch.setattr(megablox, "device_kind", lambda: kind)
    assert megablox._tiles(*shape) == tiles


@pytest.mark.parametrize(
    ("platform", "asked", "width", "body"),
    [
        ("tpu", "", 128, "megablox"),
        ("tpu", None, 100, "ragged_dot"),
        ("tpu", "ragged_dot", 128, "ragged_dot"),
        ("gpu", "", 100, "blocks"),
        ("gpu", "ragged_dot", 128, "ragged_dot"),
        ("cpu", "", 128, "blocks"),
    ],
)
def test_the_best_body_of_each_platform_and_shape(monkeypatch, platform, asked, width, body):
    monkeypatch.setattr("mixtral_jax.kernels.grouped_matmul.platform", lambda: platform)
    monkeypatch.setattr("mixtral_jax.kernels.grouped_matmul.device_kind", lambda: "NVIDIA H200")
    assert resolve(asked, width, F, jnp.bfloat16) == body


@pytest.mark.parametrize(
    ("platform", "width", "words"),
    [
        ("cpu", 128, ["grouped_matmul=megablox does not run on cpu", "tpu", "use ragged_dot"]),
        ("tpu", 100, ["grouped_matmul=megablox wants multiples of 128", "100 into 256"]),
    ],
)
def test_a_body_that_cannot_run_is_refused_in_one_line(monkeypatch, platform, width, words):
    monkeypatch.setattr("mixtral_jax.kernels.grouped_matmul.platform", lambda: platform)
    with pytest.raises(ValueError, match=r"^.+$") as error:
        resolve("megablox", width, F, jnp.bfloat16)
    assert all(word in str(error.value) for word in words), error.value
