"""The kernels before attention and before the experts, interpreted, against the plain layers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx

from mixtral_jax import kernels
from mixtral_jax.kernels import few_norms, few_rows
from mixtral_jax.model.layers import RMSNorm
from mixtral_jax.model.router import route

T, D, P, E, EPS = 3, 96, 5, 6, 1e-3


TYPES = [(jnp.float32, 1e-6), pytest.param(jnp.bfloat16, 2**-8, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "interpret", lambda: jax.default_backend() == "cpu")


def operands(dtype):
    rng = np.random.default_rng(0)
    shapes = (T, D), (P, T, D), (D,), (D, E)
    x_TD, parts_PTD, scale_D, router_DE = (rng.normal(size=shape) for shape in shapes)
    narrow = (jnp.asarray(a, dtype) for a in (x_TD, 1 + 0.1 * scale_D, router_DE))
    return jnp.asarray(parts_PTD, jnp.float32), *narrow


def plain(parts_PTD, x_TD, scale_D):
    norm = RMSNorm(D, EPS, x_TD.dtype)
    norm.weight = nnx.Param(scale_D)
    if parts_PTD is not None:
        x_TD = x_TD + parts_PTD.sum(axis=0).astype(x_TD.dtype)
    return x_TD, norm(x_TD[:, None])[:, 0]


def wide(tree):
    return jax.tree.map(lambda a: np.asarray(a, np.float64), tree)


@pytest.mark.parametrize(("dtype", "rel"), TYPES)
@pytest.mark.parametrize("parts", [True, False])
def test_add_norm(dtype, rel, parts):
    parts_PTD, x_TD, scale_D, _ = operands(dtype)
    parts_PTD = parts_PTD if parts else None
    actual = jax.jit(functools.partial(few_norms.add_norm, eps=EPS))(x_TD, parts_PTD, scale_D)
    assert all(a.dtype == dtype and a.shape == (T, D) for a in actual)
    oracle.close(wide(actual), wide(plain(parts_PTD, x_TD, scale_D)), rel)


@pytest.mark.parametrize("per_token", [1, 2, 3])
@pytest.mark.parametrize("router_type", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("dtype", "rel"), TYPES)
def test_add_norm_route(dtype, rel, router_type, per_token):
    """One token is padding; the routing is in float32 whatever the types."""
    parts_PTD, x_TD, scale_D, router_DE = operands(dtype)
    router_DE, real_T = router_DE.astype(router_type), np.array([True, False, True])
    new_TD, normed_TD, routed = few_norms.add_norm_route(
        x_TD, parts_PTD, scale_D, EPS, router_DE, real_T, per_token
    )
    oracle.close(wide((new_TD, normed_TD)), wide(plain(parts_PTD, x_TD, scale_D)), rel)
    wanted = route(normed_TD, router_DE, real_T, per_token)
    assert routed.ids_TC.dtype == jnp.int32
    np.testing.assert_array_equal(routed.ids_TC, wanted.ids_TC)
    oracle.close(routed.weights_TC, wanted.weights_TC, 1e-6)
    logits_TE = wide(normed_TD) @ wide(router_DE)
    oracle.close(routed.logits_TE, logits_TE, 1e-6)


def test_of_equal_experts_the_first_is_chosen():
    parts_PTD, x_TD, scale_D, router_DE = operands(jnp.float32)
    router_DE = jnp.tile(router_DE[:, :1], (1, E))
    real_T = np.ones(T, bool)
    *_, routed = few_norms.add_norm_route(x_TD, parts_PTD, scale_D, EPS, router_DE, real_T, 3)
    np.testing.assert_array_equal(routed.ids_TC, [[0, 1, 2]] * T)
    oracle.close(routed.weights_TC, np.full((T, 3), 1 / 3), 1e-6)


@pytest.mark.parametrize(
    ("platform", "tokens", "width", "experts", "dtype", "takes"),
    [
        ("gpu", 1, 4096, 8, jnp.bfloat16, True),
        ("gpu", few_rows.MOST, 6144, 8, jnp.float16, True),
        ("gpu", few_rows.MOST + 1, 4096, 8, jnp.bfloat16, False),
        ("gpu", 1, 4096, 64, jnp.bfloat16, False),
        ("gpu", 1, 4096, 8, jnp.float32, False),
        ("cpu", 1, 4096, 8, jnp.bfloat16, False),
    ],
)
def test_what_they_take(monkeypatch, platform, tokens, width, experts, dtype, takes):
    monkeypatch.setattr(few_rows, "platform", lambda: platform)
    assert few_norms.fits(tokens, width, experts, dtype) == takes
