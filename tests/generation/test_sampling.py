"""Sampling: penalties and filters against NumPy and transformers, draws against probabilities."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.generation.sampling import (
    History,
    Parameters,
    filter_logits,
    log_probabilities,
    penalize,
    row_keys,
    sample,
)

VOCABULARY = 37
PLAIN = Parameters(1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)


def parameters(rows):
    """Parameters from the first few of each row's: temperature, top_k, top_p, min_p, ..."""
    whole = [(*row, *PLAIN[len(row) :]) for row in rows]
    columns = zip(*whole, strict=True)
    dtypes = Parameters(*[jnp.float32] * 7)._replace(top_k_B=jnp.int32)
    return Parameters(*(jnp.array(c, dtype) for c, dtype in zip(columns, dtypes, strict=True)))


def penalties(repetition=1.0, presence=0.0, frequency=0.0, **others):
    """One row's parameters by name."""
    row = PLAIN._replace(repetition_B=repetition, presence_B=presence, frequency_B=frequency)
    return row._replace(**{f"{name}_B": value for name, value in others.items()})


def history(prompts, answers):
    """The history of rows whose prompts and answers are lists of tokens."""
    count_BV = [[np.bincount(t, minlength=VOCABULARY) for t in x] for x in (prompts, answers)]
    return History(jnp.array(count_BV[0]) > 0, jnp.array(count_BV[1], jnp.int32))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(logits, temperature, top_k, top_p, min_p=0.0):
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
    probabilities = softmax(scores)
    scores[probabilities < min_p * probabilities.max()] = -np.inf
    return softmax(scores)


def filtered(logits_BV, rows):
    logits = jax.jit(filter_logits)(jnp.asarray(logits_BV, jnp.float32), parameters(rows))
    return np.asarray(jax.nn.softmax(logits)), np.isfinite(logits)


CASES = list(
    itertools.product(
        (0.3, 1.0, 2.5),
        (0, 1, 4, 36, 37, 99),
        (1e-9, 0.11, 0.52, 0.93, 0.9999, 1.0),
        (0.0, 1e-4, 0.17, 1.0),
    )
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


def test_no_row_is_left_without_a_token():
    inf = np.inf
    logits = [[-inf] * 4, [inf, 0.0, inf, -inf], [3e38, 1.0, -3e38, 0.0], [0.0, 2.0, 2.0, 1.0]]
    rows = list(itertools.product((1e-30, 1.0), (-1, 0, 1), (0.0, 0.5, 1.0), (0.0, 1.0, 7.0)))
    for logits_V in logits:
        got, kept = filtered(np.tile(logits_V, (len(rows), 1)), rows)
        assert kept.any(axis=1).all()
        np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-5)
        best = np.max(logits_V) == logits_V
        assert kept[:, best].any(axis=1).all()
        assert (kept[rows.index((1.0, 0, 1.0, 1.0))] == best).all()


def test_a_row_keeps_its_forbidden_tokens_if_nothing_else_is_left():
    bias_BV = np.where(np.arange(VOCABULARY) < 3, 0.0, -np.inf)[None].repeat(3, 0)
    forbidden_BV = np.zeros((3, VOCABULARY), bool)
    forbidden_BV[0, :3] = forbidden_BV[1, :2] = True
    out = penalize(
        jnp.ones((3, VOCABULARY)),
        parameters([PLAIN, penalties(1.5), PLAIN]),
        history([[1, 2]] * 3, [[3]] * 3),
        jnp.asarray(bias_BV, jnp.float32),
        jnp.asarray(forbidden_BV),
    )
    kept = np.isfinite(out)
    assert [np.flatnonzero(k).tolist() for k in kept] == [[0, 1, 2], [2], [0, 1, 2]]


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
    given_rows = (parameters(rows), history(prompts, answers), bias_BV, forbidden_BV)

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
        made = jax.jit(penalize)(logits_BV[pick], some, seen, bias_BV[pick], forbidden_BV[pick])
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
        bias_BV, forbidden_BV = jnp.zeros_like(logits_BV), logits_BV > 2
        made_BV = penalize(logits_BV, some, seen, bias_BV, forbidden_BV)
        token_B = sample(row_keys(seed_B, jnp.zeros_like(seed_B)), made_BV, some)
        return token_B, log_probabilities(logits_BV, token_B, 4)

    given_rows = (logits_BV, parameters(rows), history(*tokens), np.arange(8, dtype=np.uint32))
    batch = PartitionSpec("batch")
    mesh = jax.make_mesh((8,), ("batch",))
    split = jax.shard_map(body, mesh=mesh, in_specs=batch, out_specs=batch)
    got = jax.jit(split)(*jax.device_put(given_rows, NamedSharding(mesh, batch)))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), got, body(*given_rows))


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


