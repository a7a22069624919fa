"""One query of each sequence against its cache of keys and values, as in decoding, for GPU.

A kernel of the kind of few_rows. Programs share a long cache, and read of it what lies before the
query alone; each makes the softmax of its part as cached_attention does, and XLA puts the parts
together.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mixtral_jax.kernels import few_rows
from mixtral_jax.kernels.few_rows import Tiles, call, dot, padded, parts_of, whole

TILES = Tiles(64, 0, programs=256, stages=3)
"""Places of a cache in a block; and programs, for all heads of all sequences, if that needs no part
shorter than a block."""
MOST_PARTS = 32
MASKED = -1e30  # finite: a part in which a query may see nothing


def fits(q_BLKGH: jax.Array, k_BKSH: jax.Array) -> bool:
    """Whether the kernel runs here, on such queries and such keys."""
    _, length, _, groups, head = q_BLKGH.shape
    square = head >= few_rows.LEAST and head == pl.next_power_of_2(head)
    narrow = few_rows.fits(groups, q_BLKGH.dtype) and q_BLKGH.dtype == k_BKSH.dtype
    return narrow and square and length == 1 and k_BKSH.ndim == 4


def attention(
    q_BKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_B: jax.Array
) -> jax.Array:
    """softmax(q k^T) v over the places up to each query's position; q is scaled already.

    Returns:
      out_BKGH in the type of q.
    """
    out_PBKGH, most_PBKG, total_PBKG = _parts(q_BKGH, k_BKSH, v_BKSH, positions_B, TILES)
    factor_PBKG = jnp.exp(most_PBKG - most_PBKG.max(axis=0, keepdims=True))
    total_BKG = (total_PBKG * factor_PBKG).sum(axis=0)
    out_BKGH = (out_PBKGH * factor_PBKG[..., None]).sum(axis=0) / total_BKG[..., None]
    return out_BKGH.astype(q_BKGH.dtype)


def _parts(q_BKGH, k_BKSH, v_BKSH, positions_B, tiles: Tiles):
    """Of each part of a cache: weighted sums out_PBKGH of the values, with weights
    exp(score - most_PBKG), and total_PBKG of the weights; all float32."""
    (batch, heads, groups, head), slots = q_BKGH.shape, k_BKSH.shape[2]
    rows, size = padded(groups), tiles.depth
    wanted = min(tiles.programs // (batch * heads), MOST_PARTS)
    parts, per_part = parts_of(-(-slots // size), wanted)

    def kernel(positions_ref, q_ref, k_ref, v_ref, out_ref, most_ref, total_ref):
        in_use_G = jnp.arange(rows) < groups
        part, row = pl.program_id(1), pl.program_id(2)
        position = positions_ref[row]
        q_GH = triton.load(q_ref, mask=in_use_G[:, None], other=0)

        def one_block(i, carry):
            most_G, total_G, sum_GH = carry
            some = pl.ds(i * size, size)
            seen_S = i * size + jnp.arange(size) <= position
            k_SH, v_SH = (
                triton.load(ref.at[some, :], mask=seen_S[:, None], other=0)
                for ref in (k_ref, v_ref)
            )
            scores_GS = jnp.where(seen_S[None], dot(q_GH, k_SH, 1), MASKED)
            new_G = jnp.maximum(most_G, scores_GS.max(axis=1))
            weights_GS = jnp.exp(scores_GS - new_G[:, None])
            before_G = jnp.exp(most_G - new_G)
            total_G = total_G * before_G + weights_GS.sum(axis=1)
            part_GH = dot(weights_GS.astype(v_SH.dtype), v_SH)
            return new_G, total_G, sum_GH * before_G[:, None] + part_GH

        zeros_G = jnp.zeros((rows,), jnp.float32)
        init = (zeros_G + MASKED, zeros_G, jnp.zeros((rows, head), jnp.float32))
        last = jnp.minimum((part + 1) * per_part, position // size + 1)
        most_G, total_G, sum_GH = lax.fori_loop(part * per_part, last, one_block, init)
        triton.store(out_ref, sum_GH, mask=in_use_G[:, None])
        triton.store(most_ref, most_G, mask=in_use_G)
        triton.store(total_ref, total_G, mask=in_use_G)

    of_head = pl.BlockSpec((None, None, rows, head), lambda k, p, b: (b, k, 0, 0))
    cached = pl.BlockSpec((None, None, slots, head), lambda k, p, b: (b, k, 0, 0))
    out = pl.BlockSpec((None, None, None, rows, head), lambda k, p, b: (p, b, k, 0, 0))
    number = pl.BlockSpec((None, None, None, rows), lambda k, p, b: (p, b, k, 0))
    numbers = jax.ShapeDtypeStruct((parts, batch, heads, groups), jnp.float32)
    return call(
        kernel,
        "few_queries",
        tiles,
        (heads, parts, batch),
        [whole(batch), of_head, cached, cached],
        [out, number, number],
        [jax.ShapeDtypeStruct((parts, *q_BKGH.shape), jnp.float32), numbers, numbers],
    )(positions_B, q_BKGH, k_BKSH, v_BKSH)
