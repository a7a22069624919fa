"""From the products of a few tokens to their attention to a cache, as in decoding, for GPU.

A kernel like few_queries', which makes its queries, keys and values itself: it adds up the parts of
the products, rotates, and writes keys and values to their places. Programs read what lies before a
query from the cache; its own key and value the first of them has.

The grid is heads K, parts of a cache, batch. Of one head and row, whose place n is in part 1:

    program   part 0                      part 1               part 2
    reads     its places                  its places before n  nothing
    has too   the key and value of n, which it writes there

Operands, tuples apart: 0 positions, 1 real, 2-4 parts of q, k and v, 5-6 cos and sin, 7-8 caches.
Results: 0-2 the sums of each part, for few_queries.together, 3-4 the caches, in place of 7 and 8.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mixtral_jax.kernels import dot, few_queries, few_rows
from mixtral_jax.kernels.few_queries import Sums
from mixtral_jax.kernels.few_rows import Tiles, call, padded, triton, whole


def fits(groups: int, k_BKSH: jax.Array, dtype: jnp.dtype) -> bool:
    """Whether the kernel runs here, on queries of this type, so many a head, and on a cache."""
    batch, heads, _, head = k_BKSH.shape
    q_BLKGH = jax.ShapeDtypeStruct((batch, 1, heads, groups, head), dtype)
    return few_queries.fits(q_BLKGH, k_BKSH) and head >= 2 * few_rows.LEAST


def attention(
    parts: tuple[jax.Array, jax.Array, jax.Array],
    turn: tuple[jax.Array, jax.Array],
    caches: tuple[jax.Array, jax.Array],
    positions_B: jax.Array,
    real_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """softmax(q k^T / sqrt(H)) v over the places up to each position, with keys rotated.

    Args:
      parts: float32 q_PBF, k_PBF and v_PBF: sums over P are queries [K, G, H], and keys and values
        [K, H].
      turn: float32 cos_Bh and sin_Bh of the angles, for the half-rotation convention.
      caches: k_BKSH and v_BKSH, without the keys and values of these tokens.
      real_B: false where nothing is to be written; there is no meaning in the result there.
    Returns:
      out_BKGH, and the caches, which are written to where they lie if they are given up.
    """
    sums, (k_BKSH, v_BKSH) = _parts(
        parts, turn, caches, positions_B, real_B.astype(jnp.int32), few_queries.TILES
    )
    return few_queries.together(*sums, k_BKSH.dtype), k_BKSH, v_BKSH


def _parts(parts, turn, caches, positions_B, real_B, tiles: Tiles):
    """As few_queries._parts gives them, and the caches."""
    (batch, heads, slots, head), products = caches[0].shape, parts[0].shape[0]
    groups, size = parts[0].shape[2] // (heads * head), tiles.depth
    num_parts, per_part = few_queries.split(batch, heads, slots, tiles)

    def kernel(positions_ref, real_ref, part_refs, turn_refs, cache_refs, sum_refs, written_refs):
        part, row = pl.program_id(1), pl.program_id(2)
        position = positions_ref[row]
        q_halves, k_halves, v_H = _heads(*part_refs, *turn_refs, groups, caches[0].dtype)

        @pl.when((part == 0) & (real_ref[row] != 0))
        def _():
            _write(k_halves, v_H, position, *written_refs)

        block = partial(_block, q_halves, *cache_refs, position, size)
        last = jnp.minimum((part + 1) * per_part, (position + size - 1) // size)
        own = _own(part == 0, q_halves, k_halves, v_H)
        few_queries.store(
            few_queries.over_blocks(part * per_part, last, block, own), groups, *sum_refs
        )

    q_PBKGH, k_PBKH, v_PBKH = (
        p.reshape(products, batch, heads, *more, head)
        for p, more in zip(parts, ((groups,), (), ()))
    )
    rows = padded(groups)
    of_group = pl.BlockSpec((products, None, None, rows, head), lambda k, p, b: (0, b, k, 0, 0))
    of_head = pl.BlockSpec((products, None, None, head), lambda k, p, b: (0, b, k, 0))
    angle = pl.BlockSpec((None, head // 2), lambda k, p, b: (b, 0))
    cached = pl.BlockSpec((None, None, slots, head), lambda k, p, b: (b, k, 0, 0))
    like_cache = jax.ShapeDtypeStruct(caches[0].shape, caches[0].dtype)
    specs, shapes = few_queries.outputs(num_parts, batch, heads, groups, head)
    return call(
        kernel,
        "few_heads",
        tiles,
        (heads, num_parts, batch),
        (*[whole(batch)] * 2, (of_group, of_head, of_head), (angle, angle), (cached, cached)),
        (specs, (cached, cached)),
        (shapes, (like_cache, like_cache)),
        aliases={7: 3, 8: 4},
    )(positions_B, real_B, (q_PBKGH, k_PBKH, v_PBKH), turn, caches)


# ---- inside the kernel, where all is of one kv head of one token -------------------------------


def _heads(q_ref, k_ref, v_ref, cos_ref, sin_ref, groups: int, dtype):
    """(q_Gh and k_h, each in two halves, rotated; v_H); q is scaled."""
    head = v_ref.shape[-1]
    in_use_G1 = (jnp.arange(q_ref.shape[1]) < groups)[:, None]
    turn = triton.load(cos_ref), triton.load(sin_ref)
    q_halves = _rotated(*_halves(q_ref, head // 2, dtype, in_use_G1), *turn)
    k_halves = _rotated(*_halves(k_ref, head // 2, dtype), *turn)
    v_H = _sum(v_ref, pl.ds(0, head), dtype)
    return [_scaled(q_Gh, head) for q_Gh in q_halves], k_halves, v_H


def _write(k_halves, v_H, position, keys_ref, values_ref):
    for number, k_h in enumerate(k_halves):
        half = k_h.shape[0]
        triton.store(keys_ref.at[position, pl.ds(number * half, half)], k_h)
    triton.store(values_ref.at[position], v_H)


def _block(q_halves, keys_ref, values_ref, position, size: int, i):
    """(seen_S, scores_GS, v_SH) of one block: of what lies before the position."""
    rows, half = q_halves[0].shape
    some = pl.ds(i * size, size)
    seen_S = i * size + jnp.arange(size) < position
    scores_GS = jnp.zeros((rows, size), jnp.float32)
    for number, q_Gh in enumerate(q_halves):
        here = keys_ref.at[some, pl.ds(number * half, half)]
        scores_GS += dot(q_Gh, triton.load(here, mask=seen_S[:, None], other=0), 1)
    return seen_S, scores_GS, triton.load(values_ref.at[some, :], mask=seen_S[:, None], other=0)


def _sum(ref, here, dtype, mask_G1=None):
    """The sum over the parts, rounded as a product is."""
    some = (slice(None), here) if mask_G1 is not None else (here,)
    more = {} if mask_G1 is None else {"mask": mask_G1, "other": 0}
    loads = (triton.load(ref.at[(jnp.int32(p), *some)], **more) for p in range(ref.shape[0]))
    return sum(loads).astype(dtype)


def _halves(ref, half: int, dtype, mask_G1=None):
    return [_sum(ref, pl.ds(number * half, half), dtype, mask_G1) for number in range(2)]


def _rotated(first, second, cos_h, sin_h):
    """As model.layers.rotate has it."""
    if first.ndim == 2:
        cos_h, sin_h = cos_h[None], sin_h[None]
    dtype, first, second = first.dtype, first.astype(jnp.float32), second.astype(jnp.float32)
    turned = first * cos_h - second * sin_h, second * cos_h + first * sin_h
    return [half.astype(dtype) for half in turned]


def _scaled(q_Gh, head: int):
    """Times H^-1/2 in the type of q, as cached_attention has it."""
    factor = jnp.asarray(head**-0.5, q_Gh.dtype).astype(jnp.float32)
    return (q_Gh.astype(jnp.float32) * factor).astype(q_Gh.dtype)


def _own(here, q_halves, k_halves, v_H) -> Sums:
    """Those of the query's own place, or, elsewhere than here, of none."""
    rows, head = q_halves[0].shape[0], v_H.shape[0]
    score_G = jnp.zeros((rows,), jnp.float32)
    for q_Gh, k_h in zip(q_halves, k_halves):
        score_G += (q_Gh.astype(jnp.float32) * k_h.astype(jnp.float32)[None]).sum(axis=1)
    v_GH = lax.broadcast_in_dim(v_H.astype(jnp.float32), (rows, head), (1,))
    own = Sums(score_G, jnp.ones((rows,), jnp.float32), v_GH)
    return jax.tree.map(lambda a, b: jnp.where(here, a, b), own, few_queries.none(rows, head))
