"""The router: which experts each token visits, with what weights, and what the losses need."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax.kernels import platform, vary_like


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
    if x_TD.dtype == jnp.bfloat16 and platform() == "gpu":
        logits_TE = product_of_bfloat16(x_TD, vary_like(w_DE.astype(jnp.float32), x_TD))
    else:
        logits_TE = product_of_float32(x_TD, w_DE)
    chosen_TC, ids_TC = jax.lax.top_k(logits_TE, per_token)
    ids_TC = jnp.where(real_T[:, None], ids_TC, logits_TE.shape[1])
    return routing_of(logits_TE, ids_TC, jax.nn.softmax(chosen_TC, axis=-1))


def product_of_float32(x_TD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """In float32, whatever comes in."""
    x_TD, w_DE = x_TD.astype(jnp.float32), w_DE.astype(jnp.float32)
    return jnp.einsum("TD,DE->TE", x_TD, w_DE, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def product_of_bfloat16(x_TD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """The same of bfloat16 and float32, on matrix units: they multiply bfloat16 and add in float32.

    A float32 is the sum of three bfloat16, side by side here in one product. XLA for GPU would
    multiply float32 outside of the matrix units (docs/performance.md); for TPU it does as here.
    """
    return _narrow("TD,PDE->PTE", x_TD, jnp.stack(_parts(w_DE))).sum(axis=0)


def _forward(x_TD, w_DE):
    return product_of_bfloat16(x_TD, w_DE), (x_TD, w_DE)


def _backward(residuals, g_TE):
    x_TD, w_DE = residuals
    # What the three other pairs of parts would add is below float32's precision.
    pairs = [(i, j) for i in range(3) for j in range(3 - i)]
    of_g, of_w = _parts(g_TE), _parts(w_DE)
    g_TPE = jnp.stack([of_g[i] for i, _ in pairs], axis=1)
    w_DPE = jnp.stack([of_w[j] for _, j in pairs], axis=1)
    dx_TD = _narrow("TPE,DPE->TD", g_TPE, w_DPE).astype(x_TD.dtype)
    return dx_TD, _narrow("TD,PTE->PDE", x_TD, jnp.stack(of_g)).sum(axis=0)


product_of_bfloat16.defvjp(_forward, _backward)
_narrow = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _parts(a: jax.Array) -> list[jax.Array]:
    """Three bfloat16 whose sum is a float32."""
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(a, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        a = a - part
    return parts


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
    chosen_TCE = routing.ids_TC[:, :, None] == jnp.arange(experts)[None, None, :]
    return RoutingStatistics(
        assignments_E=chosen_TCE.sum(axis=(0, 1)).astype(jnp.float32),
        probabilities_E=jnp.where(real_T[:, None], routing.probabilities_TE, 0).sum(axis=0),
        tokens=real_T.astype(jnp.float32).sum(),
        squared_logsumexp=jnp.sum(jnp.where(real_T, routing.logsumexp_T**2, 0)),
        dropped=dropped.astype(jnp.float32),
    )
