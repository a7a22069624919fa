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
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import check_body, device_kind, platform, vary_like
from mixtral_jax.kernels.rows import segment_map, starts, take_rows

PLATFORMS = {
    "local": ("cpu", "gpu", "tpu"),
    "padded": ("cpu", "gpu", "tpu"),
    "ragged": ("gpu", "tpu"),
}
WITHOUT_RAGGED = ("TPU v5 lite",)
"""Chips whose larger slices route in a limited way: their compiler refuses a ragged all-to-all."""


def resolve(implementation: str | None, expert_shards: int) -> str:
    """The body to use: the one asked for, or the platform's best; with one device always local.

    Raises:
      ValueError: if the one asked for cannot run on this platform or mesh.
    """
    here = platform()
    if implementation:
        check_body("exchange", implementation, here, PLATFORMS, instead="padded")
    if expert_shards == 1:
        return "local"
    if not implementation:
        padded = here == "cpu" or device_kind() in WITHOUT_RAGGED
        return "padded" if padded else "ragged"
    if implementation == "local":
        raise ValueError(
            f"exchange=local cannot reach experts on {expert_shards} devices: use padded or ragged"
        )
    return implementation


# ---- the exchange ------------------------------------------------------------------------------


class Slices(NamedTuple):
    """Runs of rows that one ragged all-to-all moves: to each device in turn as many, e, one after
    another."""

    from_E: jax.Array
    """Where they begin here."""
    sizes_E: jax.Array
    to_E: jax.Array
    """Where they begin there."""
    received_E: jax.Array
    """Sizes of the runs that come here, by the device that they come from."""


class Plan(NamedTuple):
    """Where the rows of one exchange lie, here and on the other devices."""

    kept_E: jax.Array
    """Rows that go to each expert; fewer than were asked for if its device has no room."""
    offsets_E: jax.Array
    """First row of each expert's rows in the send buffer."""
    group_sizes_e: jax.Array
    """Rows received for each local expert."""
    sort_index_R: jax.Array | None = None
    """For each row sorted by local expert, its place in the receive buffer; only of `padded`."""
    sort_inverse_R: jax.Array | None = None
    """For each place in the receive buffer, its row sorted by local expert."""
    there: Slices | None = None
    """What `ragged` sends to the experts."""
    back: Slices | None = None
    """And what it sends back."""


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
        return Plan(counts_E, starts(counts_E), counts_E)
    shards, num_local = exchange.shards, counts_E.shape[0] // exchange.shards
    me = lax.axis_index(exchange.axis)
    counts_XXe = lax.all_gather(counts_E, exchange.axis).reshape(shards, shards, num_local)
    if exchange.bounded:
        counts_XXe = _limit(exchange, counts_XXe)
        counts_E = lax.dynamic_index_in_dim(counts_XXe, me, keepdims=False).reshape(-1)
    received_Xe = lax.dynamic_index_in_dim(counts_XXe, me, axis=1, keepdims=False)
    group_sizes_e = received_Xe.sum(axis=0)
    if exchange.implementation == "ragged":
        there, back = _ragged_slices(counts_XXe, me)
        return Plan(counts_E, there.from_E, group_sizes_e, there=there, back=back)

    # Rows arrive by source, and by local expert within a source; they leave sorted by expert.
    bucket_X1 = jnp.arange(shards, dtype=jnp.int32)[:, None] * exchange.bucket_rows
    arrive_Xe = bucket_X1 + starts(received_Xe)
    offsets_E = (bucket_X1 + starts(counts_E.reshape(shards, num_local))).reshape(-1)
    sorted_Xe = starts(received_Xe.T.reshape(-1)).reshape(num_local, shards).T
    runs = (sorted_Xe.reshape(-1), arrive_Xe.reshape(-1), received_Xe.reshape(-1))
    num_rows = exchange.receive_rows
    sort_index_R = segment_map(*runs, num_rows, num_rows)
    sort_inverse_R = segment_map(runs[1], runs[0], runs[2], num_rows, num_rows)
    return Plan(counts_E, offsets_E, group_sizes_e, sort_index_R, sort_inverse_R)


def _ragged_slices(counts_XXe, me) -> tuple[Slices, Slices]:
    """There and back. Each expert's rows are a slice, which lands where the sort would put it."""
    shards = counts_XXe.shape[0]
    sent_XXe = starts(counts_XXe.reshape(shards, -1)).reshape(counts_XXe.shape)
    by_expert_XeX = counts_XXe.transpose(1, 2, 0)
    landed_XeX = starts(by_expert_XeX.reshape(shards, -1)).reshape(by_expert_XeX.shape)
    landed_XXe = landed_XeX.transpose(2, 0, 1)

    def mine(array_XXe, axis):
        return lax.dynamic_index_in_dim(array_XXe, me, axis, keepdims=False).reshape(-1)

    sizes_E, received_E = mine(counts_XXe, 0), mine(counts_XXe, 1)
    there = Slices(mine(sent_XXe, 0), sizes_E, mine(landed_XXe, 0), received_E)
    back = Slices(mine(landed_XXe, 1), received_E, mine(sent_XXe, 1), sizes_E)
    return there, back


def _all_to_all(exchange: Exchange, rows_RD):
    buckets_XRD = rows_RD.reshape(exchange.shards, exchange.bucket_rows, -1)
    out = lax.all_to_all(buckets_XRD, exchange.axis, split_axis=0, concat_axis=0)
    return out.reshape(rows_RD.shape)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ragged_all_to_all(axis: str, num_rows: int, rows_RD, there: Slices, back: Slices):
    """num_rows rows, of which those that someone sends are written.

    The others are what was in memory before, in the gradient as well: no zeros are written first,
    and whoever takes rows from here knows which are in use.
    """
    out_RD = vary_like(lax.empty((num_rows, rows_RD.shape[1]), rows_RD.dtype), rows_RD)
    return lax.ragged_all_to_all(rows_RD, out_RD, *there, axis_name=axis)


def _ragged_forward(axis, num_rows, rows_RD, there, back):
    out_RD = _ragged_all_to_all(axis, num_rows, rows_RD, there, back)
    return out_RD, (rows_RD[:, :0], there, back)  # of the rows, their number


def _ragged_backward(axis, _, residuals, g_RD):
    rows_R0, there, back = residuals
    return _ragged_all_to_all(axis, rows_R0.shape[0], g_RD, back, there), None, None


_ragged_all_to_all.defvjp(_ragged_forward, _ragged_backward)


def send(exchange: Exchange, plan: Plan, rows_SD: jax.Array) -> jax.Array:
    """Deliver the send buffer; the rows received come sorted by local expert.

    Rows past sum(plan.group_sizes_e) may be anything.
    """
    if exchange.implementation == "local":
        return rows_SD
    if exchange.implementation == "ragged":
        rows = exchange.receive_rows
        return _ragged_all_to_all(exchange.axis, rows, rows_SD, plan.there, plan.back)
    received_RD = _all_to_all(exchange, rows_SD)
    return take_rows(received_RD, plan.sort_index_R, plan.sort_inverse_R[None])


def send_back(exchange: Exchange, plan: Plan, rows_RD: jax.Array) -> jax.Array:
    """The reverse of `send`: results return to their rows' places in the send buffer."""
    if exchange.implementation == "local":
        return rows_RD
    if exchange.implementation == "ragged":
        rows = exchange.send_rows
        return _ragged_all_to_all(exchange.axis, rows, rows_RD, plan.back, plan.there)
    unsorted_RD = take_rows(rows_RD, plan.sort_inverse_R, plan.sort_index_R[None])
    return _all_to_all(exchange, unsorted_RD)
