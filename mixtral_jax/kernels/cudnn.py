"""Causal attention within segments by cuDNN's fused kernels for NVIDIA GPUs, through jax.nn.

Scores are never held, and blocks above the diagonal are skipped. Of segments cuDNN learns by a mask
[B, 1, L, L] in the type of q, shared by all heads and layers: 2 L^2 bytes a sequence, which every
head reads, and whose gradient the backward pass makes, for nobody. Its packed layout reads no mask,
but wants a bound on the documents in a row, keeps a float32 for each query, head and possible
document, and JAX has no public name for it.
"""

from __future__ import annotations

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import NARROW, compute_capability

WIDEST_HEAD = 128
CAPABILITY = 8.0
"""Of a GPU at least."""
FORWARD = "dot_product_attention_fwd"
"""How the name of the kernel's primitive begins."""


def fits(length: int, head: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels take sequences of this length, and heads of this width and type, here."""
    narrow = jnp.dtype(dtype) in NARROW and compute_capability() >= CAPABILITY
    return narrow and length % 2 == 0 and head % 8 == 0 and head <= WIDEST_HEAD


def installed() -> bool:
    """Whether JAX has what it needs for NVIDIA's GPUs."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def attention(
    q_BLKGH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segments_BL: jax.Array,
    *,
    implementation: str = "cudnn",
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys at or before each query, in its segment.

    Arrays of one device: call it inside shard_map, whose types are not checked.

    Args:
      implementation: jax.nn's: cudnn, or xla for the same call anywhere.
    Returns:
      out_BLKGH in the type of q.
    """
    batch, length, kv_heads, groups, head = q_BLKGH.shape
    q_BLNH = q_BLKGH.reshape(batch, length, kv_heads * groups, head)
    causal = partial(jax.nn.dot_product_attention, is_causal=True, implementation=implementation)

    def within(q_BLNH, k_BLKH, v_BLKH, segments_BL):
        same_BLS = segments_BL[:, :, None] == segments_BL[:, None, :]
        return causal(q_BLNH, k_BLKH, v_BLKH, mask=same_BLS[:, None])

    def whole(q_BLNH, k_BLKH, v_BLKH, segments_BL):
        return causal(q_BLNH, k_BLKH, v_BLKH)

    operands = (q_BLNH, k_BLKH, v_BLKH, segments_BL)
    return lax.cond(one_document(segments_BL), whole, within, *operands).reshape(q_BLKGH.shape)


def one_document(segments_BL: jax.Array) -> jax.Array:
    """Whether each row is of one document, and perhaps padding behind it."""
    before_BL, after_BL = segments_BL[:, :-1], segments_BL[:, 1:]
    return ((before_BL == after_BL) | (after_BL == 0)).all()


def kept(primitive, *_, **__) -> bool:
    """A checkpoint policy: what the backward pass wants of the kernel, its outputs."""
    return primitive.name.startswith(FORWARD)
