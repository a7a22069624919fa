"""Draws: their frequencies are the probabilities, and a row depends on nothing but its own."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec
from sampling_rows import (
    PLAIN,
    VOCABULARY,
    changes,
    history,
    parameters,
    penalized,
    penalties,
    reference,
)

from mixtral_jax.generation.sampling import (
    History,
    filter_logits,
    log_probabilities,
    penalize,
    row_keys,
    sample,
)


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


def test_tokens_are_those_of_argmax_and_categorical(monkeypatch):
    """Which are slow on a CPU: only a row with NaN has argmax asked."""
    logits = np.random.default_rng(1).normal(size=(120, VOCABULARY)).astype(np.float32)
    logits[:60] = np.round(logits[:60])  # ties
    logits[60:90, 3:] = -np.inf
    keys = row_keys(jnp.arange(120, dtype=jnp.uint32), jnp.arange(120))

    def expected(logits, some):
        drawn = jax.vmap(jax.random.categorical)(keys, filter_logits(logits, some))
        return jnp.where(some.temperature_B > 0, drawn, jnp.argmax(logits, axis=1))

    some = parameters([(0.0, 0, 1.0), (0.7, 0, 1.0), (1.4, 9, 0.9)] * 40)
    for given in (logits, np.where(np.arange(VOCABULARY) > 4, np.nan, logits)):
        np.testing.assert_array_equal(jax.jit(sample)(keys, given, some), expected(given, some))
    plain = parameters([(0.0, 0, 1.0), (0.7, 0, 1.0)] * 60)
    wanted = expected(logits, plain)
    monkeypatch.delattr(jnp, "argmax")
    with jax.disable_jit():  # takes one branch
        np.testing.assert_array_equal(sample(keys, logits, plain), wanted)


def draws(logits_V, row, seeds, steps):
    """Tokens drawn from one distribution with many keys, and its probabilities by the reference."""
    count = max(len(seeds), len(steps))
    keys = row_keys(
        jnp.asarray(np.resize(seeds, count), jnp.uint32), jnp.asarray(np.resize(steps, count))
    )
    logits_BV = jnp.tile(jnp.asarray(logits_V, jnp.float32), (count, 1))
    return np.asarray(jax.jit(sample)(keys, logits_BV, parameters([row] * count)))


@pytest.mark.parametrize(
    "row", [(1.0, 0, 1.0), (0.7, 9, 1.0), (1.3, 0, 0.8), (1.6, 12, 0.9), (1.4, 15, 0.95, 0.25)]
)
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
    temperature, top_k, *_ = row
    assert p_value(reference(logits_V, 1.1 * temperature, top_k, 1.0)) < 1e-6  # the test's power


def test_each_row_of_a_mixed_batch_is_drawn_by_its_own_penalties_and_filters():
    rows = [
        penalties(1.4, 0.5, 0.2, temperature=0.8, top_k=11),
        penalties(temperature=1.5, min_p=0.2),
        penalties(presence=-1.0, top_p=0.85),
        penalties(0.7, frequency=1.1, temperature=2.0, top_k=30, top_p=0.97, min_p=0.05),
        PLAIN,
    ]
    prompts, answers = [[1, 2, 3, 30]] * 5, [[4, 4, 2, 9], [5], [7, 8, 9, 9], [0, 0, 0, 12], []]
    random = np.random.default_rng(8)
    logits_BV, bias_BV = random.normal(size=(2, 5, VOCABULARY)).astype(np.float32)
    forbidden_BV = random.random((5, VOCABULARY)) < 0.2
    given_rows = (parameters(rows), history(prompts, answers), *changes(bias_BV, forbidden_BV))

    def draw(step):
        keys = row_keys(jnp.arange(5, dtype=jnp.uint32), jnp.broadcast_to(step, 5))
        return sample(keys, penalize(logits_BV, *given_rows), given_rows[0])

    many = 20_000
    tokens = np.asarray(
        jax.jit(lambda steps: jax.lax.map(draw, steps, batch_size=100))(np.arange(many))
    )
    for b, row in enumerate(rows):
        biased_V = logits_BV[b].astype(np.float64) + bias_BV[b]
        penalized_V = penalized(biased_V, row, prompts[b], answers[b])
        penalized_V[forbidden_BV[b]] = -np.inf
        expected_V = many * reference(penalized_V, *row[:4])
        counts_V = np.bincount(tokens[:, b], minlength=VOCABULARY)
        some = expected_V > 0
        assert counts_V[~some].sum() == 0
        assert scipy.stats.chisquare(counts_V[some], expected_V[some]).pvalue > 1e-3


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


def test_penalties_do_not_cross_rows():
    random = np.random.default_rng(9)
    logits_BV = 3 * random.normal(size=(6, VOCABULARY)).astype(np.float32)
    rows = [
        PLAIN,
        penalties(1.3, top_k=20),
        penalties(presence=0.7, top_p=0.98),
        penalties(frequency=-0.3),
        penalties(0.8),
        penalties(0.7, 1.0, 0.5, top_k=7, top_p=0.8, min_p=0.1),
    ]
    tokens = random.integers(0, VOCABULARY, (2, 6, 12)).tolist()
    bias_BV = np.zeros_like(logits_BV)
    forbidden_BV = random.random((6, VOCABULARY)) < 0.3
    bias_BV[2:, 5], forbidden_BV[[0, 3]] = 4.0, False

    def out(pick):
        some, seen = parameters([rows[i] for i in pick]), jax.tree.map(np.array, history(*tokens))
        seen = History(*(array[pick] for array in seen))
        asked = changes(bias_BV[pick], forbidden_BV[pick])
        made = jax.jit(penalize)(logits_BV[pick], some, seen, *asked)
        chances = log_probabilities(jnp.asarray(logits_BV[pick]), jnp.full(len(pick), 4), 3)
        return [np.asarray(a) for a in (made, jax.jit(filter_logits)(made, some), *chances)]

    together = out(np.arange(6))
    np.testing.assert_array_equal(together[0][0], logits_BV[0])  # nothing asked, nothing changed
    for pick in (np.array([4, 0, 5, 2, 1, 3]), *np.arange(6)[:, None]):
        for alone, all_rows in zip(out(pick), together, strict=True):
            np.testing.assert_array_equal(alone, all_rows[pick])


def test_rows_split_over_devices_are_sampled_as_on_one():
    rows = [penalties(1.2, 0.3, 0.1, top_k=9, temperature=1.5), *[PLAIN] * 6, penalties(top_p=0.5)]
    random = np.random.default_rng(10)
    logits_BV = random.normal(size=(8, VOCABULARY)).astype(np.float32)
    tokens = random.integers(0, VOCABULARY, (2, 8, 6)).tolist()

    def body(logits_BV, some, seen, seed_B):
        asked = changes(jnp.zeros_like(logits_BV), logits_BV > 2)
        made_BV = penalize(logits_BV, some, seen, *asked)
        token_B = sample(row_keys(seed_B, jnp.zeros_like(seed_B)), made_BV, some)
        return token_B, log_probabilities(logits_BV, token_B, 4)

    given_rows = (logits_BV, parameters(rows), history(*tokens), np.arange(8, dtype=np.uint32))
    batch = PartitionSpec("batch")
    mesh = jax.make_mesh((8,), ("batch",))
    split = jax.shard_map(body, mesh=mesh, in_specs=batch, out_specs=batch)
    got = jax.jit(split)(*jax.device_put(given_rows, NamedSharding(mesh, batch)))
    chex.assert_trees_all_close(got, body(*given_rows), rtol=1e-6)


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
