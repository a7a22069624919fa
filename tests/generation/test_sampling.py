"""Sampling: the filters against NumPy, the draws against the probabilities, the streams."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from mixtral_jax.generation.sampling import Parameters, filter_logits, row_keys, sample

VOCABULARY = 37


def parameters(rows):
    """Parameters from one (temperature, top_k, top_p) for each row."""
    temperature, top_k, top_p = zip(*rows, strict=True)
    return Parameters(
        jnp.array(temperature, jnp.float32),
        jnp.array(top_k, jnp.int32),
        jnp.array(top_p, jnp.float32),
    )


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(logits, temperature, top_k, top_p):
    """Probabilities of one row, in float64: transformers' definitions, by sorting."""
    scores = logits.astype(np.float64) / temperature
    if top_k:
        kth = np.sort(scores)[-min(top_k, len(scores))]
        scores = np.where(scores < kth, -np.inf, scores)
    if top_p < 1:
        order = np.argsort(scores, kind="stable")
        upto = np.cumsum(softmax(scores)[order])
        gone = upto <= 1 - top_p
        gone[-1] = False
        scores[order[gone]] = -np.inf
    return softmax(scores)


def filtered(logits_BV, rows):
    logits = jax.jit(filter_logits)(jnp.asarray(logits_BV, jnp.float32), parameters(rows))
    return np.asarray(jax.nn.softmax(logits)), np.isfinite(logits)


CASES = list(
    itertools.product((0.3, 1.0, 2.5), (0, 1, 4, 36, 37, 99), (1e-9, 0.11, 0.52, 0.93, 0.9999, 1.0))
)


@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "peaked"])
def test_filters_are_those_of_the_reference(kind):
    random = np.random.default_rng(3)
    logits_BV = 2 * random.normal(size=(len(CASES), VOCABULARY)) - 5
    logits_BV = {
        "distinct": logits_BV,
        "ties": np.round(logits_BV),
        "equal": np.full_like(logits_BV, -1.25),
        "peaked": np.where(logits_BV == logits_BV.max(1, keepdims=True), 80.0, logits_BV),
    }[kind].astype(np.float32)
    got_BV, kept_BV = filtered(logits_BV, CASES)
    for got_V, kept_V, logits_V, case in zip(got_BV, kept_BV, logits_BV, CASES, strict=True):
        expected_V = reference(logits_V, *case)
        np.testing.assert_allclose(got_V, expected_V, rtol=2e-5, atol=1e-7, err_msg=str(case))
        likely = (expected_V == 0) | (expected_V > 1e-6)  # past the edge, or well within
        assert (kept_V == (expected_V > 0))[likely].all(), case


def test_top_p_keeps_the_fewest_tokens_that_reach_it():
    logits = np.log([0.05, 0.5, 0.1, 0.3, 0.05])
    top_p = (0.49, 0.51, 0.79, 0.81, 0.89, 0.91, 0.949, 0.951, 1.0)
    _, kept = filtered(np.tile(logits, (len(top_p), 1)), [(1.0, 0, p) for p in top_p])
    assert kept.sum(axis=1).tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert kept[5].tolist() == [False, True, True, True, True]  # of equals, the higher id


def test_extreme_numbers_leave_a_distribution():
    logits = np.array([3e38, -3e38, 3e38, 0.0, -np.inf], np.float32)
    rows = [(t, k, p) for t in (1e-30, 1.0, 1e6) for k in (0, 2) for p in (1e-30, 0.5, 1.0)]
    got, kept = filtered(np.tile(logits, (len(rows), 1)), rows)
    assert kept.any(axis=1).all()
    assert not kept[:, 4].any()
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-5)
    cold, *_ = filtered(np.array([[0.0, 1e-3, -1.0]]), [(1e-30, 0, 1.0)])
    np.testing.assert_allclose(cold, [[0, 1, 0]], atol=1e-7)


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals():
    logits = np.random.default_rng(0).normal(size=(6, VOCABULARY))
    logits[:, [9, 20, 31]] = 7.0
    rows = [(0.0, 0, 1.0), (0.0, 5, 0.5), (5.0, 0, 1.0)] * 2
    draw = jax.jit(sample)
    tokens = [
        draw(row_keys(jnp.full(6, seed, jnp.uint32), jnp.arange(6)), logits, parameters(rows))
        for seed in range(20)
    ]
    tokens = np.stack(tokens)
    assert (tokens[:, [0, 1, 3, 4]] == 9).all()
    assert len(np.unique(tokens[:, [2, 5]])) > 5


