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
from mixtral_jax.kernels import few_rows, platform
from mixtral_jax.model.cache import Step
from mixtral_jax.model.int8 import Int8, columns, out_of_heads
from mixtral_jax.model.layers import matrix, product, rotary_angles, rotate


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
        q_BLKGH, k_BLKH, v_BLKH = _into_heads(x_BLD, self.wq_DKGH, self.wk_DKH, self.wv_DKH)
        q_BLKGH, k_BLKH = rotate(q_BLKGH, angles), rotate(k_BLKH, angles)
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


def _into_heads(x_BLD: jax.Array, *ws: nnx.Param | Int8) -> tuple[jax.Array, ...]:
    """The queries, keys and values: x times matrices [D, K, H] or [D, K, G, H]."""
    if isinstance(ws[0], Int8):
        return tuple(columns(x_BLD, w, "heads") for w in ws)
    ws = [w[...].astype(x_BLD.dtype) for w in ws]
    ws = [sharding.shard(w, None, "heads", *[None] * (w.ndim - 2)) for w in ws]
    if _few(x_BLD, *ws):
        return _few_into_heads(x_BLD, ws)
    if platform() == "cpu":
        return tuple(product(x_BLD, w, 1, x_BLD.dtype) for w in ws)
    of_letters = {3: "BLD,DKH->BLKH", 4: "BLD,DKGH->BLKGH"}
    return tuple(jnp.einsum(of_letters[w.ndim], x_BLD, w) for w in ws)


def _out_of_heads(x_BLKGH: jax.Array, w: nnx.Param | Int8) -> jax.Array:
    if isinstance(w, Int8):
        return out_of_heads(x_BLKGH, w)
    wo_KGHD = sharding.shard(w[...].astype(x_BLKGH.dtype), "heads", None, None, None)
    if _few(x_BLKGH, wo_KGHD):
        return _few_out_of_heads(x_BLKGH, wo_KGHD)
    if platform() == "cpu":
        out = sharding.spec("batch", None, None)
        return product(x_BLKGH, wo_KGHD, 3, x_BLKGH.dtype, out)
    return jax.lax.dot_general(  # einsum sorts its letters: wo would be transposed first
        x_BLKGH,
        wo_KGHD,
        (((2, 3, 4), (0, 1, 2)), ((), ())),
        out_sharding=sharding.spec("batch", None, None),
    )


# ---- the products of a few tokens --------------------------------------------------------------


def _few(x: jax.Array, *ws: jax.Array) -> bool:
    """Whether there are kernels for so few tokens, and each device's part of matrices."""
    tokens, width = x.shape[0] * x.shape[1], math.prod(x.shape[2:])
    shards = sharding.tensor_shards()
    sizes = (width // shards, *(w.size // width // shards for w in ws))
    return few_rows.fits(tokens // sharding.batch_shards(), x.dtype, *sizes)


def _few_into_heads(x_BLD, ws):
    def body(x_BLD, ws):
        matrices_DF = [w.reshape(w.shape[0], -1) for w in ws]
        outs_TF = few_rows.products(x_BLD.reshape(-1, x_BLD.shape[-1]), matrices_DF)
        return tuple(o.reshape(*x_BLD.shape[:2], *w.shape[1:]) for o, w in zip(outs_TF, ws))

    heads = sharding.spec("batch", None, "heads")
    specs = sharding.spec("batch"), sharding.spec(None, "heads")
    return jax.shard_map(body, in_specs=specs, out_specs=heads, check_vma=False)(x_BLD, ws)


def _few_out_of_heads(x_BLKGH, wo_KGHD):
    def body(x_BLKGH, wo_KGHD):
        x_TF = x_BLKGH.reshape(x_BLKGH.shape[0] * x_BLKGH.shape[1], -1)
        (out_TD,) = few_rows.products(x_TF, (wo_KGHD.reshape(x_TF.shape[1], -1),))
        out_TD = jax.lax.psum(out_TD, sharding.in_use(sharding.TENSOR))
        return out_TD.reshape(*x_BLKGH.shape[:2], -1)

    specs = sharding.spec("batch", None, "heads"), sharding.spec("heads")
    batch = sharding.spec("batch")
    return jax.shard_map(body, in_specs=specs, out_specs=batch, check_vma=False)(x_BLKGH, wo_KGHD)
