"""Rows moved within a device, by gathers in both directions.

What moves runs of rows is a segment map: P runs of consecutive rows with a start in one buffer, a
start in another and a length.
"""

from __future__ import annotations

import operator
from functools import reduce

import jax
import jax.numpy as jnp

from mixtral_jax.kernels import platform


def segment_map(to_starts_P, from_starts_P, sizes_P, num_rows: int, missing: int) -> jax.Array:
    """For each of num_rows destination rows, the row it comes from, or `missing` if none.

    Segment p fills destination rows to_starts[p] .. to_starts[p] + sizes[p] from from_starts[p]
    on. Segments do not overlap and need no order; empty ones are fine.
    """
    rows_R1 = jnp.arange(num_rows, dtype=jnp.int32)[:, None]
    to_1P, from_1P, sizes_1P = (a[None, :] for a in (to_starts_P, from_starts_P, sizes_P))
    inside_RP = (rows_R1 >= to_1P) & (rows_R1 < to_1P + sizes_1P)
    shift_R = jnp.sum(jnp.where(inside_RP, from_1P - to_1P, 0), axis=1)
    return jnp.where(inside_RP.any(axis=1), rows_R1[:, 0] + shift_R, missing).astype(jnp.int32)


LANES = 128


def _rows_at(x_SD, index):
    """x[index], zeros where index is S; index of any shape.

    A TPU keeps [S, D] in tiles of several rows, of which a gather reads all for each row that it
    takes; of [S, D / 128, 128] every row has tiles of its own, though making that is a copy.
    """
    width = x_SD.shape[1]
    tiled = platform() == "tpu" and width % LANES == 0
    rows = x_SD.reshape(-1, width // LANES, LANES) if tiled else x_SD
    taken = rows.at[index].get(mode="fill", fill_value=0)
    return taken.reshape(*index.shape, width)


@jax.custom_vjp
def take_rows(x_SD: jax.Array, index_R: jax.Array, inverse_CS: jax.Array) -> jax.Array:
    """out[r] = x[index[r]], or zeros where index[r] is S.

    The gradient is a gather too, never a scatter: inverse_CS names, for each row s of x, the at
    most C places r with index[r] = s (R where there is none).
    """
    return _rows_at(x_SD, index_R)


def _take_rows_forward(x_SD, index_R, inverse_CS):
    return take_rows(x_SD, index_R, inverse_CS), inverse_CS


def _take_rows_backward(inverse_CS, g_RD):
    if platform() != "cpu":
        return _rows_at(g_RD, inverse_CS).sum(axis=0), None, None
    taken_CSD = _rows_at(g_RD.astype(jnp.float32), inverse_CS)
    return _added(taken_CSD).astype(g_RD.dtype), None, None


def _added(parts_CTD: jax.Array) -> jax.Array:
    """Their sum, one by one: they are few, and XLA:CPU's sum over so short an axis is slow."""
    return reduce(operator.add, (parts_CTD[c] for c in range(parts_CTD.shape[0])))


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def weighted_sum(weights_TC: jax.Array, parts_CTD: jax.Array) -> jax.Array:
    """out_TD, of each token's C rows times their weights, in the type of the rows."""
    dtype = parts_CTD.dtype
    if platform() != "cpu":
        return jnp.einsum("TC,CTD->TD", weights_TC.astype(dtype), parts_CTD)
    weights_CT1 = weights_TC.astype(dtype).astype(jnp.float32).T[:, :, None]
    return _added(weights_CT1 * parts_CTD.astype(jnp.float32)).astype(dtype)


def starts(sizes):
    """Where each run begins when runs lie one after another, along the last axis."""
    return jnp.cumsum(sizes, axis=-1) - sizes
