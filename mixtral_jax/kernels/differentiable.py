"""The grouped matrix product with its gradients, of the two kernels that these are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


def differentiable(
    rows_times_matrix: Callable, rows_times_rows: Callable, *, finite: bool = False
) -> Callable:
    """grouped_matmul(x_RD, w_EDF, group_sizes_E, transposed=False, zeros=True) -> out_RF.

    As kernels.grouped_matmul; inside shard_map, its types must not be checked. With `transposed`
    the matrices are given as [E, F, D], and so is their gradient. Without `zeros` rows past the
    last group come out as anything, which saves a pass over the result.

    Args:
      rows_times_matrix: (x_RD, w, sizes_E, transposed) -> out_RF, past the last group anything; w
        is [E, D, F], or [E, F, D] if transposed.
      rows_times_rows: (left_RD, right_RF, sizes_E) -> of each expert, the sum over its rows of
        left[r, :, None] * right[r, None, :].
      finite: rows_times_rows multiplies what lies past the last group in `right` by zero.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(3, 4))
    def grouped_matmul(x_RD, w_EDF, group_sizes_E, transposed=False, zeros=True):
        out_RF = rows_times_matrix(x_RD, w_EDF, group_sizes_E, transposed)
        return _in_use(out_RF, group_sizes_E) if zeros else out_RF

    def forward(x_RD, w_EDF, group_sizes_E, transposed, zeros):
        out_RF = grouped_matmul(x_RD, w_EDF, group_sizes_E, transposed, zeros)
        return out_RF, (x_RD, w_EDF, group_sizes_E)

    def backward(transposed, _, residuals, g_RF):
        x_RD, w_EDF, group_sizes_E = residuals
        if finite:
            g_RF = _in_use(g_RF, group_sizes_E)
        dx_RD = rows_times_matrix(g_RF, w_EDF, group_sizes_E, not transposed)
        left_R, right_R = (g_RF, x_RD) if transposed else (x_RD, g_RF)
        if finite and transposed:
            right_R = _in_use(right_R, group_sizes_E)
        dw_EDF = rows_times_rows(left_R, right_R, group_sizes_E).astype(w_EDF.dtype)
        return _in_use(dx_RD, group_sizes_E), dw_EDF, None

    grouped_matmul.defvjp(forward, backward)
    return grouped_matmul


def _in_use(x_RD: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """x with zeros past the last group."""
    in_use_R = jnp.arange(x_RD.shape[0]) < group_sizes_E.sum()
    return jnp.where(in_use_R[:, None], x_RD, 0)
