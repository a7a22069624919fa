"""Penalties, filters and log-probabilities: those of NumPy, of transformers and of torch."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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

from mixtral_jax.generation import sampling
from mixtral_jax.generation.sampling import (
    Parameters,
    filter_logits,
    log_probabilities,
    penalize,
)


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    """With what each computes, on the CPU."""
    monkeypatch.setattr(sampling, "platform", lambda: request.param)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


# ---- against NumPy -----------------------------------------------------------------------------


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
def test_filters_are_those_of_the_reference(kind, platform):
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


def test_extreme_numbers_leave_a_distribution(platform):
    logits = np.array([3e38, -3e38, 3e38, 0.0, -np.inf], np.float32)
    rows = [(t, k, p) for t in (1e-30, 1.0, 1e6) for k in (0, 2) for p in (1e-30, 0.5, 1.0)]
    got, kept = filtered(np.tile(logits, (len(rows), 1)), rows)
    assert kept.any(axis=1).all()
    assert not kept[:, 4].any()
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-5)
    cold, *_ = filtered(np.array([[0.0, 1e-3, -1.0]]), [(1e-30, 0, 1.0)])
    np.testing.assert_allclose(cold, [[0, 1, 0]], atol=1e-7)


def test_no_row_is_left_without_a_token(platform):
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
        *changes(jnp.asarray(bias_BV, jnp.float32), forbidden_BV),
    )
    kept = np.isfinite(out)
    assert [np.flatnonzero(k).tolist() for k in kept] == [[0, 1, 2], [2], [0, 1, 2]]


def test_what_no_row_asks_for_is_not_read():
    logits_BV = np.random.default_rng(13).normal(size=(3, VOCABULARY)).astype(np.float32)
    bias_BV, forbidden_BN = np.full_like(logits_BV, np.nan), np.full((3, 2), VOCABULARY)
    seen = history([[]] * 3, [[]] * 3)
    out = jax.jit(penalize)(
        logits_BV, parameters([PLAIN] * 3), seen, bias_BV, np.zeros(3, bool), forbidden_BN
    )
    np.testing.assert_array_equal(out, logits_BV)


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
        *changes(bias_BV, np.zeros_like(bias_BV, bool)),
    )
    biased_BV = logits_BV.astype(np.float64) + bias_BV
    expected_BV = list(map(penalized, biased_BV, rows, prompts, answers))
    np.testing.assert_allclose(got_BV, expected_BV, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top", [0, 1, 20, VOCABULARY])
def test_the_most_likely_tokens_are_those_of_top_k(top, platform):
    random = np.random.default_rng(7)
    logits_BV = random.normal(size=(8, VOCABULARY)).astype(np.float32)
    logits_BV[2:4] = np.round(logits_BV[2:4]) + 0.0  # ties; no -0, which top_k puts below 0
    logits_BV[4, 9:] = -np.inf
    logits_BV[5] = 0
    got = jax.jit(log_probabilities, static_argnums=2)(logits_BV, np.zeros(8, np.int32), top)
    _, ids_BN = jax.lax.top_k(logits_BV, top)
    np.testing.assert_array_equal(got.top_ids_BN, ids_BN)
    expected_BV = jax.nn.log_softmax(logits_BV)
    expected_BN = np.take_along_axis(np.asarray(expected_BV), np.asarray(ids_BN), 1)
    np.testing.assert_allclose(got.top_BN, expected_BN, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top", [-1, VOCABULARY + 1])
def test_more_log_probabilities_than_tokens_are_an_error(top):
    with pytest.raises(ValueError, match=f"top={top} is not in 0..{VOCABULARY}"):
        log_probabilities(jnp.zeros((2, VOCABULARY)), jnp.zeros(2, jnp.int32), top)


# ---- against transformers and torch ------------------------------------------------------------


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
    seen, asked = history(prompts, answers), changes(bias_BV, forbidden_BV)
    made_BV = jax.jit(penalize)(logits_BV, some, seen, *asked)
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
