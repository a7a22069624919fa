"""The grouped matrix product for CPU: a loop over each expert's rows in blocks.

Work in proportion to the rows in use; XLA:CPU's own ragged_dot runs every expert on every row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import vary_like

BLOCK_ROWS = 128  # rows per product: fewer is slower a row, more wastes part-full blocks


def _for_each_expert(group_sizes_E, body, init):
    """body(expert, start, size, carry) for each expert in turn, over a loop-carried array."""
    starts_E = jnp.cumsum(group_sizes_E) - group_sizes_E

    def step(expert, carry):
        return body(expert, starts_E[expert], group_sizes_E[expert], carry)

    return lax.fori_loop(0, group_sizes_E.shape[0], step, init)


def _for_each_block(start, size, num_rows, body, init):
    """body(first row, in_use mask, carry) for each block of the rows start .. start + size.

    A block never reaches past the array: near its end the block moves up, and the mask keeps only
    the rows that no earlier block has had.
    """
    block = min(BLOCK_ROWS, num_rows)

    def step(i, carry):
        wanted = start + i * block
        first = jnp.minimum(wanted, num_rows - block)
        rows = first + jnp.arange(block)
        in_use = (rows >= wanted) & (rows < start + size)
        return body(first, in_use[:, None], carry)

    return lax.fori_loop(0, (size + block - 1) // block, step, init)


def _block_of(x, first):
    block = min(BLOCK_ROWS, x.shape[0])
    return lax.dynamic_slice_in_dim(x, first, block)


def _rows_times_matrix(x_RD, w_EDF, group_sizes_E):
    out_RF = vary_like(jnp.zeros((x_RD.shape[0], w_EDF.shape[2]), x_RD.dtype), x_RD, group_sizes_E)

    def one_expert(expert, start, size, out_RF):
        w_DF = lax.dynamic_index_in_dim(w_EDF, expert, keepdims=False)

        def one_block(first, in_use, out_RF):
            product = _block_of(x_RD, first) @ w_DF
            block = jnp.where(in_use, product, _block_of(out_RF, first))
            return lax.dynamic_update_slice_in_dim(out_RF, block, first, axis=0)

        return _for_each_block(start, size, x_RD.shape[0], one_block, out_RF)

    return _for_each_expert(group_sizes_E, one_expert, out_RF)


def _rows_times_rows(x_RD, g_RF, group_sizes_E):
    """Gradient of the matrices: per expert, the sum over its rows of x[r] outer g[r]."""
    shape_DF = (x_RD.shape[1], g_RF.shape[1])
    out_EDF = vary_like(jnp.zeros((group_sizes_E.shape[0], *shape_DF), x_RD.dtype), x_RD, g_RF)

    def one_expert(expert, start, size, out_EDF):
        def one_block(first, in_use, sum_DF):
            x_bD = jnp.where(in_use, _block_of(x_RD, first), 0)
            g_bF = jnp.where(in_use, _block_of(g_RF, first), 0)
            product = lax.dot_general(
                x_bD,
                g_bF,
                (((0,), (0,)), ((), ())),
                preferred_element_type=sum_DF.dtype,
            )
            return sum_DF + product

        zeros_DF = vary_like(jnp.zeros(shape_DF, jnp.float32), x_RD, g_RF)
        sum_DF = _for_each_block(start, size, x_RD.shape[0], one_block, zeros_DF)
        return lax.dynamic_update_index_in_dim(
            out_EDF, sum_DF.astype(out_EDF.dtype), expert, axis=0
        )

    return _for_each_expert(group_sizes_E, one_expert, out_EDF)


@jax.custom_vjp
def blocks(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """What `grouped_matmul` does; all operands vary over the same mesh axes."""
    return _rows_times_matrix(x_RD, w_EDF, group_sizes_E)


def _forward(x_RD, w_EDF, group_sizes_E):
    return blocks(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _backward(residuals, g_RF):
    x_RD, w_EDF, group_sizes_E = residuals
    dx_RD = _rows_times_matrix(g_RF, w_EDF.swapaxes(1, 2), group_sizes_E)
    return dx_RD, _rows_times_rows(x_RD, g_RF, group_sizes_E).astype(w_EDF.dtype), None


blocks.defvjp(_forward, _backward)