def draws(logits_V, row, seeds, steps):
    """Tokens drawn from one distribution with many keys, and its probabilities by the reference."""
    count = max(len(seeds), len(steps))
    keys = row_keys(
        jnp.asarray(np.resize(seeds, count), jnp.uint32), jnp.asarray(np.resize(steps, count))
    )
    logits_BV = jnp.tile(jnp.asarray(logits_V, jnp.float32), (count, 1))
    return np.asarray(jax.jit(sample)(keys, logits_BV, parameters([row] * count)))


@pytest.mark.parametrize("row", [(1.0, 0, 1.0), (0.7, 9, 1.0), (1.3, 0, 0.8), (1.6, 12, 0.9)])
@pytest.mark.parametrize("varied", ["steps of one seed", "seeds at one step"])
def test_frequencies_are_the_probabilities(row, varied):
    logits_V = np.random.default_rng(5).normal(size=VOCABULARY)
    many = np.arange(20_000)
    seeds, steps = ([11], many) if varied.startswith("steps") else (many, [3])
    counts_V = np.bincount(draws(logits_V, row, seeds, steps), minlength=VOCABULARY)

    def p_value(probabilities_V):
        some = probabilities_V > 0
        assert counts_V[~some].sum() == 0
        return scipy.stats.chisquare(counts_V[some], len(many) * probabilities_V[some]).pvalue

    assert p_value(reference(logits_V, *row)) > 1e-3
    temperature, *rest = row
    assert p_value(reference(logits_V, 1.1 * temperature, rest[0], 1.0)) < 1e-6  # the test's power


def test_a_row_depends_on_its_own_seed_and_step_alone():
    logits_BV = np.random.default_rng(6).normal(size=(7, VOCABULARY)).astype(np.float32)
    rows = [(1.5, 0, 1.0), (0.9, 5, 0.9), (0.0, 0, 1.0)] * 2 + [(2.0, 0, 0.95)]
    seeds = np.array([1, 2, 3, 4, 2**32 - 1, 2**31, 0], np.uint32)
    steps = np.array([0, 5, 2, 9, 1, 3, 7], np.int32)

    def tokens(pick):
        keys = row_keys(jnp.asarray(seeds[pick]), jnp.asarray(steps[pick]))
        chosen = parameters([rows[i] for i in pick])
        return np.asarray(jax.jit(sample)(keys, jnp.asarray(logits_BV[pick]), chosen))

    together = tokens(np.arange(7))
    shuffled = np.array([4, 0, 6, 2, 5, 1, 3])
    np.testing.assert_array_equal(tokens(shuffled), together[shuffled])
    for i in (0, 4, 5):
        assert tokens(np.array([i])) == together[i]


def test_streams_of_different_seeds_and_steps_differ():
    flat = np.zeros(VOCABULARY)
    row = (1.0, 0, 1.0)
    one = draws(flat, row, [1], np.arange(200))
    other = draws(flat, row, [2], np.arange(200))
    late = draws(flat, row, [1], np.arange(1, 201))
    assert (one == other).mean() < 0.15
    np.testing.assert_array_equal(one[1:], late[:-1])
    assert (one == late).mean() < 0.15
    assert (other == late).mean() < 0.15
