"""Grouped-query attention, with and without a key-value cache."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import attention as kernels
from mixtral_jax.kernels import bits, few_rows, platform
from mixtral_jax.model.cache import CacheUse
from mixtral_jax.model.int8 import Int8Param
from mixtral_jax.model.int8 import columns as int8_columns
from mixtral_jax.model.int8 import out_of_heads as int8_out_of_heads
from mixtral_jax.model.layers import columns, matrix, product, rotary_angles, rotate


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
        use: CacheUse | None = None,
    ) -> tuple[jax.Array, CacheUse | None]:
        """Attend within each segment, or, given a cache, to all that it holds up to
        each position, keys and values of this batch included.

        With a cache, each row's positions are consecutive.
        """
        config = self.config
        angles = rotary_angles(positions_BL, config.head_size, config.rope_theta)
        q_BLKGH, k_BLKH, v_BLKH = _into_heads(x_BLD, self.wq_DKGH, self.wk_DKH, self.wv_DKH)
        q_BLKGH, k_BLKH = rotate(q_BLKGH, angles), rotate(k_BLKH, angles)
        q_BLKGH, k_BLKH, v_BLKH = (
            checkpoint_name(a, "attention_qkv") for a in (q_BLKGH, k_BLKH, v_BLKH)
        )
        if use is None:
            out_BLKGH = self._within(q_BLKGH, k_BLKH, v_BLKH, positions_BL, segments_BL)
        else:
            out_BLKGH, use = use.attend(q_BLKGH, k_BLKH, v_BLKH)
        out_BLD = _out_of_heads(out_BLKGH, self.wo_KGHD)
        return checkpoint_name(out_BLD, "attention_out"), use

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


def _into_heads(x_BLD: jax.Array, *ws: nnx.Param | Int8Param) -> tuple[jax.Array, ...]:
    """The queries, keys and values: x times matrices [D, K, H] or [D, K, G, H]."""
    if isinstance(ws[0], Int8Param):
        return tuple(int8_columns(x_BLD, w, "heads") for w in ws)
    ws = [bits.converted(w[...], x_BLD.dtype) for w in ws]
    if _few(x_BLD, *ws):
        return columns(x_BLD, ws, "heads", few_rows.products)
    return tuple(_into_one_kind(x_BLD, w) for w in ws)


def _into_one_kind(x_BLD, w):
    if w.dtype == bits.BITS:
        return columns(x_BLD, [w], "heads")[0]
    w = sharding.shard(w, None, "heads", *[None] * (w.ndim - 2))
    if platform() == "cpu":
        return product(x_BLD, w, 1, x_BLD.dtype)
    return jnp.einsum({3: "BLD,DKH->BLKH", 4: "BLD,DKGH->BLKGH"}[w.ndim], x_BLD, w)


def _out_of_heads(x_BLKGH: jax.Array, w: nnx.Param | Int8Param) -> jax.Array:
    if isinstance(w, Int8Param):
        return int8_out_of_heads(x_BLKGH, w)
    wo_KGHD = sharding.shard(bits.converted(w[...], x_BLKGH.dtype), "heads", None, None, None)
    if wo_KGHD.dtype == bits.BITS:
        return _local_out_of_heads(x_BLKGH, wo_KGHD, bits.products)
    if _few(x_BLKGH, wo_KGHD):
        return _local_out_of_heads(x_BLKGH, wo_KGHD, few_rows.products)
    out = sharding.spec("batch", None, None)
    if platform() == "cpu":
        return product(x_BLKGH, wo_KGHD, 3, x_BLKGH.dtype, out)
    return jax.lax.dot_general(  # einsum sorts its letters: wo would be transposed first
        x_BLKGH, wo_KGHD, (((2, 3, 4), (0, 1, 2)), ((), ())), out_sharding=out
    )


def _few(x: jax.Array, *ws: jax.Array) -> bool:
    """Whether there are kernels for so few tokens, and each device's part of matrices."""
    tokens, width = x.shape[0] * x.shape[1], math.prod(x.shape[2:])
    shards = sharding.tensor_shards()
    sizes = (width // shards, *(w.size // width // shards for w in ws))
    return few_rows.fits(tokens // sharding.batch_shards(), x.dtype, *sizes)


def _local_out_of_heads(x_BLKGH, wo_KGHD, products):
    def body(x_BLKGH, wo_KGHD):
        x_TF = x_BLKGH.reshape(x_BLKGH.shape[0] * x_BLKGH.shape[1], -1)
        (out_TD,) = products(x_TF, [wo_KGHD.reshape(x_TF.shape[1], -1)])
        out_TD = jax.lax.psum(out_TD, sharding.in_use(sharding.TENSOR))
        return out_TD.reshape(*x_BLKGH.shape[:2], -1)

    specs = sharding.spec("batch", None, "heads"), sharding.spec("heads")
    batch = sharding.spec("batch")
    return jax.shard_map(body, in_specs=specs, out_specs=batch, check_vma=False)(x_BLKGH, wo_KGHD)
