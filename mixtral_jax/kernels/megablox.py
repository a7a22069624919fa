"""The grouped matrix product by JAX's megablox kernels for TPU."""

from __future__ import annotations

from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from mixtral_jax import kernels
from mixtral_jax.kernels import block_of, device_kind
from mixtral_jax.kernels.differentiable import differentiable

LANES = 128  # every tile is a multiple of it
TILES = (512, 1024, 1024)
"""Rows, width and hidden size of the largest tile. Two of each operand and a float32 sum fit into
16 MiB, and their arithmetic outlasts their loading on v5p (342 FLOPs a byte; the chip has 166)."""
TILES_OF = {"TPU v6 lite": (1024, 1024, 2048), "TPU7x": (1024, 1024, 2048)}
"""Of chips that give a kernel 32 MiB; v6e has 560 FLOPs a byte, and these tiles 683."""


def fits(width: int, hidden: int) -> bool:
    """Whether the kernels take matrices [width, hidden]; rows they want in multiples of LANES."""
    return width % LANES == hidden % LANES == 0


def _tiles(rows: int, width: int, hidden: int, experts: int) -> tuple[int, int, int]:
    """The tile for rows [rows, width] and matrices [width, hidden].

    A tile that two experts share is worked on for both: no taller than half an expert's rows.
    """
    height, *most = TILES_OF.get(device_kind(), TILES)
    while height > LANES and height * 2 * experts > rows:
        height //= 2
    return block_of(rows, height), block_of(width, most[0]), block_of(hidden, most[1])


def rows_times_matrix(x_RD, w, group_sizes_E, transposed: bool):
    """out_RF; w is [E, D, F], or [E, F, D] if transposed. Past the last group, anything."""
    rows, width = x_RD.shape
    hidden = w.shape[1 if transposed else 2]
    return gmm(
        x_RD,
        w,
        group_sizes_E,
        x_RD.dtype,
        _tiles(rows, width, hidden, w.shape[0]),
        transpose_rhs=transposed,
        interpret=kernels.interpret(),
    )


def rows_times_rows(left_RD, right_RF, group_sizes_E):
    """out_EDF: of each expert, the sum over its rows of left[r, :, None] * right[r, None, :]."""
    sizes = left_RD.shape[0], left_RD.shape[1], right_RF.shape[1], group_sizes_E.shape[0]
    return tgmm(
        left_RD.T,
        right_RF,
        group_sizes_E,
        left_RD.dtype,
        _tiles(*sizes),
        interpret=kernels.interpret(),
    )


grouped_matmul = differentiable(rows_times_matrix, rows_times_rows)
