"""Rows to the devices that own their experts, and back.

Called inside shard_map, where each device holds rows for all E experts and owns e = E / X of them,
X being the devices along the expert axis. `plan` lays out a send buffer in which the rows of one
expert lie together; `send` delivers each row to its expert's owner, where rows arrive sorted by
local expert, ready for a grouped matmul; `send_back` returns results to the rows' places in the
send buffer. Three bodies, one meaning:

  local   X = 1: nothing moves.
  padded  jax.lax.all_to_all of X equal buckets, each large enough for the worst case; any platform.
  ragged  jax.lax.ragged_all_to_all of just the rows in use; TPU and GPU.

Buffers hold the worst case, so that no row is ever dropped, unless `make` gets a receive_factor:
then `plan` says how many rows of each expert still go (`kept_E`), the same on all devices. Of the
runs that go to a full device (one a source and expert) the longest are cut at their ends, all to
one length: the shortest lose nothing. Dropping for a capacity has happened before, in the choice of
rows to send.

Everything that moves rows within a device is a segment map: P runs of consecutive rows with a start
in one buffer, a start in another and a length.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import platform, vary_like

IMPLEMENTATIONS = ("local", "padded", "ragged")
PLATFORMS = {
    "local": ("cpu", "gpu", "tpu"),
    "padded": ("cpu", "gpu", "tpu"),
    "ragged": ("gpu", "tpu"),
}


def resolve(implementation: str | None, expert_shards: int) -> str:
    """The body to use: the one asked for, or the platform's best.

    Raises:
      ValueError: if the one asked for cannot run on this platform or mesh.
    """
    here = platform()
    if not implementation:
        if expert_shards == 1:
            return "local"
        return "padded" if here == "cpu" else "ragged"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"exchange={implementation!r} is not one of {IMPLEMENTATIONS}")
    if here not in PLATFORMS[implementation]:
        raise ValueError(
            f"exchange={implementation} does not run on {here} (only on "
            f"{' and '.join(PLATFORMS[implementation])}): use padded, or leave it empty"
        )
    if implementation == "local" and expert_shards > 1:
        raise ValueError(
            f"exchange=local cannot reach experts on {expert_shards} devices: use padded or ragged"
        )
    return implementation


# ---- moving rows within a device ---------------------------------------------------------------


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
    return _rows_at(g_RD, inverse_CS).sum(axis=0), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def _starts(sizes, axis: int = -1):
    """Where each run begins when runs lie one after another."""
    return jnp.cumsum(sizes, axis=axis) - sizes


# ---- the exchange ------------------------------------------------------------------------------


class Plan(NamedTuple):
    """Where the rows of one exchange lie, here and on the other devices."""

    kept_E: jax.Array
    """Rows that go to each expert; fewer than were asked for if its device has no room."""
    offsets_E: jax.Array
    """First row of each expert's rows in the send buffer."""
    group_sizes_e: jax.Array
    """Rows received for each local expert."""
    sort_index_R: jax.Array | None
    """For each row sorted by local expert, its place in the receive buffer."""
    sort_inverse_R: jax.Array | None
    """For each place in the receive buffer, its row sorted by local expert."""
    sizes_XX: jax.Array | None
    """Rows that device s sends to device d, at [s, d]; only for ragged."""


class Exchange(NamedTuple):
    """What an exchange is, apart from its data: all static. Made by `make`."""

    implementation: str
    """local, padded or ragged."""
    axis: str
    """The mesh axis that experts are spread over."""
    shards: int
    """Devices along it (X)."""
    bucket_rows: int
    """The most rows that one device can send to one device."""
    send_rows: int
    """Rows of the send buffer."""
    receive_rows: int
    """Rows of the receive buffer."""
    bounded: bool
    """Whether that is less than the worst case, so that rows may have to stay behind."""


def make(
    implementation: str,
    axis: str,
    shards: int,
    *,
    tokens: int,
    experts: int,
    per_token: int,
    capacity: int | None = None,
    receive_factor: float | None = None,
) -> Exchange:
    """Size the buffers of an exchange.

    Args:
      implementation: a resolved name.
      axis: mesh axis of the experts; shards: devices along it, which divides experts.
      tokens: tokens on this device; each goes to per_token distinct experts.
      capacity: the most rows that this device sends to one expert; None is unbounded.
      receive_factor: room for rows received, over the tokens * per_token that balanced experts
        bring; of `padded` in each bucket. None is room for the worst case.
    """
    per_expert = tokens if capacity is None else min(capacity, tokens)
    local = experts // shards
    total = min(tokens * per_token, experts * per_expert)
    if implementation == "local":
        return Exchange(implementation, axis, shards, total, total, total, False)
    worst = min(tokens * min(per_token, local), local * per_expert)
    balanced = tokens * per_token * (receive_factor or 0)
    if implementation == "padded":
        bucket = worst
        if receive_factor is not None:
            bucket = min(worst, math.ceil(balanced / shards))
        rows = shards * bucket
        return Exchange(implementation, axis, shards, bucket, rows, rows, bucket < worst)
    rows = shards * worst
    if receive_factor is not None:  # a multiple of 128, which kernels for TPU want
        rows = min(rows, 128 * math.ceil(balanced / 128))
    return Exchange(implementation, axis, shards, worst, total, rows, rows < shards * worst)


