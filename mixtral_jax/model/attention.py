"""Grouped-query attention, with and without a key-value cache."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import attention as kernels
from mixtral_jax.model.cache import Step
from mixtral_jax.model.int8 import Int8, columns, out_of_heads
from mixtral_jax.model.layers import matrix, rotary_angles, rotate


class Attention(nnx.Module):
    """Kv head k serves query heads kG .. kG + G - 1, kept together: wq_DKGH."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        width, head = config.hidden_size, config.head_size
        kv_heads = config.num_key_value_heads
        groups = config.num_attention_heads // kv_heads
        keys = jax.random.split(key, 4)
        make = partial(matrix, scale=config.initializer_range, dtype=config.param_dtype)
        self.wq_DKGH = make(
            keys[0], (width, kv_heads, groups, head), ("model", "heads", None, None)
        )
        self.wk_DKH = make(keys[1], (width, kv_heads, head), ("model", "heads", None))
        self.wv_DKH = make(keys[2], (width, kv_heads, head), ("model", "heads", None))
        self.wo_KGHD = make(
            keys[3], (kv_heads, groups, head, width), ("heads", None, None, "model")
        )
        self.config = config

    def __call__(
        self,
        x_BLD: jax.Array,
        positions_BL: jax.Array,
        segments_BL: jax.Array,
        step: Step | None = None,
    ) -> tuple[jax.Array, Step | None]:
        """Attend within each segment, or, given a step with a cache, to all that it holds up to
        each position, keys and values of this batch included.

        With a cache, each row's positions are consecutive.
        """
        config = self.config
        angles = rotary_angles(positions_BL, config.head_size, config.rope_theta)
        q_BLKGH = rotate(_into_heads(x_BLD, self.wq_DKGH), angles)
        k_BLKH = rotate(_into_heads(x_BLD, self.wk_DKH), angles)
        v_BLKH = _into_heads(x_BLD, self.wv_DKH)
        q_BLKGH, k_BLKH, v_BLKH = (
            checkpoint_name(a, "attention_qkv") for a in (q_BLKGH, k_BLKH, v_BLKH)
        )
        if step is None:
            out_BLKGH = self._within(q_BLKGH, k_BLKH, v_BLKH, positions_BL, segments_BL)
        else:
            out_BLKGH, step = step.attend(q_BLKGH, k_BLKH, v_BLKH)
        out_BLD = _out_of_heads(out_BLKGH, self.wo_KGHD)
        return checkpoint_name(out_BLD, "attention_out"), step

    def _within(self, q_BLKGH, k_BLKH, v_BLKH, positions_BL, segments_BL):
        """Attention of the sequences to themselves; kernels see what lies on one device."""
        length, head = q_BLKGH.shape[1], q_BLKGH.shape[-1]
        name = kernels.resolve(self.config.attention, length, head, q_BLKGH.dtype)
        body = partial(kernels.self_attention, implementation=name)
        if name != "xla":
            batch, heads = sharding.spec("batch"), sharding.spec("batch", None, "heads")
            specs = (heads, heads, heads, batch, batch)
            checked = name == "chunks"  # the others are not made for it
            body = jax.shard_map(body, in_specs=specs, out_specs=heads, check_vma=checked)
        return body(q_BLKGH, k_BLKH, v_BLKH, positions_BL, segments_BL)


def _into_heads(x_BLD: jax.Array, w: nnx.Param | Int8) -> jax.Array:
    """The queries, keys or values: x times a matrix [D, K, H] or [D, K, G, H]."""
    if isinstance(w, Int8):
        return columns(x_BLD, w, "heads")
    w = w[...].astype(x_BLD.dtype)
    w = sharding.shard(w, None, "heads", *[None] * (w.ndim - 2))
    return jnp.einsum("BLD,DKGH->BLKGH" if w.ndim == 4 else "BLD,DKH->BLKH", x_BLD, w)


def _out_of_heads(x_BLKGH: jax.Array, w: nnx.Param | Int8) -> jax.Array:
    if isinstance(w, Int8):
        return out_of_heads(x_BLKGH, w)
    wo_KGHD = sharding.shard(w[...].astype(x_BLKGH.dtype), "heads", None, None, None)
    return jax.lax.dot_general(  # einsum sorts its letters: wo would be transposed first
        x_BLKGH,
        wo_KGHD,
        (((2, 3, 4), (0, 1, 2)), ((), ())),
        out_sharding=sharding.spec("batch", None, None),
    )
