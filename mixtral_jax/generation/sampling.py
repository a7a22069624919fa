"""Logits to tokens: greedy, temperature, top-k and top-p, each row by its own parameters and key.

A row's choice depends on nothing but its own logits, parameters and key. The filters follow Hugging
Face transformers' warpers, in their order: temperature, then top-k, then top-p.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

LEAST_TEMPERATURE = 1e-6  # below it, differences between float32 logits leave float32


class Parameters(NamedTuple):
    """How each row of a batch is sampled."""

    temperature_B: jax.Array
    """float32, what logits are divided by; 0 is greedy: the most likely token, the first of equals.
    Above 0, 1e-6 is the least."""
    top_k_B: jax.Array
    """int32, how many of the most likely tokens to choose from; 0 is all."""
    top_p_B: jax.Array
    """float32 in 0..1: choose from the fewest tokens whose probabilities reach this; 1 is all."""


def row_keys(seed_B: jax.Array, step_B: jax.Array) -> jax.Array:
    """key_B: the key of each row's own stream (uint32 seeds) at the row's own step."""
    return jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(
        seed_B, step_B
    )


def filter_logits(logits_BV: jax.Array, parameters: Parameters) -> jax.Array:
    """Logits of the distribution to draw from: over the temperature; -inf for excluded tokens.

    Top-k keeps every token as likely as the k-th. Top-p keeps, of equally likely tokens at its
    edge, as many as it needs, higher ids first. Neither leaves a row without a token.

    Args:
      logits_BV: float32, unnormalised.
      parameters: greedy rows come out as for the least temperature.
    """
    temperature_B, top_k_B, top_p_B = parameters
    vocabulary = logits_BV.shape[1]
    below_best_BV = logits_BV - logits_BV.max(axis=-1, keepdims=True)
    scaled_BV = below_best_BV / jnp.maximum(temperature_B, LEAST_TEMPERATURE)[:, None]
    code_BV = _ordered_code(scaled_BV)

    count_B = jnp.where(top_k_B == 0, vocabulary, jnp.minimum(top_k_B, vocabulary))
    kth_B1 = _heaviest_cut(code_BV, jnp.ones_like(code_BV, jnp.int32), count_B)
    scaled_BV = jnp.where(code_BV >= kth_B1, scaled_BV, -jnp.inf)

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

    Found bit by bit, which costs 32 sums; sorting a row costs ten times more on a CPU.
    """

    def step(i, cut_B1):
        tried_B1 = cut_B1 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        weight_B = jnp.where(code_BV >= tried_B1, weight_BV, 0).sum(axis=-1)
        return jnp.where((weight_B >= target_B)[:, None], tried_B1, cut_B1)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros_like(code_BV[:, :1]))


def sample(key_B: jax.Array, logits_BV: jax.Array, parameters: Parameters) -> jax.Array:
    """The next token of each row, int32.

    Args:
      key_B: one key a row, from `row_keys`.
      logits_BV: float32.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw():
        filtered_BV = filter_logits(logits_BV, parameters)
        drawn_B = jax.vmap(jax.random.categorical)(key_B, filtered_BV).astype(jnp.int32)
        return jnp.where(parameters.temperature_B > 0, drawn_B, greedy_B)

    return jax.lax.cond((parameters.temperature_B > 0).any(), draw, lambda: greedy_B)