def _limit(exchange: Exchange, counts_XXe: jax.Array) -> jax.Array:
    """The rows [from, to, local expert] that fit: min(count, most), most as large as it can be."""
    per_bucket = exchange.implementation == "padded"
    room = exchange.bucket_rows if per_bucket else exchange.receive_rows
    over = 2 if per_bucket else (0, 2)  # what shares the room
    bits = room.bit_length()

    def longer(i, most):
        tried = most | (1 << (bits - 1 - i))
        rows = jnp.minimum(counts_XXe, tried).sum(axis=over, keepdims=True)
        return jnp.where(rows <= room, tried, most)

    none = jnp.zeros_like(counts_XXe.sum(axis=over, keepdims=True))
    return jnp.minimum(counts_XXe, lax.fori_loop(0, bits, longer, none))


def plan(exchange: Exchange, counts_E: jax.Array) -> Plan:
    """Lay out one exchange of counts_E (int32) rows from this device to each expert."""
    if exchange.implementation == "local":
        return Plan(counts_E, _starts(counts_E), counts_E, None, None, None)
    shards, num_local = exchange.shards, counts_E.shape[0] // exchange.shards
    me = lax.axis_index(exchange.axis)
    counts_XXe = lax.all_gather(counts_E, exchange.axis).reshape(shards, shards, num_local)
    if exchange.bounded:
        counts_XXe = _limit(exchange, counts_XXe)
        counts_E = lax.dynamic_index_in_dim(counts_XXe, me, keepdims=False).reshape(-1)
    received_Xe = lax.dynamic_index_in_dim(counts_XXe, me, axis=1, keepdims=False)
    sizes_XX = counts_XXe.sum(axis=2)

    # Rows arrive by source, and by local expert within a source; they leave sorted by expert.
    if exchange.implementation == "padded":
        bucket = jnp.arange(shards, dtype=jnp.int32)[:, None] * exchange.bucket_rows
        arrive_Xe = bucket + _starts(received_Xe)
        offsets_E = (bucket + _starts(counts_E.reshape(shards, num_local))).reshape(-1)
    else:
        arrive_Xe = _starts(received_Xe.reshape(-1)).reshape(shards, num_local)
        offsets_E = _starts(counts_E)
    sorted_Xe = _starts(received_Xe.T.reshape(-1)).reshape(num_local, shards).T

    runs = (sorted_Xe.reshape(-1), arrive_Xe.reshape(-1), received_Xe.reshape(-1))
    num_rows = exchange.receive_rows
    sort_index_R = segment_map(*runs, num_rows, num_rows)
    sort_inverse_R = segment_map(runs[1], runs[0], runs[2], num_rows, num_rows)
    group_sizes_e = received_Xe.sum(axis=0)
    return Plan(counts_E, offsets_E, group_sizes_e, sort_index_R, sort_inverse_R, sizes_XX)


def _all_to_all(exchange: Exchange, rows_RD):
    buckets_XRD = rows_RD.reshape(exchange.shards, exchange.bucket_rows, -1)
    out = lax.all_to_all(buckets_XRD, exchange.axis, split_axis=0, concat_axis=0)
    return out.reshape(rows_RD.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _ragged_all_to_all(axis: str, rows_RD, sizes_XX, num_rows: int):
    """Send sizes_XX[me, d] consecutive rows to each d; they arrive in order of their sources.

    Rows that nobody sends, of the result and of its gradient, are what was there before: no zeros
    are written first, and whoever takes rows from here knows which are in use.
    """
    me = lax.axis_index(axis)
    send_X = lax.dynamic_index_in_dim(sizes_XX, me, axis=0, keepdims=False)
    receive_X = lax.dynamic_index_in_dim(sizes_XX, me, axis=1, keepdims=False)
    land_X = lax.dynamic_index_in_dim(_starts(sizes_XX, axis=0), me, axis=0, keepdims=False)
    out_RD = vary_like(lax.empty((num_rows, rows_RD.shape[1]), rows_RD.dtype), rows_RD)
    return lax.ragged_all_to_all(
        rows_RD, out_RD, _starts(send_X), send_X, land_X, receive_X, axis_name=axis
    )


def _ragged_forward(axis, rows_RD, sizes_XX, num_rows):
    out_RD = _ragged_all_to_all(axis, rows_RD, sizes_XX, num_rows)
    return out_RD, (sizes_XX, rows_RD[:, :0])  # of the rows, their number


def _ragged_backward(axis, _, residuals, g_RD):
    sizes_XX, rows_R0 = residuals
    return _ragged_all_to_all(axis, g_RD, sizes_XX.T, rows_R0.shape[0]), None


_ragged_all_to_all.defvjp(_ragged_forward, _ragged_backward)


def send(exchange: Exchange, plan: Plan, rows_SD: jax.Array) -> jax.Array:
    """Deliver the send buffer; the rows received come sorted by local expert.

    Rows past sum(plan.group_sizes_e) are zeros.
    """
    if exchange.implementation == "local":
        return rows_SD
    if exchange.implementation == "padded":
        received_RD = _all_to_all(exchange, rows_SD)
    else:
        received_RD = _ragged_all_to_all(
            exchange.axis, rows_SD, plan.sizes_XX, exchange.receive_rows
        )
    return take_rows(received_RD, plan.sort_index_R, plan.sort_inverse_R[None])


def send_back(exchange: Exchange, plan: Plan, rows_RD: jax.Array) -> jax.Array:
    """The reverse of `send`: results return to their rows' places in the send buffer."""
    if exchange.implementation == "local":
        return rows_RD
    unsorted_RD = take_rows(rows_RD, plan.sort_inverse_R, plan.sort_index_R[None])
    if exchange.implementation == "padded":
        return _all_to_all(exchange, unsorted_RD)
    return _ragged_all_to_all(exchange.axis, unsorted_RD, plan.sizes_XX.T, exchange.send_rows)
