"""Causal attention that stays within a segment."""

from __future__ import annotations

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite, so that a query that may see nothing still has a finite gradient


def attention(
    q_BLKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    allowed_BLS: jax.Array,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the allowed keys; kv head k serves the queries [k, :].

    Scores and softmax are float32.

    Args:
      q_BLKGH: queries, grouped by the kv head that serves them.
      k_BSKH, v_BSKH: keys and values.
      allowed_BLS: true where query l may see key s.
    Returns:
      out_BLKGH in the type of q. A query that may see nothing gets some mixture of all values.
    """
    scale = q_BLKGH.shape[-1] ** -0.5
    scores = jnp.einsum("BLKGH,BSKH->BKGLS", q_BLKGH, k_BSKH, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed_BLS[:, None, None], scores * scale, MASKED)
    weights_BKGLS = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGLS,BSKH->BLKGH", weights_BKGLS, v_BSKH)


def causal_mask(
    query_positions_BL: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BL: jax.Array | None = None,
    key_segments_BS: jax.Array | None = None,
) -> jax.Array:
    """allowed_BLS: keys at or before the query's position, in its segment if segments are given."""
    allowed_BLS = query_positions_BL[:, :, None] >= key_positions_BS[:, None, :]
    if query_segments_BL is None:
        return allowed_BLS
    return allowed_BLS & (query_segments_BL[:, :, None] == key_segments_BS[:, None, :])
