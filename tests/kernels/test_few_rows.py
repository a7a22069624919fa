"""The kernels for a few rows, interpreted: products with matrices, against NumPy's."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax import kernels
from mixtral_jax.kernels import cudnn, few_rows

D, SIZES = 192, (96, 32, 64)


def operands(rows):
    rng = np.random.default_rng(rows)
    x_RD, *matrices = (
        rng.normal(size=shape).astype(np.float32) for shape in ((rows, D), *((D, f) for f in SIZES))
    )
    return x_RD, matrices


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "interpret", lambda: jax.default_backend() == "cpu")


@pytest.mark.parametrize("rows", [1, 16, 19])
@pytest.mark.parametrize("programs", [1, 10, 1000])
def test_products(monkeypatch, rows, programs):
    """Of one part, of parts of which the last is shorter, and of as many as there can be."""
    monkeypatch.setattr(few_rows, "TILES", few_rows.Tiles(32, 32, programs=programs))
    x_RD, matrices = operands(rows)
    actual = jax.jit(few_rows.products.__wrapped__)(x_RD, matrices)
    oracle.close(actual, tuple(np.float64(x_RD) @ w for w in matrices), rel=2e-6)


def test_gradients():
    x_RD, matrices = operands(3)
    gs = tuple(np.random.default_rng(f).normal(size=(3, f)).astype(np.float32) for f in SIZES)
    out, pull = jax.vjp(few_rows.products, x_RD, matrices)
    oracle.close(out, tuple(x_RD @ w for w in matrices), rel=2e-6)
    wanted = (sum(g @ w.T for g, w in zip(gs, matrices)), [x_RD.T @ g for g in gs])
    oracle.close(pull(gs), wanted, rel=2e-6)


def test_without_pallas_way_to_triton_there_are_none(monkeypatch):
    monkeypatch.setattr(few_rows, "platform", lambda: "gpu")
    assert few_rows.fits(1, jnp.bfloat16, 64)
    monkeypatch.setattr(few_rows, "triton", None)
    assert not few_rows.fits(1, jnp.bfloat16, 64)


def test_a_gpu_before_triton_has_none(monkeypatch):
    monkeypatch.setattr(few_rows, "platform", lambda: "gpu")
    t4 = types.SimpleNamespace(device_kind="Tesla T4", compute_capability="7.5")
    monkeypatch.setattr(jax, "devices", lambda: [t4])
    assert not few_rows.fits(1, jnp.bfloat16, 64)
    assert not cudnn.fits(64, 64, jnp.bfloat16)
    t4.compute_capability = "8.0"
    assert few_rows.fits(1, jnp.bfloat16, 64)
    assert cudnn.fits(64, 64, jnp.bfloat16)


@pytest.mark.gpu
def test_a_result_has_the_type_of_the_rows():
    x_RD, matrices = operands(2)
    narrow = [jnp.bfloat16(w) for w in matrices]
    for out, w in zip(few_rows.products(jnp.bfloat16(x_RD), narrow), narrow, strict=True):
        assert out.dtype == jnp.bfloat16
        wanted = np.float32(jnp.bfloat16(x_RD)) @ np.float32(w)
        oracle.close(out.astype(np.float32), wanted, rel=2**-8)
