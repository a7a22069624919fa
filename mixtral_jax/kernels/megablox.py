"""The grouped matrix product by JAX's megablox kernels for TPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from mixtral_jax.kernels import device_kind

LANES = 128  # every tile is a multiple of it
TILES = (512, 1024, 1024)
"""Rows, width and hidden size of the largest tile. Two of each operand and a float32 sum fit into
16 MiB, and their arithmetic outlasts their loading on v5p (342 FLOPs a byte; the chip has 166)."""
TILES_OF = {"TPU v6 lite": (1024, 1024, 2048), "TPU7x": (1024, 1024, 2048)}
"""Of chips that give a kernel 32 MiB; v6e has 560 FLOPs a byte, and these tiles 683."""


def fits(width: int, hidden: int) -> bool:
    """Whether the kernels take matrices [width, hidden]; rows they want in multiples of LANES."""
    return width % LANES == hidden % LANES == 0


def _tile(size: int, most: int) -> int:
    """The largest of most, most / 2, ... 128 that divides a multiple of 128."""
    while size % most:
        most //= 2
    return most


def _tiles(rows: int, width: int, hidden: int, experts: int) -> tuple[int, int, int]:
    """The tile for rows [rows, width] and matrices [width, hidden].

    A tile that two experts share is worked on for both: no taller than half an expert's rows.
    """
    height, *most = TILES_OF.get(device_kind(), TILES)
    while height > LANES and height * 2 * experts > rows:
        height //= 2
    return _tile(rows, height), _tile(width, most[0]), _tile(hidden, most[1])


def _rows_times_matrix(x_RD, w, group_sizes_E, transposed: bool, zeros: bool = True):
    """w is [E, D, F], or [E, F, D] if transposed."""
    rows, width = x_RD.shape
    hidden = w.shape[1 if transposed else 2]
    out_RF = gmm(
        x_RD,
        w,
        group_sizes_E,
        x_RD.dtype,
        _tiles(rows, width, hidden, w.shape[0]),
        transpose_rhs=transposed,
        interpret=_interpret(),
    )
    if not zeros:
        return out_RF
    in_use_R = jnp.arange(rows) < group_sizes_E.sum()  # the kernel leaves the others as they were
    return jnp.where(in_use_R[:, None], out_RF, 0)


def _interpret() -> bool:
    """Whether to run as plain JAX: in tests, on CPU."""
    return False


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    transposed: bool = False,
    zeros: bool = True,
) -> jax.Array:
    """As kernels.grouped_matmul; inside shard_map, its types must not be checked.

    With `transposed` the matrices are given as [E, F, D], and so is their gradient. Without `zeros`
    rows past the last group come out as anything, which saves a pass over the result.
    """
    return _rows_times_matrix(x_RD, w_EDF, group_sizes_E, transposed, zeros)


def _forward(x_RD, w_EDF, group_sizes_E, transposed, zeros):
    out_RF = grouped_matmul(x_RD, w_EDF, group_sizes_E, transposed, zeros)
    return out_RF, (x_RD, w_EDF, group_sizes_E)


def _backward(transposed, _, residuals, g_RF):
    x_RD, w_EDF, group_sizes_E = residuals
    dx_RD = _rows_times_matrix(g_RF, w_EDF, group_sizes_E, not transposed)
    left_R, right_R = (g_RF, x_RD) if transposed else (x_RD, g_RF)
    dw_EDF = tgmm(
        left_R.T,
        right_R,
        group_sizes_E,
        w_EDF.dtype,
        _tiles(left_R.shape[0], left_R.shape[1], right_R.shape[1], w_EDF.shape[0]),
        interpret=_interpret(),
    )
    return dx_RD, dw_EDF, None


grouped_matmul.defvjp(_forward, _backward)
