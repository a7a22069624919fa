"""SwiGLU of rows sorted by expert where each expert's matrices are arrays of their own, for CPU.

XLA:CPU reads an array that a product is given whole where it lies, and copies a part of one first.
With few rows a product takes no longer than reading its matrix, and the copy twice as long.
For inference: no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import bits, int8, vary_like
from mixtral_jax.kernels.rows import starts

LEAST_ROWS, MOST_ROWS = 8, 64
"""In a block of more than one: 2 to 8 rows take as long, and more than 64 run no faster."""
FEW = 1
"""Rows an expert, on average, up to which each is a block: a vector times a matrix runs at the
speed of reading it, and again from the cache; a product of 2 to 8 rows takes up to twice that, in
int8 too."""


def block_rows(rows: int, experts: int) -> int:
    """Rows in a block: one where an expert has few on average, else that mean, as 8 to 64."""
    if rows <= FEW * experts:
        return 1
    average = 1 << (rows // experts - 1).bit_length()
    return min(max(LEAST_ROWS, average), MOST_ROWS, rows)


def experts(
    x_RD: jax.Array,
    gates_DF: Sequence[jax.Array] | Sequence[int8.Int8],
    ups_DF: Sequence[jax.Array] | Sequence[int8.Int8],
    downs_FD: Sequence[jax.Array] | Sequence[int8.Int8],
    group_sizes_E: jax.Array,
) -> jax.Array:
    """out[r] = down(silu(gate x[r]) * (up x[r])) with the matrices of row r's expert.

    Args:
      x_RD: rows, the first group_sizes[0] of them of expert 0, and so on. The rest is not read.
      gates_DF, ups_DF, downs_FD: the matrices, by expert, in the type of x or bfloat16 as bits.
        Of an expert without rows none is read.
      group_sizes_E: int32 rows of each expert.
    Returns:
      out_RD in the type of x; rows past sum(group_sizes) are zeros.
    """
    num_rows = x_RD.shape[0]
    block = block_rows(num_rows, len(gates_DF))
    starts_E = starts(group_sizes_E)
    blocks_E = (group_sizes_E + block - 1) // block
    ends_E = jnp.cumsum(blocks_E)  # blocks are numbered through all experts
    branches = [_swiglu(*matrices) for matrices in zip(gates_DF, ups_DF, downs_FD, strict=True)]

    def one_block(i, out_RD):
        expert = (i >= ends_E).sum()
        wanted = starts_E[expert] + (i - ends_E[expert] + blocks_E[expert]) * block
        first = jnp.minimum(wanted, num_rows - block)  # never past the array
        rows = first + jnp.arange(block)
        in_use = (rows >= wanted) & (rows < starts_E[expert] + group_sizes_E[expert])
        done_bD = lax.switch(expert, branches, lax.dynamic_slice_in_dim(x_RD, first, block))
        before_bD = lax.dynamic_slice_in_dim(out_RD, first, block)
        kept_bD = jnp.where(in_use[:, None], done_bD, before_bD)
        return lax.dynamic_update_slice_in_dim(out_RD, kept_bD, first, axis=0)

    zeros_RD = vary_like(jnp.zeros_like(x_RD), x_RD, group_sizes_E, *jax.tree.leaves(gates_DF))
    return lax.fori_loop(0, ends_E[-1], one_block, zeros_RD)


def _times(x_RD: jax.Array, w: jax.Array | int8.Int8) -> jax.Array:
    """x times a matrix [D, F], as it is, as bits or in int8, in the type of x."""
    if isinstance(w, int8.Int8):
        return int8.product(x_RD, w)
    return bits.product(x_RD, w) if w.dtype == bits.BITS else x_RD @ w


def _swiglu(gate_DF, up_DF, down_FD):
    def branch(x_bD):
        hidden_bF = jax.nn.silu(_times(x_bD, gate_DF)) * _times(x_bD, up_DF)
        return _times(hidden_bF, down_FD)

    return branch
