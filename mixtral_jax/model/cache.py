"""The key-value cache of sampling: a pytree of arrays, sharded like the activations."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import cached_attention as kernel
from mixtral_jax.kernels.cached_attention import Cached

ROUND = 16
"""A cache has a multiple of this many places: what a part of a prompt may fill, at the least."""


class CacheUse(NamedTuple):
    """A cache, and what one forward pass does with it."""

    cache: Cached | tuple[Cached, ...] | None
    """Of one layer, or of all: with a layer dimension in front, or each its own. None in a pass
    without a cache."""
    layer: jax.Array | None
    """Which layer; None where the cache is of one."""
    row_B: jax.Array | None
    """The row of the cache that each row of the batch is about, counted on its device; no
    two the same, but for rows of which nothing is real. None: the batch is all rows."""
    positions_BL: jax.Array
    real_BL: jax.Array

    def attend(self, q_BLKGH, k_BLKH, v_BLKH) -> tuple[jax.Array, CacheUse]:
        """Write the keys and values, and attend to all that the cache holds up to each position.

        Nothing is written, or read by others, of what is not real.
        """
        return _attend(q_BLKGH, k_BLKH, v_BLKH, self)


def _attend(q_BLKGH, k_BLKH, v_BLKH, use: CacheUse):
    rows, heads = sharding.spec("batch"), sharding.spec("batch", None, "heads")
    cached = jax.tree.map(lambda a: spec_of(use.layer is not None), use.cache)
    nothing = sharding.spec()
    inputs = (use.cache, use.layer, use.row_B, use.positions_BL, use.real_BL)
    specs = CacheUse(
        cached,
        None if use.layer is None else nothing,
        None if use.row_B is None else rows,
        rows,
        rows,
    )

    def some_rows(q_BLKGH, k_BLKH, v_BLKH, cache, layer, row, positions_BL, real_BL):
        where = kernel.Where(layer, row)
        cache = kernel.write(cache, k_BLKH, v_BLKH, positions_BL, real_BL, where)
        asked_BL = jnp.where(real_BL, positions_BL, 0)  # what is not real sees no more than it must
        return kernel.attention(q_BLKGH, cache, asked_BL, where), cache

    def body(q_BLKGH, k_BLKH, v_BLKH, cache, layer, row_B, positions_BL, real_BL):
        if row_B is None:
            return some_rows(q_BLKGH, k_BLKH, v_BLKH, cache, layer, None, positions_BL, real_BL)

        def one_row(cache, of_row):
            row, *rest = of_row
            q, k, v, positions, real = (array[None] for array in rest)
            out, cache = some_rows(q, k, v, cache, layer, row, positions, real)
            return cache, out[0]

        each = (row_B, q_BLKGH, k_BLKH, v_BLKH, positions_BL, real_BL)
        unroll = row_B.size == 1 or not kernel.in_blocks()
        cache, out_BLKGH = jax.lax.scan(one_row, cache, each, unroll=unroll)
        return out_BLKGH, cache

    run = jax.shard_map(
        body,
        in_specs=(heads, heads, heads, *specs),
        out_specs=(heads, cached),
        check_vma=False,
    )
    out_BLKGH, cache = run(q_BLKGH, k_BLKH, v_BLKH, *inputs)
    return out_BLKGH, use._replace(cache=cache)


def spec_of(stacked: bool) -> jax.sharding.PartitionSpec:
    """How each array of a cache is split: its rows as the batch, its heads as the model's."""
    return sharding.spec(*(["layers"] if stacked else []), "batch", "heads")


def places(context: int) -> int:
    """Places of a row that holds that many tokens, whatever parts its prompt comes in."""
    block = kernel.BLOCK
    least = -(-(context + ROUND) // ROUND) * ROUND
    return least if least <= block else -(-least // block) * block


def make_cache(
    config: ModelConfig, batch: int, places: int, dtype: jnp.dtype, stacked: bool
) -> Cached | tuple[Cached, ...]:
    """An empty cache of all layers, for `batch` sequences of up to `places` tokens.

    Bytes: 2 * layers * batch * places * kv heads * (head width * the size of dtype), and in int8
    4 more for each head's scale.

    Args:
      stacked: all layers in one array, or each in one of its own.
    """
    if not stacked:
        one = partial(_arrays, (batch,), config, places, dtype, False)
        return tuple(one() for _ in range(config.num_hidden_layers))
    return _arrays((config.num_hidden_layers, batch), config, places, dtype, True)


def _arrays(front: tuple[int, ...], config: ModelConfig, places: int, dtype, stacked) -> Cached:
    shape = (*front, config.num_key_value_heads, places)

    def zeros(*shape, dtype):
        return jnp.zeros(shape, dtype, out_sharding=spec_of(stacked))

    k, v = (zeros(*shape, config.head_size, dtype=dtype) for _ in range(2))
    if jnp.dtype(dtype) != jnp.int8:
        return Cached(k, v)
    return Cached(k, v, *(zeros(*shape, dtype=jnp.float32) for _ in range(2)))


def bytes_of_row(config: ModelConfig, places: int, dtype: jnp.dtype) -> int:
    """Of one sequence, on all devices together."""
    item = jnp.dtype(dtype).itemsize
    width = config.head_size * item + (4 if jnp.dtype(dtype) == jnp.int8 else 0)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * places * width
