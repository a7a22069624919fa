"""The grouped matrix product for CPU and GPU: a loop over each expert's rows in blocks.

Work in proportion to the rows in use; XLA's own ragged_dot runs every expert on every row there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import ceil, platform, vary_like
from mixtral_jax.kernels.bits import bits, floats
from mixtral_jax.kernels.rows import starts

STEP_ROWS = 64  # blocks are multiples of it: fewer are slower a row, more waste part-full blocks
STEPS = 8  # in the largest block
MOST_ON_GPU = 1024  # rows of a block there


class Block(NamedTuple):
    """Some consecutive rows, of which those of one expert are in use."""

    expert: jax.Array
    first: jax.Array
    in_use_b1: jax.Array

    def rows(self, x_RD: jax.Array) -> jax.Array:
        """The block's rows, in use or not."""
        return lax.dynamic_slice_in_dim(x_RD, self.first, self.in_use_b1.shape[0])

    def take(self, x_RD: jax.Array) -> jax.Array:
        """The block's rows; zeros where they are not in use."""
        return jnp.where(self.in_use_b1, self.rows(x_RD), 0)

    def columns(self, x_DR: jax.Array) -> jax.Array:
        """`take` of rows that are given as columns."""
        columns_Db = lax.dynamic_slice_in_dim(x_DR, self.first, self.in_use_b1.shape[0], axis=1)
        return jnp.where(self.in_use_b1.T, columns_Db, 0)

    def put(self, x_RD: jax.Array, rows_bD: jax.Array) -> jax.Array:
        """x with the rows in use replaced; both in bits."""
        rows_bD = jnp.where(self.in_use_b1, rows_bD, self.rows(x_RD))
        return lax.dynamic_update_slice_in_dim(x_RD, rows_bD, self.first, axis=0)

    def matrix(self, w_EDF: jax.Array) -> jax.Array:
        """The expert's."""
        return lax.dynamic_index_in_dim(w_EDF, self.expert, keepdims=False)

    def add(self, w_EDF: jax.Array, part_DF: jax.Array) -> jax.Array:
        """w with something added to the expert's matrix."""
        before_1DF = lax.dynamic_slice_in_dim(w_EDF, self.expert, 1)
        sum_1DF = before_1DF + part_DF[None]
        return lax.dynamic_update_slice_in_dim(w_EDF, sum_1DF, self.expert, axis=0)


def for_each_block(
    group_sizes_E: jax.Array, num_rows: int, body: Callable[[Block, Any], Any], init: Any
) -> Any:
    """body(block, carry) for blocks that together hold each expert's rows once, over loops' carry.

    An expert's rows fill largest blocks, then one of the smallest size that takes the rest. A loop
    that runs once or not at all stands for each size: unlike branches it updates arrays in place.
    A block never reaches past the array: near its end the block moves up, and the mask keeps only
    the rows that no earlier block has had.
    """
    starts_E = starts(group_sizes_E)
    sizes = _sizes(num_rows, group_sizes_E.shape[0])
    largest = sizes[-1]

    def one_expert(expert, carry):
        start, size = starts_E[expert], group_sizes_E[expert]
        whole, rest = size // largest, size % largest

        def one_block(i, carry, rows):
            # Hides that nothing else here depends on i: XLA would do all of it for every size.
            i, here = lax.optimization_barrier((i, expert))
            wanted = start + i * rows + (0 if rows == largest else whole * largest)
            first = jnp.minimum(wanted, num_rows - rows)
            at = first + jnp.arange(rows, dtype=jnp.int32)
            in_use = (at >= wanted) & (at < start + size)
            return body(Block(here, first, in_use[:, None]), carry)

        for smaller, rows in zip([0, *sizes], sizes):
            times = ((rest > smaller) & (rest <= rows)).astype(jnp.int32)
            if rows == largest:
                times = times + whole
            carry = lax.fori_loop(0, times, partial(one_block, rows=rows), carry)
        return carry

    return lax.fori_loop(0, group_sizes_E.shape[0], one_expert, init)


def _sizes(rows: int, experts: int) -> list[int]:
    """Those of blocks, in rows, for so many rows of all experts."""
    if platform() != "gpu":
        return sorted({min(STEP_ROWS * (i + 1), rows) for i in range(STEPS)})
    # One: the host waits before each turn of such a loop, and for a size that is not needed too.
    even = 1 << (ceil(rows, experts) - 1).bit_length()
    return [min(max(even, STEP_ROWS), MOST_ON_GPU, rows)]


def dot_rounded(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int, dtype=None) -> jax.Array:
    """The product of two matrices over an axis of each, rounded once to a type: that of a if None.

    b is converted to the type of a. No copy to transpose either. Asked for float32, XLA:CPU
    multiplies bfloat16 as it is, where the machine can and a does not lie transposed; otherwise it
    widens both first.
    """
    dimensions = (((a_axis,), (b_axis,)), ((), ()))
    out = lax.dot_general(a, b.astype(a.dtype), dimensions, preferred_element_type=jnp.float32)
    return out.astype(dtype or a.dtype)


def _rows_times_matrix(x_RD, w_EDF, group_sizes_E, axis: int):
    """Of each row and its expert's matrix, whose axis is summed over: 0 or 1."""
    out_RF = bits(jnp.zeros((x_RD.shape[0], w_EDF.shape[2 - axis]), x_RD.dtype))

    def body(block, out_RF):
        return block.put(out_RF, bits(dot_rounded(block.take(x_RD), block.matrix(w_EDF), 1, axis)))

    init = vary_like(out_RF, x_RD, group_sizes_E)
    return floats(for_each_block(group_sizes_E, x_RD.shape[0], body, init), x_RD.dtype)


def _rows_times_rows(x_RD, g_RF, group_sizes_E):
    """Gradient of the matrices: per expert, the float32 sum over its rows of x[r] outer g[r]."""
    shape = (group_sizes_E.shape[0], x_RD.shape[1], g_RF.shape[1])

    def body(block, out_EDF):
        return block.add(
            out_EDF, dot_rounded(block.take(x_RD), block.take(g_RF), 0, 0, jnp.float32)
        )

    init = vary_like(jnp.zeros(shape, jnp.float32), x_RD, g_RF)
    return for_each_block(group_sizes_E, x_RD.shape[0], body, init)


@jax.custom_vjp
def blocks(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """What `grouped_matmul` does; all operands vary over the same mesh axes."""
    return _rows_times_matrix(x_RD, w_EDF, group_sizes_E, 0)


def _forward(x_RD, w_EDF, group_sizes_E):
    return blocks(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)


def _backward(residuals, g_RF):
    x_RD, w_EDF, group_sizes_E = residuals
    dx_RD = _rows_times_matrix(g_RF, w_EDF, group_sizes_E, 1)
    return dx_RD, _rows_times_rows(x_RD, g_RF, group_sizes_E).astype(w_EDF.dtype), None


blocks.defvjp(_forward, _backward)
