"""Causal attention that stays within a segment.

Bodies of `self_attention`, which training and prompts want:
  xla     scores as an array; any platform, any shape, any positions.
  splash  JAX's splash attention for TPU: nothing of size L x L is ever held.
  cudnn   cuDNN's for NVIDIA GPUs: scores are never held, a mask of L x L is.
  chunks  a loop over heads and chunks of queries, for CPU: scores stay in cache, and those of 256
          queries at most exist at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from mixtral_jax.kernels import (
    MASKED,
    check_body,
    chunks,
    cudnn,
    device_kind,
    platform,
    splash,
)

PLATFORMS = {
    "xla": ("cpu", "gpu", "tpu"),
    "splash": ("tpu",),
    "cudnn": ("gpu",),
    "chunks": ("cpu", "gpu", "tpu"),
}


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


def resolve(implementation: str | None, length: int, head: int, dtype: jnp.dtype) -> str:
    """The body for sequences of this length, and heads of this width and type: asked for, or best.

    Raises:
      ValueError: if the one asked for cannot run on this platform, or on these arrays.
    """
    here = platform()
    if not implementation:
        if here == "tpu" and splash.fits(length, head):
            return "splash"
        if here == "cpu" and chunks.fits(length):
            return "chunks"
        good = here == "gpu" and cudnn.fits(length, head, dtype) and cudnn.installed()
        return "cudnn" if good else "xla"
    check_body("attention", implementation, here, PLATFORMS, instead="xla")
    if implementation == "splash" and not splash.fits(length, head):
        raise ValueError(
            f"attention=splash wants a sequence_length and a head_dim that are multiples of "
            f"{splash.LANES}, not {length} and {head}: use xla, or leave it empty"
        )
    if implementation == "cudnn" and not cudnn.fits(length, head, dtype):
        raise ValueError(
            f"attention=cudnn wants an even sequence_length, a head_dim of 8, 16, ... "
            f"{cudnn.WIDEST_HEAD}, a compute_dtype of bfloat16 and a GPU of compute capability "
            f"{cudnn.CAPABILITY} or more, not {length}, {head} and {jnp.dtype(dtype)} on "
            f"{device_kind()}: use xla, or leave it empty"
        )
    if implementation == "chunks" and not chunks.fits(length):
        raise ValueError(
            f"attention=chunks wants a sequence_length that is a multiple of {chunks.CHUNKS}, from "
            f"{chunks.SHORTEST} on, not {length}: use xla, or leave it empty"
        )
    return implementation


def self_attention(
    q_BLKGH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    positions_BL: jax.Array,
    segments_BL: jax.Array,
    *,
    implementation: str,
) -> jax.Array:
    """Attention of sequences to themselves: to keys at or before a query, in its segment.

    Args:
      q_BLKGH, k_BLKH, v_BLKH: as for `attention`.
      positions_BL: place of each token in its document.
      segments_BL: number of each token's document, whose tokens lie together, in order.
      implementation: a resolved name. All but xla want arrays of one device, inside shard_map.
    Returns:
      out_BLKGH in the type of q; of padding, anything.
    """
    if implementation == "splash":
        return splash.attention(q_BLKGH, k_BLKH, v_BLKH, segments_BL)
    if implementation == "cudnn":
        return cudnn.attention(q_BLKGH, k_BLKH, v_BLKH, segments_BL)
    if implementation == "chunks":
        return chunks.attention(q_BLKGH, k_BLKH, v_BLKH, segments_BL)
    allowed_BLS = causal_mask(positions_BL, segments_BL)
    return attention(q_BLKGH, k_BLKH, v_BLKH, allowed_BLS)


def causal_mask(positions_BL: jax.Array, segments_BL: jax.Array) -> jax.Array:
    """allowed_BLS of sequences to themselves: keys at or before the query, in its segment."""
    before_BLS = positions_BL[:, :, None] >= positions_BL[:, None, :]
    return before_BLS & (segments_BL[:, :, None] == segments_BL[:, None, :])
