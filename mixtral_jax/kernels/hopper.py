"""The grouped matrix product by Pallas kernels of our own for NVIDIA's Hopper (H100, H200).

Each multiprocessor works on one tile of the result after another. Of its three warpgroups one has
the copy engine bring tiles of both operands into shared memory, a few ahead, and two multiply, each
a half of the result: the organisation of CUTLASS's cooperative kernels and JAX's
hopper_matmul_mgpu. Rows of no expert are passed over: time is in proportion to the rows in use.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mixtral_jax.kernels.differentiable import differentiable

ROWS = 128
"""Of a tile; rows of the operands are a multiple."""
DEPTH = 64
"""Of a tile of an operand, and rows and columns of what is stored at a time: 128 bytes, which is as
wide as shared memory is swizzled."""
STAGES = 4
"""Tiles of each operand in shared memory."""
WIDE = 8
"""Tiles of rows that are worked on side by side: what they share stays in the L2 cache."""
COMPUTE = 2  # warpgroups that multiply


class Blocks(NamedTuple):
    """The tiles of rows, in order; a block of rows that experts share is one tile for each."""

    expert_T: jax.Array
    block_T: jax.Array
    first_T: jax.Array
    """Within the block, the expert's first row."""
    count_T: jax.Array
    """How many rows there are its own; zero past the last tile."""