# ---- penalties, and transformers ----------------------------------------------------------------


def penalized(logits_V, row, prompt, answer):
    """One row's penalties, a token at a time: transformers' repetition, then OpenAI's formula."""
    out = np.array(logits_V, np.float64)
    for token in {*prompt, *answer}:
        out[token] = (
            out[token] * row.repetition_B if out[token] < 0 else out[token] / row.repetition_B
        )
    for token in {*answer}:
        count = answer.count(token)
        out[token] = out[token] - count * row.frequency_B - float(count > 0) * row.presence_B
    return out


def test_penalties_are_those_of_the_formulas():
    random = np.random.default_rng(11)
    rows = [
        penalties(*row) for row in itertools.product((0.6, 1.0, 1.7), (-1.5, 0, 2), (-0.5, 0, 1.1))
    ]
    logits_BV, bias_BV = random.normal(size=(2, len(rows), VOCABULARY)).astype(np.float32)
    logits_BV[:, 3], bias_BV[:, 3:9] = -np.inf, 0
    prompts, answers = random.integers(0, VOCABULARY, (2, len(rows), 21)).tolist()
    answers[0] = []
    got_BV = jax.jit(penalize)(
        logits_BV,
        parameters(rows),
        history(prompts, answers),
        bias_BV,
        np.zeros_like(bias_BV, bool),
    )
    biased_BV = logits_BV.astype(np.float64) + bias_BV
    expected_BV = list(map(penalized, biased_BV, rows, prompts, answers))
    np.testing.assert_allclose(got_BV, expected_BV, rtol=1e-5, atol=1e-6)


def transformers_probabilities(logits_V, row, prompt, answer, bias, ends, least):
    """What transformers draws from, its processors in its order, OpenAI's penalties among them."""
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")

    def openai(_, scores):
        only_made = row._replace(repetition_B=1.0)
        return torch.tensor(penalized(scores[0].numpy(), only_made, [], answer)[None]).float()

    steps = hf.LogitsProcessorList()
    if bias:
        steps.append(hf.SequenceBiasLogitsProcessor({(t,): b for t, b in bias.items()}))
    if row.repetition_B != 1:
        steps.append(hf.RepetitionPenaltyLogitsProcessor(row.repetition_B))
    if row.presence_B or row.frequency_B:
        steps.append(openai)
    if least:
        steps.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), least, ends))
    if row.temperature_B != 1:
        steps.append(hf.TemperatureLogitsWarper(row.temperature_B))
    if row.top_k_B:
        steps.append(hf.TopKLogitsWarper(row.top_k_B))
    if row.top_p_B < 1:
        steps.append(hf.TopPLogitsWarper(row.top_p_B))
    if row.min_p_B:
        steps.append(hf.MinPLogitsWarper(row.min_p_B))
    scores = torch.tensor(np.array(logits_V))[None]
    return steps(torch.tensor([prompt + answer]), scores).softmax(-1)[0].numpy()


def agree(got_V, expected_V, logits_V):
    """As close as float32 brings them, and as many excluded: torch.sort may keep any of equals.

    Ours, the higher ids, are in test_filters_are_those_of_the_reference.
    """
    got_V, expected_V = (p_V[np.lexsort((p_V, logits_V))] for p_V in (got_V, expected_V))
    same_V = ((got_V == 0) == (expected_V == 0)) | (np.maximum(got_V, expected_V) < 1e-7)
    return same_V.all() and np.allclose(got_V, expected_V, rtol=1e-4, atol=1e-7)


# Of the seven parameters, logit bias and least new tokens: one alone, all, or any of them.
FEATURES = st.one_of(
    st.sampled_from(range(9)).map(lambda i: {i}), st.just(set(range(9))), st.sets(st.integers(0, 8))
)


