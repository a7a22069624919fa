"""The router: which experts each token visits, with what weights, and what the losses need."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Routing(NamedTuple):
    """One layer's choices for the tokens on this device."""

    ids_TC: jax.Array
    """Chosen experts, best first; E, which is no expert, for tokens that are padding."""
    weights_TC: jax.Array
    """float32 weights of the chosen experts; they sum to 1."""
    probabilities_TE: jax.Array
    """float32 softmax over all experts."""
    logsumexp_T: jax.Array


class RoutingStatistics(NamedTuple):
    """Sums over all real tokens of the global batch, in float32; layers are stacked in front."""

    assignments_E: jax.Array
    """Tokens that chose each expert, before any is dropped; sums to tokens * k."""
    probabilities_E: jax.Array
    """Sum over the tokens of the router probability of each expert."""
    tokens: jax.Array
    """Real tokens."""
    squared_logsumexp: jax.Array
    """Sum over the tokens of logsumexp(logits)^2."""
    dropped: jax.Array
    """Assignments dropped for want of capacity; 0 when dropless."""


def route(x_TD: jax.Array, w_DE: jax.Array, real_T: jax.Array, per_token: int) -> Routing:
    """Top-k of the logits, then softmax over the chosen ones: paper section 2.1, in float32.

    Args:
      x_TD: tokens; real_T: false for padding, which visits no expert.
      w_DE: the router matrix.
      per_token: experts a token visits (C).
    """
    logits_TE = jnp.einsum(
        "TD,DE->TE",
        x_TD.astype(jnp.float32),
        w_DE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    chosen_TC, ids_TC = jax.lax.top_k(logits_TE, per_token)
    ids_TC = jnp.where(real_T[:, None], ids_TC, logits_TE.shape[1])
    return routing_of(logits_TE, ids_TC, jax.nn.softmax(chosen_TC, axis=-1))


def routing_of(logits_TE: jax.Array, ids_TC: jax.Array, weights_TC: jax.Array) -> Routing:
    """The Routing of logits from which the experts are chosen already."""
    return Routing(
        ids_TC=ids_TC,
        weights_TC=weights_TC,
        probabilities_TE=jax.nn.softmax(logits_TE, axis=-1),
        logsumexp_T=jax.nn.logsumexp(logits_TE, axis=-1),
    )


def local_statistics(routing: Routing, real_T: jax.Array, dropped: jax.Array) -> RoutingStatistics:
    """The sums over this device's tokens; add them over the devices for the global batch's."""
    experts = routing.probabilities_TE.shape[1]
    weight_T = real_T.astype(jnp.float32)
    chosen_TCE = routing.ids_TC[:, :, None] == jnp.arange(experts)[None, None, :]
    return RoutingStatistics(
        assignments_E=chosen_TCE.sum(axis=(0, 1)).astype(jnp.float32),
        probabilities_E=jnp.einsum("T,TE->E", weight_T, routing.probabilities_TE),
        tokens=weight_T.sum(),
        squared_logsumexp=jnp.sum(weight_T * routing.logsumexp_T**2),
        dropped=dropped.astype(jnp.float32),
    )
