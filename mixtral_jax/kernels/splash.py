"""Causal attention within segments by JAX's splash attention kernel for TPU.

Scores never leave the chip's fast memory, blocks above the diagonal are skipped, and the backward
pass recomputes the scores from q, k and the logsumexp of each query.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from mixtral_jax import kernels

LANES = 128  # the kernel's blocks and heads are multiples of it
BLOCKS = (1024, 512, 256, 128)
KEPT = "attention_kernel"
"""Name, for checkpoint policies, of what the backward pass wants: the output and the logsumexp."""


def fits(length: int, head: int) -> bool:
    """Whether the kernel takes sequences of this length and heads of this width."""
    return length % LANES == 0 and head % LANES == 0


def attention(
    q_BLKGH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    segments_BL: jax.Array,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v over the keys at or before each query, in its segment.

    Arrays of one device: call it inside shard_map, whose types are not checked.

    Returns:
      out_BLKGH in the type of q.
    """
    length, kv_heads, groups, head = q_BLKGH.shape[1:]
    block = next(b for b in BLOCKS if length % b == 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    causal = splash_attention_mask.CausalMask((length, length))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([causal] * (kv_heads * groups)),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=KEPT,
        interpret=kernels.interpret(),
    )
    scaled = (q_BLKGH.astype(jnp.float32) * head**-0.5).astype(q_BLKGH.dtype)
    q_BNLH = scaled.reshape(*q_BLKGH.shape[:2], -1, head).swapaxes(1, 2)
    k_BKLH, v_BKLH = k_BLKH.swapaxes(1, 2), v_BLKH.swapaxes(1, 2)
    segments = splash_attention_kernel.SegmentIds(segments_BL, segments_BL)
    out_BNLH = jax.vmap(kernel)(q_BNLH, k_BKLH, v_BKLH, segments)
    return out_BNLH.swapaxes(1, 2).reshape(q_BLKGH.shape)