@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.3, 2.0, 12.0]),
    ties=st.booleans(),
    features=st.lists(FEATURES, min_size=5, max_size=5),
)
@settings(max_examples=60)
def test_penalties_and_filters_are_those_of_transformers(seed, spread, ties, features):
    random = np.random.default_rng(seed)
    logits_BV = (spread * random.normal(size=(5, VOCABULARY))).astype(np.float32)
    logits_BV = np.round(logits_BV) if ties else logits_BV
    cases, bias_BV, forbidden_BV = [], np.zeros_like(logits_BV), np.zeros(logits_BV.shape, bool)
    for b, used in enumerate(features):
        drawn = Parameters(
            temperature_B=random.uniform(0.2, 3),
            top_k_B=int(random.integers(1, VOCABULARY + 9)),
            top_p_B=random.uniform(0.02, 0.999),
            min_p_B=random.uniform(0, 1) ** 3,
            repetition_B=random.uniform(0.5, 2.5),
            presence_B=random.uniform(-2, 2),
            frequency_B=random.uniform(-2, 2),
        )
        row = Parameters(*(x if i in used else PLAIN[i] for i, x in enumerate(drawn)))
        prompt, answer = (
            random.integers(0, VOCABULARY, random.integers(1, 15)).tolist() for _ in "pa"
        )
        biased = random.choice(VOCABULARY, 4, replace=False).tolist() if 7 in used else []
        bias = {token: random.uniform(-5, 5) for token in biased}
        ends, least = random.choice(VOCABULARY, 3).tolist(), int(random.integers(1, 20))
        least = least if 8 in used else 0
        bias_BV[b, biased] = [*bias.values()]
        forbidden_BV[b, ends] = len(answer) < least
        cases.append((row, prompt, answer, bias, ends, least))
    rows, prompts, answers, *_ = zip(*cases, strict=True)
    some = parameters(rows)
    made_BV = jax.jit(penalize)(logits_BV, some, history(prompts, answers), bias_BV, forbidden_BV)
    got_BV = np.asarray(jax.nn.softmax(jax.jit(filter_logits)(made_BV, some)))
    for logits_V, made_V, got_V, (row, *rest) in zip(
        logits_BV, made_BV, got_BV, cases, strict=True
    ):
        tried = (  # rounding decides on tokens right at an edge
            row._replace(top_p_B=min(row.top_p_B * p, 1.0), min_p_B=min(row.min_p_B * m, 1.0))
            for p, m in itertools.product((1, 1 - 1e-5, 1 + 1e-5), repeat=2)
        )
        drawn_from = (transformers_probabilities(logits_V, one, *rest) for one in tried)
        assert any(agree(got_V, expected_V, made_V) for expected_V in drawn_from), (row, *rest)


@pytest.mark.parametrize("top", [0, 1, 5, VOCABULARY])
def test_log_probabilities_are_those_of_torch(top):
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(12)
    logits_BV = random.normal(size=(6, VOCABULARY)) * np.array([0, 1, 1, 5, 80, 1])[:, None]
    logits_BV = (logits_BV + np.array([3, 0, 1e4, 0, 0, -1e4])[:, None]).astype(np.float32)
    token_B = random.integers(0, VOCABULARY, 6)
    got = jax.jit(log_probabilities, static_argnums=2)(logits_BV, token_B, top)
    expected_BV = torch.log_softmax(torch.tensor(logits_BV), -1).numpy()
    assert got.top_ids_BN.shape == got.top_BN.shape == (6, top)
    assert (got.top_ids_BN.dtype, got.top_BN.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_allclose(
        got.chosen_B,
        np.take_along_axis(expected_BV, token_B[:, None], 1)[:, 0],
        rtol=1e-6,
        atol=1e-6,
    )
    order_BV = np.argsort(-logits_BV, axis=1, kind="stable")  # of equals, the lower id first
    np.testing.assert_array_equal(got.top_ids_BN, order_BV[:, :top])
    expected_BN = np.take_along_axis(expected_BV, order_BV[:, :top], 1)
    np.testing.assert_allclose(got.top_BN, expected_BN, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("top", [-1, VOCABULARY + 1])
def test_more_log_probabilities_than_tokens_are_an_error(top):
    with pytest.raises(ValueError, match=f"top={top} is not in 0..{VOCABULARY}"):
        log_probabilities(jnp.zeros((2, VOCABULARY)), jnp.zeros(2, jnp.int32), top)
