"""One query of each sequence against its cache of keys and values, as in decoding, for GPU.

A kernel of the kind of few_rows. Programs share a long cache, and read of it what lies before the
query alone; each makes the softmax of its part as cached_attention does, and XLA puts the parts
together.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mixtral_jax.kernels import MASKED, ceil, dot, few_rows
from mixtral_jax.kernels.few_rows import Tiles, call, padded, parts_of, triton, whole

TILES = Tiles(64, 0, programs=256, stages=3)
"""Places of a cache in a block; and programs, for all heads of all sequences, if that needs no part
shorter than a block."""
MOST_PARTS = 32
WIDEST_HEAD = 128
"""Blocks of wider ones do not fit into the shared memory of many GPUs."""


def fits(q_BLKGH: jax.Array, k_BKSH: jax.Array) -> bool:
    """Whether the kernel runs here, on such queries and such keys."""
    _, length, _, groups, head = q_BLKGH.shape
    square = few_rows.LEAST <= head <= WIDEST_HEAD and head == pl.next_power_of_2(head)
    narrow = few_rows.fits(groups, q_BLKGH.dtype) and q_BLKGH.dtype == k_BKSH.dtype
    numbered = k_BKSH.size < 2**31  # JAX counts places of more in int64, untried here
    return narrow and square and numbered and length == 1 and k_BKSH.ndim == 4


def attention(
    q_BKGH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, positions_B: jax.Array
) -> jax.Array:
    """softmax(q k^T) v over the places up to each query's position; q is scaled already.

    Returns:
      out_BKGH in the type of q.
    """
    return together(*_parts(q_BKGH, k_BKSH, v_BKSH, positions_B, TILES), q_BKGH.dtype)


def together(out_PBKGH, most_PBKG, total_PBKG, dtype: jnp.dtype) -> jax.Array:
    """The attention out_BKGH whose parts are given, as _parts gives them."""
    factor_PBKG = jnp.exp(most_PBKG - most_PBKG.max(axis=0, keepdims=True))
    total_BKG = (total_PBKG * factor_PBKG).sum(axis=0)
    out_BKGH = (out_PBKGH * factor_PBKG[..., None]).sum(axis=0) / total_BKG[..., None]
    return out_BKGH.astype(dtype)


class Sums(NamedTuple):
    """Of some places of a cache, for each query."""

    most_G: jax.Array
    total_G: jax.Array
    """The sum of the weights, which are exp(score - most)."""
    out_GH: jax.Array
    """The sum of the values times the weights."""


def none(rows: int, head: int) -> Sums:
    """Those of no place."""
    zeros_G = jnp.zeros((rows,), jnp.float32)
    return Sums(zeros_G + MASKED, zeros_G, jnp.zeros((rows, head), jnp.float32))


def over_blocks(first, last, block, init: Sums) -> Sums:
    """The sums with those of blocks first ... last - 1; block(i) is (seen_S, scores_GS, v_SH)."""

    def one_block(i, before: Sums):
        seen_S, scores_GS, v_SH = block(i)
        scores_GS = jnp.where(seen_S[None], scores_GS, MASKED)
        most_G = jnp.maximum(before.most_G, scores_GS.max(axis=1))
        weights_GS = jnp.exp(scores_GS - most_G[:, None])
        factor_G = jnp.exp(before.most_G - most_G)
        total_G = before.total_G * factor_G + weights_GS.sum(axis=1)
        part_GH = dot(weights_GS.astype(v_SH.dtype), v_SH)
        return Sums(most_G, total_G, before.out_GH * factor_G[:, None] + part_GH)

    return lax.fori_loop(first, last, one_block, init)


def split(batch: int, heads: int, slots: int, tiles: Tiles) -> tuple[int, int]:
    """(parts of a cache, blocks in each but perhaps the last)."""
    wanted = min(tiles.programs // (batch * heads), MOST_PARTS)
    return parts_of(ceil(slots, tiles.depth), wanted)


def outputs(parts: int, batch: int, heads: int, groups: int, head: int):
    """(specs, shapes) of what a kernel gives `together`, on a grid of heads, parts, batch."""
    rows, numbers = padded(groups), (parts, batch, heads, groups)
    out = pl.BlockSpec((None, None, None, rows, head), lambda k, p, b: (p, b, k, 0, 0))
    number = pl.BlockSpec((None, None, None, rows), lambda k, p, b: (p, b, k, 0))
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*numbers, head), numbers, numbers)]
    return [out, number, number], shapes


def store(sums: Sums, groups: int, out_ref, most_ref, total_ref) -> None:
    in_use_G = jnp.arange(sums.most_G.shape[0]) < groups
    triton.store(out_ref, sums.out_GH, mask=in_use_G[:, None])
    triton.store(most_ref, sums.most_G, mask=in_use_G)
    triton.store(total_ref, sums.total_G, mask=in_use_G)


def _parts(q_BKGH, k_BKSH, v_BKSH, positions_B, tiles: Tiles):
    """Of each part of a cache: weighted sums out_PBKGH of the values, with weights
    exp(score - most_PBKG), and total_PBKG of the weights; all float32."""
    (batch, heads, groups, head), slots = q_BKGH.shape, k_BKSH.shape[2]
    rows, size = padded(groups), tiles.depth
    parts, per_part = split(batch, heads, slots, tiles)

    def kernel(positions_ref, q_ref, k_ref, v_ref, *out_refs):
        in_use_G = jnp.arange(rows) < groups
        part, row = pl.program_id(1), pl.program_id(2)
        position = positions_ref[row]
        q_GH = triton.load(q_ref, mask=in_use_G[:, None], other=0)

        def block(i):
            some = pl.ds(i * size, size)
            seen_S = i * size + jnp.arange(size) <= position
            k_SH, v_SH = (
                triton.load(ref.at[some, :], mask=seen_S[:, None], other=0)
                for ref in (k_ref, v_ref)
            )
            return seen_S, dot(q_GH, k_SH, 1), v_SH

        last = jnp.minimum((part + 1) * per_part, position // size + 1)
        store(over_blocks(part * per_part, last, block, none(rows, head)), groups, *out_refs)

    of_head = pl.BlockSpec((None, None, rows, head), lambda k, p, b: (b, k, 0, 0))
    cached = pl.BlockSpec((None, None, slots, head), lambda k, p, b: (b, k, 0, 0))
    return call(
        kernel,
        "few_queries",
        tiles,
        (heads, parts, batch),
        [whole(batch), of_head, cached, cached],
        *outputs(parts, *q_BKGH.shape),
    )(positions_B, q_BKGH, k_BKSH, v_BKSH)
