"""Attention to a cache of keys and values, block by block, and writing to it.

Arrays of one device, inside shard_map. Scores exist for one block of the cache at a time, of which
only those up to the last position in use are read: a long prompt, taken in parts, never makes an
array of its length squared, and a cache with room for a long answer costs a short one nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import MASKED, few_queries, int8, platform

BLOCK = 512
"""Places of a cache that are read at a time; one that is no longer is read whole."""
FEW = 8
"""Queries of a kv head up to which XLA:CPU is faster with one at a time: it copies keys into an
order of its own for the product of a few rows, not for a vector."""


_in_blocks = True


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """Programs traced in here read whole caches, however long, and run one row's part after
    another without a loop: to be priced, as loops cannot be."""
    global _in_blocks
    before, _in_blocks = _in_blocks, False
    try:
        yield
    finally:
        _in_blocks = before


def in_blocks() -> bool:
    """False in `whole`."""
    return _in_blocks


class Cached(NamedTuple):
    """Keys and values by place; of one layer, or of all with a layer dimension in front.

    In int8 each key and each value of a head has a scale; otherwise there are none.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scale_BKS: jax.Array | None = None
    v_scale_BKS: jax.Array | None = None


class Where(NamedTuple):
    """Which part of a cache some rows are about."""

    layer: jax.Array | None
    """Index of the layer; None if the cache is of one."""
    row: jax.Array | None
    """The one row [1, L, ...] is that of the cache; None: the rows are all of the cache's."""


def write(cache: Cached, k_BLKH, v_BLKH, positions_BL, real_BL, where: Where) -> Cached:
    """The cache with keys and values in the places of their positions, where they are real.

    Args:
      positions_BL: of one row consecutive, and all of them below S.
      real_BL: false for what is not to be written.
    """
    values = []
    for new_BLKH, scaled in ((k_BLKH, cache.k_scale_BKS), (v_BLKH, cache.v_scale_BKS)):
        values.append(int8.quantize(new_BLKH, (3,)) if scaled is not None else (new_BLKH, None))
    (k, k_scale), (v, v_scale) = values
    new = Cached(k, v, k_scale, v_scale)
    put = _put_run if where.row is not None else _put_each
    return jax.tree.map(
        lambda old, new_BL: put(old, new_BL.astype(old.dtype), positions_BL, real_BL, where),
        cache,
        new,
    )


def _put_run(old, new_1LK, positions_1L, real_1L, where: Where):
    """Into one row, a run of consecutive places."""
    layer = () if where.layer is None else (where.layer,)
    start = (*layer, where.row, 0, positions_1L[0, 0], *[0] * (new_1LK.ndim - 3))
    new_1KL = new_1LK.swapaxes(1, 2)
    new_1KL = new_1KL.reshape((1,) * len(layer) + new_1KL.shape)
    before = lax.dynamic_slice(old, start, new_1KL.shape)
    real = real_1L.reshape((1,) * (len(layer) + 2) + (-1,) + (1,) * (new_1LK.ndim - 3))
    return lax.dynamic_update_slice(old, jnp.where(real, new_1KL, before), start)


def _put_each(old, new_BLK, positions_BL, real_BL, where: Where):
    """Into each row, at places of its own."""
    slots = old.shape[2 if where.layer is None else 3]
    places_BL = jnp.where(real_BL, positions_BL, slots)  # beyond the array: dropped
    rows_B1 = jnp.arange(new_BLK.shape[0])[:, None]
    layer = () if where.layer is None else (where.layer,)
    return old.at[(*layer, rows_B1, slice(None), places_BL)].set(new_BLK, mode="drop")


