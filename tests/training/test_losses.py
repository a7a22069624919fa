"""The losses against closed forms, NumPy and transformers' recorded numbers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixtral_jax.model.router import RoutingStatistics, local_statistics, route
from mixtral_jax.training import losses

RECORD = json.loads((pathlib.Path(__file__).parents[1] / "data/load_balance.json").read_text())


def statistics_of(logits_TE, real_T, per_token):
    """Statistics of logits: a router that is the identity passes them through. One layer."""
    experts = logits_TE.shape[1]
    routing = route(logits_TE, jnp.eye(experts), real_T, per_token)
    statistics = local_statistics(routing, real_T, jnp.zeros(()))
    return jax.tree.map(lambda s: s[None], statistics)


@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_load_balance_is_k_when_uniform(per_token):
    """Every expert chosen equally often, with equal probabilities."""
    experts, tokens, layers = 6, 12, 3
    statistics = RoutingStatistics(
        assignments_E=jnp.full((layers, experts), tokens * per_token / experts),
        probabilities_E=jnp.full((layers, experts), tokens / experts),
        tokens=jnp.full((layers,), float(tokens)),
        squared_logsumexp=jnp.zeros((layers,)),
        dropped=jnp.zeros((layers,)),
    )
    np.testing.assert_allclose(losses.load_balance(statistics), per_token, rtol=1e-6)


def test_load_balance_is_the_number_of_experts_when_collapsed():
    logits_TE = jnp.zeros((7, 5)).at[:, 3].set(50.0)
    statistics = statistics_of(logits_TE, jnp.ones(7, bool), 1)
    np.testing.assert_allclose(losses.load_balance(statistics), 5.0, rtol=1e-6)


@pytest.mark.parametrize("which", ["all", "masked"])
def test_load_balance_equals_transformers_for_one_layer(which):
    """Value and gradient, with and without padding (recorded: tests/data/make_load_balance.py)."""
    logits_TE = jnp.asarray(RECORD["logits_TE"], jnp.float32)
    mask = np.asarray(RECORD["mask_BL"]).reshape(-1) > 0
    real_T = jnp.asarray(mask if which == "masked" else np.ones_like(mask))

    def loss(logits_TE):
        return losses.load_balance(statistics_of(logits_TE, real_T, RECORD["per_token"]))

    value, gradient = jax.value_and_grad(loss)(logits_TE)
    np.testing.assert_allclose(value, RECORD[which]["loss"], rtol=1e-6)
    np.testing.assert_allclose(gradient, RECORD[which]["gradient_TE"], rtol=1e-4, atol=1e-8)


def test_layers_are_averaged_not_pooled():
    """Two layers that collapse on different experts are each unbalanced: pooling would hide it."""
    first = statistics_of(jnp.zeros((6, 4)).at[:, 0].set(50.0), jnp.ones(6, bool), 1)
    second = statistics_of(jnp.zeros((6, 4)).at[:, 1].set(50.0), jnp.ones(6, bool), 1)
    both = jax.tree.map(lambda *s: jnp.concatenate(s), first, second)
    np.testing.assert_allclose(losses.load_balance(both), 4.0, rtol=1e-6)


def test_router_z_is_the_mean_squared_logsumexp_of_real_tokens():
    logits_TE = jax.random.normal(jax.random.key(1), (7, 5))
    real_T = jnp.arange(7) < 4
    expected = np.mean(np.log(np.exp(np.asarray(logits_TE)[:4]).sum(axis=1)) ** 2)
    got = losses.router_z(statistics_of(logits_TE, real_T, 2))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_token_sums_match_numpy_and_leave_padding_out(monkeypatch, platform):
    monkeypatch.setattr(losses, "platform", lambda: platform)
    logits = np.asarray(jax.random.normal(jax.random.key(2), (3, 5, 11)), np.float64)
    targets = np.random.default_rng(0).integers(11, size=(3, 5))
    real = np.arange(5)[None] < np.array([[5], [2], [0]])
    lse = np.log(np.exp(logits).sum(axis=-1))
    nll = lse - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    sums = losses.token_sums(jnp.asarray(logits, jnp.float32), jnp.asarray(targets), real)
    np.testing.assert_allclose(sums.cross_entropy, nll[real].sum(), rtol=1e-6)
    np.testing.assert_allclose(sums.squared_logsumexp, (lse[real] ** 2).sum(), rtol=1e-6)
    assert float(sums.tokens) == real.sum() == 7
    spoiled = jnp.where(real[..., None], jnp.asarray(logits, jnp.float32), jnp.nan)
    assert losses.token_sums(spoiled, jnp.asarray(targets), real) == sums

    def weighted(logits_BLV):
        sums = losses.token_sums(logits_BLV, jnp.asarray(targets), real)
        return 3 * sums.cross_entropy + 0.7 * sums.squared_logsumexp

    softmax = np.exp(logits - lse[..., None])
    gradient = (3 + 2 * 0.7 * lse[..., None]) * softmax - 3 * np.eye(11)[targets]
    got = jax.grad(weighted)(jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(got, gradient * real[..., None], rtol=1e-5, atol=1e-6)


def test_a_batch_of_padding_alone_has_finite_losses():
    nothing = jnp.zeros(4, bool)
    statistics = statistics_of(jnp.ones((4, 5)), nothing, 2)
    sums = losses.token_sums(jnp.ones((1, 4, 11)), jnp.zeros((1, 4), jnp.int32), nothing[None])
    weights = {"load_balance_weight": 1.0, "router_z_weight": 1.0, "z_weight": 1.0}
    assert float(losses.losses(sums, statistics, sums.tokens, **weights).total) == 0.0