def blocks_of(sizes_E: jax.Array, rows: int) -> Blocks:
    """T = rows / ROWS + E - 1 tiles, which is the most that there can be."""
    tiles_T1 = jnp.arange(rows // ROWS + sizes_E.shape[0] - 1, dtype=jnp.int32)[:, None]
    ends_E = jnp.cumsum(sizes_E).astype(jnp.int32)
    starts_E = ends_E - sizes_E
    tiles_E = jnp.where(sizes_E > 0, (ends_E - 1) // ROWS - starts_E // ROWS + 1, 0)
    before_1E = (jnp.cumsum(tiles_E) - tiles_E)[None]
    inside_TE = (tiles_T1 >= before_1E) & (tiles_T1 < before_1E + tiles_E[None])

    def of_expert(values_E):
        return jnp.where(inside_TE, values_E[None], 0).sum(axis=1, dtype=jnp.int32)

    block_T = of_expert(starts_E // ROWS - before_1E[0]) + tiles_T1[:, 0]
    block_T = jnp.where(inside_TE.any(axis=1), block_T, 0)
    first_T = jnp.maximum(of_expert(starts_E) - block_T * ROWS, 0)
    last_T = jnp.minimum(of_expert(ends_E) - block_T * ROWS, ROWS)
    expert_T = of_expert(jnp.arange(sizes_E.shape[0]))
    return Blocks(expert_T, block_T, first_T, jnp.maximum(last_T - first_T, 0))


# ---- rows times matrices -----------------------------------------------------------------------


def rows_times_matrix(
    x_RD: jax.Array, w: jax.Array, sizes_E: jax.Array, transposed: bool
) -> jax.Array:
    """out_RF; w is [E, D, F], or [E, F, D] if transposed. Rows of no expert come out as anything.

    Args:
      x_RD: R is a multiple of ROWS, D and F are multiples of 128.
    """
    rows, hidden = x_RD.shape[0], w.shape[1 if transposed else 2]
    kernel = partial(_rows_times_matrix, transposed=transposed)
    launch = _launch("rows_times_matrix", kernel, (rows, hidden), x_RD.dtype)
    out_RF = launch(*blocks_of(sizes_E, rows), x_RD, w)
    # Or XLA (JAX 0.11) has a second call of the kernel write into the stack of what a scan keeps.
    return lax.optimization_barrier(out_RF)


def _rows_times_matrix(
    expert_T, block_T, first_T, count_T, x_RD, w, out_RF, *, transposed: bool
) -> None:
    hidden = out_RF.shape[1]
    columns = 128 if hidden % 256 == 0 else 64  # of each warpgroup
    across = COMPUTE * columns
    tiles = (expert_T.shape[0], hidden // across)
    turned = ((across, DEPTH), lambda step: (0, step))
    straight = ((DEPTH, across), lambda step: (step, 0))
    specs = (((ROWS, DEPTH), lambda step: (0, step)), turned if transposed else straight)
    pipeline = partial(_pipeline, x_RD.shape[1] // DEPTH, specs)

    def body(operands, out_smem):
        me = lax.axis_index("wg")
        mine = pl.ds(me * columns, columns)

        def multiply(_, x_smem, w_smem, sum_ref):
            w_mine = w_smem.at[:, mine]
            if transposed:
                w_mine = w_smem.at[mine, :].transpose((1, 0))
            plgpu.wgmma(sum_ref, x_smem, w_mine)
            plgpu.wgmma_wait(0)
            return sum_ref

        @plgpu.nd_loop((tiles[0] * tiles[1],), collective_axes="sm")
        def _(loop):
            tile, column = plgpu.planar_snake(loop.index[0], tiles, 0, WIDE)
            start, first, count = block_T[tile] * ROWS, first_T[tile], count_T[tile]

            def copy(part_smem, row, part):
                there = pl.ds(column * across + me * columns + part, DEPTH)
                low, high = (jnp.clip(n - row, 0, DEPTH) for n in (first, first + count))
                _copy_rows(part_smem, out_RF.at[pl.ds(start + row, DEPTH), there], low, high)

            @pl.when(count > 0)
            def _():
                w_E, wide = w.at[expert_T[tile]], pl.ds(column * across, across)
                w_tile = w_E.at[wide, :] if transposed else w_E.at[:, wide]
                store = _sum_and_store((ROWS, columns), out_smem.at[me], copy)
                x_tile = x_RD.at[pl.ds(start, ROWS), :]
                pipeline(multiply, store)(x_tile, w_tile, allocations=operands)

    _with_shared_memory(body, pipeline, (x_RD, w.at[0]), out_RF.dtype)


def _copy_rows(part_smem, out, low, high) -> None:
    """Rows low .. high of a part to the same of `out`: in runs of 64, 32, ... 1."""
    count, run = high - low, DEPTH
    while run:

        @pl.when(count & run != 0)
        def _(run=run, low=low):
            here = pl.ds(low, run)
            plgpu.copy_smem_to_gmem(part_smem.at[here], out.at[here], commit_group=False)

        low += count & run
        run //= 2
    plgpu.commit_smem_to_gmem_group()


# ---- rows times rows ---------------------------------------------------------------------------


def rows_times_rows(x_RD: jax.Array, g_RF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """out_EDF: of each expert, the sum over its rows of x[r, :, None] * g[r, None, :].

    Rows of no expert may hold anything in x, but must be finite in g. Sizes as above.
    """
    ends_E = jnp.cumsum(sizes_E).astype(jnp.int32)
    starts_E = ends_E - sizes_E.astype(jnp.int32)
    shape = (sizes_E.shape[0], x_RD.shape[1], g_RF.shape[1])
    launch = _launch("rows_times_rows", _rows_times_rows, shape, x_RD.dtype)
    out_EDF = launch(starts_E, ends_E, x_RD, g_RF)
    return jnp.where(sizes_E[:, None, None] > 0, out_EDF, 0)


def _rows_times_rows(start_E, end_E, x_RD, g_RF, out_EDF) -> None:
    experts, width, hidden = out_EDF.shape
    tall = 128 if width % 256 == 0 else 64  # of each warpgroup
    both, across = COMPUTE * tall, 128
    tiles = (width // both, hidden // across)

    def pipeline(steps, block, *does):
        specs = (
            ((DEPTH, both), lambda step: (block + step, 0)),
            ((DEPTH, across), lambda step: (block + step, 0)),
        )
        return _pipeline(steps, specs, *does)

    def body(operands, out_smem):
        me = lax.axis_index("wg")
        mine = pl.ds(me * tall, tall)

        @plgpu.nd_loop((experts, tiles[0] * tiles[1]), collective_axes="sm")
        def _(loop):
            expert = loop.index[0]
            row, column = plgpu.planar_snake(loop.index[1], tiles, 0, WIDE)
            start, end = start_E[expert], end_E[expert]
            block = start // DEPTH

            def multiply(index, x_smem, g_smem, sum_ref):
                x_mine, first = x_smem.at[:, mine], (block + index[0]) * DEPTH
                _clear_others(x_mine, start - first, end - first)
                plgpu.wgmma(sum_ref, x_mine.transpose((1, 0)), g_smem)
                plgpu.wgmma_wait(0)
                return sum_ref

            def copy(part_smem, part_row, part_column):
                rows = pl.ds(row * both + me * tall + part_row, DEPTH)
                columns = pl.ds(column * across + part_column, DEPTH)
                plgpu.copy_smem_to_gmem(part_smem, out_EDF.at[expert, rows, columns])

            @pl.when(end > start)
            def _():
                store = _sum_and_store((tall, across), out_smem.at[me], copy)
                x_tile = x_RD.at[:, pl.ds(row * both, both)]
                g_tile = g_RF.at[:, pl.ds(column * across, across)]
                steps = (end + DEPTH - 1) // DEPTH - block
                pipeline(steps, block, multiply, store)(x_tile, g_tile, allocations=operands)

    some = partial(pipeline, x_RD.shape[0] // DEPTH, 0)
    _with_shared_memory(body, some, (x_RD, g_RF), out_EDF.dtype)


def _clear_others(x_smem, start, end) -> None:
    """Zeros instead of the rows of a tile before `start` and from `end` on, if there are any."""

    @pl.when((start > 0) | (end < DEPTH))
    def _():
        numbers = plgpu.broadcasted_iota(jnp.int32, x_smem.shape, 0, layout=plgpu.Layout.WGMMA)
        own = (numbers >= start) & (numbers < end)
        x_smem[...] = jnp.where(own, x_smem[...], jnp.zeros_like(own, x_smem.dtype))
        plgpu.commit_smem()


# ---- what both have ----------------------------------------------------------------------------


def _multiprocessors() -> int:
    """Those of a GPU of the mesh in use."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.num_cores if device is not None else jax.devices()[0].core_count


def _launch(name: str, kernel, shape: tuple[int, ...], dtype: jnp.dtype):
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(_multiprocessors(),),
        grid_names=("sm",),
        num_threads=COMPUTE + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )


def _layout(rows: int):
    return (plgpu.TilingTransform((rows, DEPTH)), plgpu.SwizzleTransform(128))


def _pipeline(steps, specs, multiply, store):
    """One warpgroup loads what `specs` (shape, place of a step) say; two do `store`.

    Args:
      store: is given a function that calls `multiply` with the tiles of each step.
    """
    # Without delay_release: the next tile's first operands would not wait for this one's last.
    spec = partial(plgpu.BlockSpec, transforms=_layout(8))
    return plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(steps,),
        memory_registers=40,
        in_specs=[spec(*one) for one in specs],
        wg_axis="wg",
        num_compute_wgs=COMPUTE,
        max_concurrent_steps=STAGES,
        compute_context=store,
    )


def _with_shared_memory(body, pipeline, operands, dtype: jnp.dtype) -> None:
    """body(tiles of the operands, two parts of the result for each warpgroup that multiplies)."""
    nothing = pipeline(lambda *_: None, lambda *_: None)
    pl.run_scoped(
        body,
        nothing.get_allocations(*operands),
        plgpu.SMEM((COMPUTE, 2, DEPTH, DEPTH), dtype, transforms=_layout(1)),
        collective_axes="wg",
    )
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _sum_and_store(shape: tuple[int, int], mine_smem, copy):
    """The `store` of a pipeline whose steps add to one sum.

    Its parts of DEPTH x DEPTH leave by way of two places in shared memory, by copy(place, row,
    column), which is one group of copies.
    """

    def store(run):
        @partial(pl.run_scoped, sum_ref=plgpu.ACC(shape, jnp.float32))
        def _(sum_ref):
            run(sum_ref)
            done = sum_ref[...].astype(mine_smem.dtype)
            parts = itertools.product(range(0, shape[0], DEPTH), range(0, shape[1], DEPTH))
            for number, (row, column) in enumerate(parts):
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                place = mine_smem.at[number % 2]
                place[...] = done[row : row + DEPTH, column : column + DEPTH]
                plgpu.commit_smem()
                copy(place, row, column)

    return store


grouped_matmul = differentiable(rows_times_matrix, rows_times_rows, finite=True)
