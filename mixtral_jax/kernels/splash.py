"""Causal attention within segments by JAX's splash attention kernel for TPU.

Scores never leave the chip's fast memory, blocks above the diagonal are skipped, and the backward
pass recomputes the scores from q, k and the logsumexp of each query: once in one kernel, which
writes a gradient of all queries for each block of keys, or, of many blocks, in a kernel for the
queries' gradient and again in one for the others'.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from mixtral_jax import kernels

LANES = 128  # the kernel's blocks and heads are multiples of it
BLOCKS = (1024, 512, 256, 128)
FUSED = 8
"""Blocks up to which the backward pass is one kernel. With more, what that writes would take memory
with the square of the length."""
KEPT = "attention_kernel"
"""Name, for checkpoint policies, of what the backward pass wants: the output and the logsumexp."""


def fits(length: int, head: int) -> bool:
    """Whether the kernel takes sequences of this length and heads of this width."""
    return length % LANES == 0 and head % LANES == 0


class Blocks(NamedTuple):
    """Into what the kernels cut a sequence."""

    size: int
    count: int

    @property
    def fused(self) -> bool:
        """Whether the backward pass is one kernel."""
        return self.count <= FUSED


def blocks(length: int) -> Blocks:
    """The largest blocks that divide a length; if they are many, larger ones, the last padded."""
    size = next(b for b in BLOCKS if length % b == 0)
    if length > FUSED * size:
        size = next((b for b in reversed(BLOCKS) if length <= FUSED * b), BLOCKS[0])
    return Blocks(size, -(-length // size))


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
    size, count = cut = blocks(length)
    own = {} if cut.fused else {"block_q_dq": size, "block_kv_dq": size}
    sizes = splash_attention_kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        use_fused_bwd_kernel=cut.fused,
        **own,
    )
    causal = splash_attention_mask.CausalMask((count * size, count * size))
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
    if more := count * size - length:  # after the end, where no query of the sequence looks
        pad = ((0, 0), (0, 0), (0, more), (0, 0))
        q_BNLH, k_BKLH, v_BKLH = (jnp.pad(a, pad) for a in (q_BNLH, k_BKLH, v_BKLH))
        segments_BL = jnp.pad(segments_BL, ((0, 0), (0, more)))
    segments = splash_attention_kernel.SegmentIds(segments_BL, segments_BL)
    out_BNLH = jax.vmap(kernel)(q_BNLH, k_BKLH, v_BKLH, segments)[:, :, :length]
    return out_BNLH.swapaxes(1, 2).reshape(q_BLKGH.shape)
