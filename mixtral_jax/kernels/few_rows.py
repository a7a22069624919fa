"""A few rows times matrices, as in decoding, for GPU; and what such kernels share.

Written in Pallas and compiled by Triton. Their time is that of reading the matrices: a grid of
programs, several on every core, reads apart blocks of columns and parts of the rows that are summed
over, each with its next blocks under way, and XLA adds the parts up where they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

try:
    from jax.experimental.pallas import triton
except ImportError:  # JAX has announced that it will go
    triton = None

from mixtral_jax import kernels
from mixtral_jax.kernels import NARROW, block_of, ceil, compute_capability, dot, platform

MOST = 32
"""Rows at most."""
LEAST = 16
"""Rows of a product on tensor cores at least: those that are missing are zeros."""
ALIGNED = 64
"""The matrices' dimensions are multiples of it."""
TYPES = NARROW
CAPABILITY = 8.0
"""Of a GPU at least, for Triton."""


class Tiles(NamedTuple):
    """How a kernel reads a matrix."""

    depth: int
    """Rows of the matrix, which are summed over, in a block."""
    columns: int
    """Columns in a block."""
    programs: int = 1
    """Programs wanted: where there are more than blocks of columns, some share a block's rows."""
    warps: int = 4
    stages: int = 4
    """Blocks under way in a program."""


TILES = Tiles(64, 128, programs=256)


def fits(rows: int, dtype: jnp.dtype, *sizes: int) -> bool:
    """Whether these kernels run here, on so many rows and on matrices with dimensions of sizes."""
    aligned = not any(size % ALIGNED for size in sizes)
    here = platform() == "gpu" and triton is not None and compute_capability() >= CAPABILITY
    return here and rows <= MOST and jnp.dtype(dtype) in TYPES and aligned


@jax.custom_vjp
def products(x_RD: jax.Array, matrices_DF: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """x times each matrix, in the type of x; sums in float32.

    Arrays of one device; inside shard_map, whose types must not be checked.
    """
    return tuple(p_PRF.sum(axis=0).astype(x_RD.dtype) for p_PRF in parts(x_RD, matrices_DF))


def parts(x_RD: jax.Array, matrices_DF: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """For each matrix float32 parts_PRF, whose sum over P is x times it: to be added up by what
    takes the product. Without a gradient."""
    return tuple(_parts(x_RD, matrices_DF, TILES))


def _plain(x_RD, matrices_DF):
    return tuple(x_RD @ w_DF for w_DF in matrices_DF)


products.defvjp(lambda *operands: jax.vjp(_plain, *operands), lambda pull, g: pull(g))


# ---- what the kernels share --------------------------------------------------------------------


def call(kernel, name: str, tiles: Tiles, grid, in_specs, out_specs, out_shape, aliases=None):
    """pl.pallas_call through Triton; aliases: of operands, by number, those of their results."""
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        input_output_aliases=aliases or {},
        interpret=kernels.interpret(),
        name=name,
    )


def padded(rows: int) -> int:
    """Rows of a block that holds so many."""
    return max(LEAST, pl.next_power_of_2(rows))


def whole(*shape: int) -> pl.BlockSpec:
    """A whole array, or more than it: what lies beyond it must be masked."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def parts_of(blocks: int, wanted: int) -> tuple[int, int]:
    """(parts, blocks in each but perhaps the last) of about as many parts as are wanted."""
    per_part = ceil(blocks, min(max(wanted, 1), blocks))
    return ceil(blocks, per_part), per_part


def _parts(x_RD, matrices_DF, tiles: Tiles):
    """parts, with these tiles."""
    (num_rows, width), rows = x_RD.shape, padded(x_RD.shape[0])
    depth, blocks = block_of(width, tiles.depth), width // block_of(width, tiles.depth)
    columns = [block_of(w_DF.shape[1], tiles.columns) for w_DF in matrices_DF]
    strips = [w_DF.shape[1] // size for w_DF, size in zip(matrices_DF, columns)]
    firsts = [sum(strips[:number]) for number in range(len(strips))]
    num_parts, per_part = parts_of(blocks, ceil(tiles.programs, sum(strips)))

    def kernel(x_ref, *refs):
        in_use_R1 = (jnp.arange(rows) < num_rows)[:, None]
        strip, part = pl.program_id(0), pl.program_id(1)
        first_block = part * per_part
        last_block = jnp.minimum(first_block + per_part, blocks)

        def one_strip(w_ref, out_ref, first: int, size: int):
            here = pl.ds((strip - first) * size, size)

            def one_block(i, sum_Rf):
                some = pl.ds(i * depth, depth)
                x_Rd = triton.load(x_ref.at[:, some], mask=in_use_R1, other=0)
                return sum_Rf + dot(x_Rd, triton.load(w_ref.at[some, here]))

            zeros_Rf = jnp.zeros((rows, size), jnp.float32)
            sum_Rf = lax.fori_loop(first_block, last_block, one_block, zeros_Rf)
            triton.store(out_ref.at[part, pl.ds(0, rows), here], sum_Rf, mask=in_use_R1)

        count = len(strips)
        for number, (first, size) in enumerate(zip(firsts, columns)):
            mine = (strip >= first) & (strip < first + strips[number])
            pl.when(mine)(
                lambda n=number, f=first, s=size: one_strip(refs[n], refs[count + n], f, s)
            )

    return call(
        kernel,
        "few_rows",
        tiles,
        (sum(strips), num_parts),
        [whole(rows, width), *(whole(*w_DF.shape) for w_DF in matrices_DF)],
        [whole(num_parts, rows, w_DF.shape[1]) for w_DF in matrices_DF],
        [
            jax.ShapeDtypeStruct((num_parts, num_rows, w_DF.shape[1]), jnp.float32)
            for w_DF in matrices_DF
        ],
    )(x_RD, *matrices_DF)