def attention(q_BLKGH: jax.Array, cache: Cached, positions_BL: jax.Array, where: Where):
    """softmax(q k^T / sqrt(H)) v over the places up to each query's position.

    Scores and sums are float32. The softmax of all blocks is made as they come: Milakov and
    Gimelshein, arXiv 1805.02867.

    Args:
      q_BLKGH: queries, grouped by the kv head that serves them; the places of their positions
        hold their own keys and values already.
    Returns:
      out_BLKGH in the type of q.
    """
    batch, length, heads, groups, width = q_BLKGH.shape
    q_BKQH = q_BLKGH.transpose(0, 2, 3, 1, 4).reshape(batch, heads, groups * length, width)
    q_BKQH = (q_BKQH * width**-0.5).astype(q_BLKGH.dtype)
    if where.layer is None and where.row is None and few_queries.fits(q_BLKGH, cache.k_BKSH):
        out_BKGH = few_queries.attention(q_BKQH, cache.k_BKSH, cache.v_BKSH, positions_BL[:, 0])
        return out_BKGH[:, None]
    positions_BQ = jnp.tile(positions_BL, (1, groups))
    slots = cache.k_BKSH.shape[-2]
    block = min(BLOCK, slots) if _in_blocks else slots

    def one_block(i, carry):
        most_BKQ, total_BKQ, sum_BKQH = carry
        first = jnp.minimum(i * block, slots - block)
        k, v, k_scale, v_scale = (_take(a, first, block, where) for a in cache)
        scores = _products(q_BKQH, k.astype(q_BKQH.dtype))
        if k_scale is not None:
            scores = scores * k_scale[:, :, None]
        places_11S = (first + jnp.arange(block))[None, None]
        seen_BQS = (places_11S <= positions_BQ[..., None]) & (places_11S >= i * block)
        scores = jnp.where(seen_BQS[:, None], scores, MASKED)
        new_BKQ = jnp.maximum(most_BKQ, scores.max(axis=-1))
        weights = jnp.where(seen_BQS[:, None], jnp.exp(scores - new_BKQ[..., None]), 0)
        before_BKQ = jnp.exp(most_BKQ - new_BKQ)
        total_BKQ = total_BKQ * before_BKQ + weights.sum(axis=-1)
        # What none sees may be of an earlier request, and infinite: 0 times that is no number.
        seen_B1S = seen_BQS.any(axis=1)[:, None]
        if v_scale is not None:
            weights = weights * jnp.where(seen_B1S, v_scale, 0)[:, :, None]
        else:
            v = jnp.where(seen_B1S[..., None], v, 0)
        part = jnp.einsum(
            "BKQS,BKSH->BKQH",
            weights.astype(q_BKQH.dtype),
            v.astype(q_BKQH.dtype),
            preferred_element_type=jnp.float32,
        )
        return new_BKQ, total_BKQ, sum_BKQH * before_BKQ[..., None] + part

    shape = q_BKQH.shape[:3]
    init = (jnp.full(shape, MASKED), jnp.zeros(shape), jnp.zeros(q_BKQH.shape, jnp.float32))
    if slots == block:
        _, total_BKQ, sum_BKQH = one_block(0, init)
    else:
        blocks = positions_BL.max() // block + 1
        _, total_BKQ, sum_BKQH = lax.fori_loop(0, blocks, one_block, init)
    out = (sum_BKQH / total_BKQ[..., None]).astype(q_BLKGH.dtype)
    return out.reshape(batch, heads, groups, length, width).transpose(0, 3, 1, 2, 4)


def _products(q_BKQH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """float32 scores_BKQS."""
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    if platform() == "cpu" and q_BKQH.shape[2] <= FEW:
        of_each = [product("BKSH,BKH->BKS", k_BKSH, q_BKH) for q_BKH in jnp.moveaxis(q_BKQH, 2, 0)]
        return jnp.stack(of_each, axis=2)
    return product("BKQH,BKSH->BKQS", q_BKQH, k_BKSH)


def _take(array: jax.Array | None, first, block: int, where: Where) -> jax.Array | None:
    """A block of places, of all rows or of one."""
    if array is None:
        return None
    layer = 0 if where.layer is None else 1
    shape = list(array.shape)
    start: list = [0] * array.ndim
    start[layer + 2], shape[layer + 2] = first, block
    if layer:
        start[0], shape[0] = where.layer, 1
    if where.row is not None:
        start[layer], shape[layer] = where.row, 1
    part = array if shape == list(array.shape) else lax.dynamic_slice(array, start, shape)
    return part[0] if layer else part
