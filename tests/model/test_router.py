import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax.model.router import local_statistics, product_of_bfloat16, route

T, D, E = 11, 6, 5


def inputs(experts=E, seed=0):
    rng = np.random.default_rng(seed)
    x_TD, w_DE = rng.normal(size=(T, D)), rng.normal(size=(D, experts))
    real_T = np.arange(T) % 4 != 1
    return x_TD.astype(np.float32), w_DE.astype(np.float32), real_T


def oracle_routing(x_TD, w_DE, k):
    logits_TE = np.float64(x_TD) @ np.float64(w_DE)
    ids_TC = oracle.top_k(logits_TE, k)
    weights_TC = oracle.softmax(np.take_along_axis(logits_TE, ids_TC, axis=1))
    return ids_TC, weights_TC, oracle.softmax(logits_TE), oracle.logsumexp(logits_TE)


@pytest.mark.parametrize(("experts", "k"), [(E, 2), (E, 1), (E, 3), (E, E), (1, 1)])
def test_choices_weights_and_probabilities(experts, k):
    x_TD, w_DE, real_T = inputs(experts)
    routing = route(x_TD, w_DE, real_T, k)
    ids_TC, *others = oracle_routing(x_TD, w_DE, k)
    np.testing.assert_array_equal(routing.ids_TC[real_T], ids_TC[real_T])
    np.testing.assert_array_equal(routing.ids_TC[~real_T], experts)
    oracle.close(tuple(routing[1:]), tuple(others), rel=1e-6)
    np.testing.assert_allclose(routing.weights_TC.sum(axis=1), 1, rtol=1e-6)


def test_softmax_over_the_chosen_is_renormalised_softmax_over_all():
    """The paper's form and Hugging Face's are one."""
    x_TD, w_DE, _ = inputs()
    routing = route(x_TD, w_DE, np.ones(T, bool), 2)
    best = jnp.take_along_axis(routing.probabilities_TE, routing.ids_TC, axis=1)
    oracle.close(routing.weights_TC, best / best.sum(axis=1, keepdims=True), rel=1e-6)


def test_gradients():
    x_TD, w_DE, real_T = inputs()
    rng = np.random.default_rng(1)
    g_TC, g_TE, g_T = rng.normal(size=(T, 2)), rng.normal(size=(T, E)), rng.normal(size=T)

    def scalar(x_TD, w_DE):
        r = route(x_TD, w_DE, real_T, 2)
        parts = (r.weights_TC, r.probabilities_TE, r.logsumexp_T)
        return sum((a * jnp.asarray(g, a.dtype)).sum() for a, g in zip(parts, (g_TC, g_TE, g_T)))

    def wanted(x_TD, w_DE):
        logits_TE = x_TD @ w_DE
        chosen = oracle.xp.take_along_axis(logits_TE, oracle.top_k(logits_TE, 2), axis=1)
        parts = oracle.softmax(chosen), oracle.softmax(logits_TE), oracle.logsumexp(logits_TE)
        return sum((a * g).sum() for a, g in zip(parts, (g_TC, g_TE, g_T)))

    actual = jax.grad(scalar, (0, 1))(x_TD, w_DE)
    oracle.close(actual, oracle.gradient(wanted, (0, 1))(np.float64(x_TD), np.float64(w_DE)), 2e-6)


def test_of_equal_experts_the_first_is_chosen():
    w_DE = np.zeros((D, E), np.float32)
    w_DE[0, [1, 3, 4]] = 1
    x_TD = np.ones((T, D), np.float32)
    routing = route(x_TD, w_DE, np.ones(T, bool), 2)
    np.testing.assert_array_equal(routing.ids_TC, np.tile([1, 3], (T, 1)))
    np.testing.assert_allclose(routing.weights_TC, 0.5)


def test_routing_is_float32_whatever_comes_in():
    """In bfloat16 logits of 128.5 and 128 would tie; the first must win, with the right weight."""
    w_DE = np.zeros((D, E), np.float32)
    w_DE[:2, 1], w_DE[0, 2] = (0.5, 128), 128
    x_TD = jnp.ones((T, D), jnp.bfloat16)
    routing = route(x_TD, jnp.asarray(w_DE, jnp.bfloat16), np.ones(T, bool), 2)
    np.testing.assert_array_equal(routing.ids_TC[0], [1, 2])
    np.testing.assert_allclose(routing.weights_TC[0, 0], 1 / (1 + np.exp(-0.5)), rtol=1e-6)
    assert {a.dtype.name for a in routing[1:]} == {"float32"}


def test_bfloat16_times_float32_on_matrix_units():
    """As exact as in float32, though the router's values need all of their 24 bits."""
    rng = np.random.default_rng(0)
    x_TD = jnp.asarray(rng.normal(size=(64, 256)), jnp.bfloat16)
    w_DE = np.float32(rng.normal(size=(256, E)) * np.exp(rng.normal(size=(256, E)) * 8))
    wanted_TE = np.float64(x_TD) @ np.float64(w_DE)
    found_TE, pull = jax.vjp(jax.jit(product_of_bfloat16), x_TD, w_DE)
    largest_TE = np.abs(np.float64(x_TD)) @ np.abs(np.float64(w_DE))
    assert found_TE.dtype == jnp.float32
    assert np.max(np.abs(found_TE - wanted_TE) / largest_TE) < 1e-6  # of two parts: 3e-6
    g_TE = np.float32(rng.normal(size=wanted_TE.shape))
    dx_TD, dw_DE = pull(g_TE)
    assert dx_TD.dtype == jnp.bfloat16
    rounded_TD = jnp.asarray(np.float64(g_TE) @ np.float64(w_DE).T, jnp.bfloat16)
    assert np.mean(np.asarray(dx_TD == rounded_TD)) > 0.999  # of one part each: 0.62
    oracle.close((dw_DE,), (np.float64(x_TD).T @ np.float64(g_TE),), rel=1e-6)


def test_statistics_are_sums_over_real_tokens():
    x_TD, w_DE, real_T = inputs()
    padding = np.where(real_T, 0, np.nan).astype(np.float32)[:, None]  # whatever that holds
    routing = route(x_TD + padding, w_DE, real_T, 2)
    statistics = local_statistics(routing, real_T, jnp.int32(7))
    ids_TC, _, probabilities_TE, logsumexp_T = oracle_routing(x_TD, w_DE, 2)
    chosen = np.bincount(ids_TC[real_T].ravel(), minlength=E)
    expected = (
        chosen,
        probabilities_TE[real_T].sum(axis=0),
        real_T.sum(),
        (logsumexp_T[real_T] ** 2).sum(),
        7,
    )
    oracle.close(tuple(statistics), expected, rel=1e-6)
    assert {a.dtype.name for a in statistics} == {"float32"}
