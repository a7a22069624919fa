"""Experts whose matrices are arrays of their own, against one row after another in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax.kernels import apart

D, F, E = 7, 5, 4


def operands(rows):
    rng = np.random.default_rng(rows)
    shapes = (rows, D), (E, D, F), (E, D, F), (E, F, D)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def expected(x_RD, gate_EDF, up_EDF, down_EFD, sizes_E):
    out_RD = np.zeros(x_RD.shape)
    for row, expert in enumerate(np.repeat(np.arange(E), sizes_E)):
        hidden_F = oracle.silu(x_RD[row] @ gate_EDF[expert]) * (x_RD[row] @ up_EDF[expert])
        out_RD[row] = hidden_F @ down_EFD[expert]
    return out_RD


@functools.cache
def compiled(rows):
    """The kernel for so many rows, compiled once."""
    return jax.jit(apart.experts)


def run(x_RD, gate_EDF, up_EDF, down_EFD, sizes_E):
    lists = [list(map(jnp.asarray, w)) for w in (gate_EDF, up_EDF, down_EFD)]
    return np.asarray(compiled(len(x_RD))(x_RD, *lists, jnp.asarray(sizes_E, jnp.int32)))


# Sixteen rows are few, of which each is a block; 37 are not: here in blocks of 16.
SIZES = [
    *([4, 4, 4, 4], [1, 9, 0, 3], [0, 0, 16, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 5]),
    *([9, 11, 10, 7], [17, 16, 1, 3], [0, 37, 0, 0], [37, 0, 0, 0], [0, 0, 0, 37], [0, 2, 0, 33]),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_by_its_experts_matrices(sizes):
    rows = 16 if sum(sizes) <= 16 else 37
    arrays = operands(rows)
    out_RD = run(*arrays, sizes)
    oracle.close(out_RD, expected(*arrays, sizes), rel=2e-6)
    assert not out_RD[sum(sizes) :].any(), "rows past the last group must be zero"


def test_what_lies_past_the_rows_in_use_and_idle_experts_are_not_read():
    for rows, sizes in ((16, [2, 0, 3, 0]), (37, [2, 0, 20, 0])):
        arrays = operands(rows)
        wanted = expected(*arrays, sizes)
        arrays[0][sum(sizes) :] = np.nan
        for w_EDF in arrays[1:]:
            w_EDF[[1, 3]] = np.nan
        oracle.close(run(*arrays, sizes), wanted, rel=2e-6)


def test_blocks_are_of_one_row_where_rows_are_few_and_of_the_mean_elsewhere():
    assert [apart.block_rows(rows, 8) for rows in (1, 2, 7, 8)] == [1, 1, 1, 1]
    assert [apart.block_rows(rows, 8) for rows in (9, 64, 128, 137, 264)] == [8, 8, 16, 32, 64]
    assert [apart.block_rows(rows, 8) for rows in (512, 10**6)] == [64, 64]
    assert apart.block_rows(5, 1) == 5


@pytest.mark.usefixtures("optimized")
def test_no_matrix_is_copied():
    """What the kernel is for: the compiled program's temporaries hold no matrix."""
    rows, width, hidden = 2, 64, 96
    x_RD = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    into = [jax.ShapeDtypeStruct((width, hidden), jnp.float32)] * E
    out_of = [jax.ShapeDtypeStruct((hidden, width), jnp.float32)] * E
    sizes_E = jax.ShapeDtypeStruct((E,), jnp.int32)
    memory = jax.jit(apart.experts).lower(x_RD, into, into, out_of, sizes_E).compile()
    assert memory.memory_analysis().temp_size_in_bytes < 4 * width * hidden
