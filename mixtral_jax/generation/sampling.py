"""Logits to tokens: penalties, filters and the draw, each row by its own parameters and key.

    logits_BV = penalize(logits_BV, parameters, history, bias_BV, biased_B, forbidden_BN)
    token_B = sample(row_keys(seed_B, step_B), logits_BV, parameters)

A row's choice depends on nothing but its own logits, parameters, history and key. The order is that
of Hugging Face transformers' `_get_logits_processor`: logit bias, repetition penalty, tokens that
are forbidden, then temperature, top-k, top-p and min-p. OpenAI's presence and frequency penalties,
which transformers lacks, follow the repetition penalty, as in vLLM. What no row of the batch asks
for is skipped.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.kernels import platform

LEAST_TEMPERATURE = 1e-6  # below it, differences between float32 logits leave float32
LEAST_TOP_P = 1e-30  # keeps one token


def in_graphs() -> bool:
    """Whether XLA makes CUDA graphs of a program: of all but loops and sorts of a whole vocabulary.

    For these the host waits until the device is there, even if they are in the branch of a
    condition that is not taken, and the device then waits for what the host does next.
    """
    return platform() == "gpu"


class Parameters(NamedTuple):
    """How each row of a batch is sampled."""

    temperature_B: jax.Array
    """float32, what logits are divided by; 0 is greedy: the most likely token, the first of equals.
    Above 0, 1e-6 is the least."""
    top_k_B: jax.Array
    """int32, how many of the most likely tokens to choose from; 0 is all."""
    top_p_B: jax.Array
    """float32 in 0..1: choose from the fewest tokens whose probabilities reach this; 1 is all."""
    min_p_B: jax.Array
    """float32 in 0..1: drop tokens less likely than this many times the most likely; 0 is off."""
    repetition_B: jax.Array
    """float32 above 0: what the logits of tokens in the prompt or made so far are divided by, or
    multiplied by where they are negative; 1 is off."""
    presence_B: jax.Array
    """float32, subtracted from the logits of tokens made so far; 0 is off."""
    frequency_B: jax.Array
    """float32, subtracted as many times as the token has been made; 0 is off."""


class History(NamedTuple):
    """Which tokens each row has seen."""

    in_prompt_BV: jax.Array
    """bool, whether the prompt has the token."""
    made_BV: jax.Array
    """int32, how often the token has been made."""


class LogProbabilities(NamedTuple):
    """Natural logarithms of probabilities, float32."""

    chosen_B: jax.Array
    top_ids_BN: jax.Array
    """int32, the N most likely tokens, best first; of equals, the lower id first."""
    top_BN: jax.Array


def row_keys(seed_B: jax.Array, step_B: jax.Array) -> jax.Array:
    """key_B: the key of each row's own stream (uint32 seeds) at the row's own step."""
    return jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(
        seed_B, step_B
    )


def penalize(
    logits_BV: jax.Array,
    parameters: Parameters,
    history: History,
    bias_BV: jax.Array,
    biased_B: jax.Array,
    forbidden_BN: jax.Array,
) -> jax.Array:
    """Logits with the bias added, then the penalties taken off, then -inf for forbidden tokens.

    With l the biased logit of a token, c how often it has been made, and r the row's repetition
    penalty for tokens in the prompt or made, 1 for others:

        (l / r if l > 0 else l * r) - presence * (c > 0) - frequency * c

    A row of which nothing else would be left keeps its forbidden tokens.

    Sources: the repetition penalty is of CTRL (https://arxiv.org/abs/1909.05858, section 4.1), as
    transformers' RepetitionPenaltyLogitsProcessor has it; presence and frequency are OpenAI's
    (https://platform.openai.com/docs/advanced-usage, parameter details).

    Args:
      logits_BV: float32, the model's.
      history: read only if a row has a penalty.
      bias_BV: float32, finite or -inf.
      biased_B: bool, false where a row's bias is 0 or need not be added.
      forbidden_BN: int32, e.g. the ids that end an answer while it is too short to end; V is none.
    """
    p = parameters
    used_B = (p.repetition_B != 1) | (p.presence_B != 0) | (p.frequency_B != 0)
    forbids_B = (forbidden_BN < logits_BV.shape[1]).any(axis=1)

    def changed():
        biased_BV = logits_BV + bias_BV

        def penalized():
            made_BV = history.made_BV > 0
            r_BV = jnp.where(history.in_prompt_BV | made_BV, p.repetition_B[:, None], 1)
            less_BV = jnp.where(biased_BV > 0, biased_BV / r_BV, biased_BV * r_BV)
            less_BV = less_BV - jnp.where(made_BV, p.presence_B[:, None], 0)
            return less_BV - p.frequency_B[:, None] * history.made_BV

        less_BV = jax.lax.cond(used_B.any(), penalized, lambda: biased_BV)
        row_B1 = jnp.arange(less_BV.shape[0])[:, None]
        allowed_BV = less_BV.at[row_B1, forbidden_BN].set(-jnp.inf, mode="drop")
        some_B1 = (allowed_BV > -jnp.inf).any(axis=-1, keepdims=True)
        return jnp.where(some_B1, allowed_BV, less_BV)

    return jax.lax.cond((used_B | biased_B | forbids_B).any(), changed, lambda: logits_BV)


def filter_logits(logits_BV: jax.Array, parameters: Parameters) -> jax.Array:
    """Logits of the distribution to draw from: over the temperature; -inf for excluded tokens.

    Top-k keeps every token as likely as the k-th. Top-p keeps, of equally likely tokens at its
    edge, as many as it needs, higher ids first. Min-p (https://arxiv.org/abs/2407.01082) drops
    tokens less likely than min_p times the most likely. None leaves a row without a token, and a
    row of equal infinities is as one of zeros.

    Args:
      logits_BV: float32, unnormalised.
      parameters: greedy rows come out as for the least temperature.
    """
    temperature_B, top_k_B, top_p_B, min_p_B, *_ = parameters
    best_B1 = logits_BV.max(axis=-1, keepdims=True)
    # The best are 0 apart, infinities too: inf - inf is no number.
    below_best_BV = jnp.where(logits_BV == best_B1, 0, logits_BV - best_B1)
    scaled_BV = below_best_BV / jnp.maximum(temperature_B, LEAST_TEMPERATURE)[:, None]
    for keep, limit_B, used_B in (
        (_keep_top_k, top_k_B, top_k_B > 0),
        (_keep_top_p, top_p_B, top_p_B < 1),
    ):
        scaled_BV = jax.lax.cond(used_B.any(), keep, lambda x, _: x, scaled_BV, limit_B)
    least_B = jnp.minimum(jnp.log(min_p_B), 0)  # the most likely token's scaled logit is 0
    return jnp.where(scaled_BV >= least_B[:, None], scaled_BV, -jnp.inf)


def _keep_top_k(scaled_BV: jax.Array, top_k_B: jax.Array) -> jax.Array:
    code_BV = _ordered_code(scaled_BV)
    vocabulary = scaled_BV.shape[1]
    count_B = jnp.where(top_k_B <= 0, vocabulary, jnp.minimum(top_k_B, vocabulary))
    kth_B1 = _heaviest_cut(code_BV, jnp.ones_like(code_BV, jnp.int32), count_B)
    return jnp.where(code_BV >= kth_B1, scaled_BV, -jnp.inf)


def _keep_top_p(scaled_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    code_BV = _ordered_code(scaled_BV)
    top_p_B = jnp.maximum(top_p_B, LEAST_TOP_P)
    probability_BV = jax.nn.softmax(scaled_BV)
    edge_B1 = _heaviest_cut(code_BV, probability_BV, top_p_B)
    above_BV, at_edge_BV = code_BV > edge_B1, code_BV == edge_B1
    above_B1 = jnp.where(above_BV, probability_BV, 0).sum(axis=-1, keepdims=True)
    later_BV = jnp.cumsum(at_edge_BV[:, ::-1], axis=-1)[:, ::-1] - 1  # equals with higher ids
    needed_BV = at_edge_BV & (above_B1 + later_BV * probability_BV < top_p_B[:, None])
    kept_BV = above_BV | needed_BV | (top_p_B >= 1)[:, None]
    return jnp.where(kept_BV, scaled_BV, -jnp.inf)


def _ordered_code(x: jax.Array) -> jax.Array:
    """uint32 codes that compare as the float32 values do."""
    x = jnp.where(x == 0, 0.0, x)  # -0.0 equals 0.0
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31, ~bits, bits | jnp.uint32(1 << 31))


def _heaviest_cut(code_BV: jax.Array, weight_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """cut_B1: the largest code such that the elements with at least this code weigh the target.

    Found bit by bit, which costs 32 sums; sorting a row costs ten times more on a CPU. On GPU by
    four bits at a time and without a loop: see `in_graphs`.
    """
    bits = 4 if in_graphs() else 1
    digit_1J = jnp.arange(1, 1 << bits, dtype=jnp.uint32)[None]

    def step(i, cut_B1):
        place = (32 - bits - bits * jnp.asarray(i)).astype(jnp.uint32)
        tried_BJ = cut_B1 | (digit_1J << place)
        over_BJV = code_BV[:, None] >= tried_BJ[..., None]
        weight_BJ = jnp.where(over_BJV, weight_BV[:, None], 0).sum(axis=-1)
        reached_BJ = weight_BJ >= target_B[:, None]
        return cut_B1 | (reached_BJ.sum(axis=-1, keepdims=True, dtype=jnp.uint32) << place)

    start_B1 = jnp.zeros_like(code_BV[:, :1])
    return jax.lax.fori_loop(0, 32 // bits, step, start_B1, unroll=in_graphs())


def sample(key_B: jax.Array, logits_BV: jax.Array, parameters: Parameters) -> jax.Array:
    """The next token of each row, int32.

    Args:
      key_B: one key a row, from `row_keys`.
      logits_BV: float32.
    """
    drawn_B = parameters.temperature_B > 0

    def draw():
        asked = parameters._replace(  # greedy rows ask for no filter
            top_k_B=jnp.where(drawn_B, parameters.top_k_B, 0),
            top_p_B=jnp.where(drawn_B, parameters.top_p_B, 1),
        )
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(key_B)
        noisy_BV = filter_logits(logits_BV, asked) + noise_BV  # as jax.random.categorical
        return _best(jnp.where(drawn_B[:, None], noisy_BV, logits_BV))

    return jax.lax.cond(drawn_B.any(), draw, lambda: _best(logits_BV))


def _best(x_BV: jax.Array) -> jax.Array:
    """The place of each row's largest, the first of equals, int32: as jnp.argmax.

    That is what XLA takes five times longer for on a CPU. There it is asked where nothing equals
    the largest: a row has NaN, or XLA computed a number twice and rounded it in two ways.
    """

    def argmax():
        return jnp.argmax(x_BV, axis=-1).astype(jnp.int32)

    if platform() != "cpu":
        return argmax()
    vocabulary = x_BV.shape[1]
    best_B1 = x_BV.max(axis=-1, keepdims=True)
    place_BV = jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, 1)
    token_B = jnp.where(x_BV == best_B1, place_BV, vocabulary).min(axis=-1)
    return jax.lax.cond((token_B == vocabulary).any(), argmax, lambda: token_B)


def log_probabilities(logits_BV: jax.Array, token_B: jax.Array, top: int) -> LogProbabilities:
    """Log probabilities of the tokens chosen and of the N = `top` most likely ones.

    They are the model's own if the logits are, those before penalties and temperature, as OpenAI
    and vLLM give them.

    Args:
      logits_BV: float32.
      token_B: int32 ids within the vocabulary.
      top: static, may be 0.

    Raises:
      ValueError: unless top is in 0..V.
    """
    if not 0 <= top <= logits_BV.shape[1]:
        raise ValueError(f"top={top} is not in 0..{logits_BV.shape[1]}, the vocabulary")
    best_B1 = logits_BV.max(axis=-1, keepdims=True)
    log_sum_B1 = jnp.log(jnp.exp(logits_BV - best_B1).sum(axis=-1, keepdims=True))
    chosen_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
    top_BN, top_ids_BN = _top(logits_BV, top)
    return LogProbabilities(
        (chosen_B1 - best_B1 - log_sum_B1)[:, 0], top_ids_BN, top_BN - best_B1 - log_sum_B1
    )


def _top(x_BV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """(top_BN, ids_BN): the N = `count` largest of each row, as jax.lax.top_k, whose sort a GPU
    would leave its graph for."""
    if not in_graphs():
        return jax.lax.top_k(x_BV, count)
    code_BV = _ordered_code(x_BV)
    cut_B1 = _heaviest_cut(code_BV, jnp.ones_like(code_BV, jnp.int32), jnp.full(len(x_BV), count))
    above_BV, at_BV = code_BV > cut_B1, code_BV == cut_B1
    first_B1 = above_BV.sum(axis=-1, keepdims=True)
    place_BV = jnp.where(above_BV, jnp.cumsum(above_BV, -1), first_B1 + jnp.cumsum(at_BV, -1)) - 1
    place_BV = jnp.where(above_BV | at_BV, place_BV, count)
    row_B1, id_BV = (jax.lax.broadcasted_iota(jnp.int32, x_BV.shape, axis) for axis in (0, 1))
    ids_BN = jnp.zeros((len(x_BV), count), jnp.int32)
    ids_BN = ids_BN.at[row_B1, place_BV].set(id_BV, mode="drop")
    top_BN, code_BN = (jnp.take_along_axis(a, ids_BN, axis=-1) for a in (x_BV, code_BV))
    _, ids_BN, top_BN = jax.lax.sort((~code_BN, ids_BN, top_BN), num_keys=2)
    return top_BN, ids_BN
