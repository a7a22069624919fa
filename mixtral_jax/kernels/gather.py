"""Whole again what is split over a mesh axis."""

from __future__ import annotations

import jax
from jax import lax

from mixtral_jax.kernels import platform

STAGED_FROM = 32
FIRST_STAGE = 4
"""On TPU an axis of at least STAGED_FROM devices is gathered in two stages, FIRST_STAGE neighbours
first. Over all axes of a torus at once XLA makes a gather of zeros and an all-reduce, which sends
twice the bytes and passes over the whole array four times; of its gradient likewise."""


def all_gather(x: jax.Array, axis_name: str, axis: int) -> jax.Array:
    """x of every device along a mesh axis, joined along a dimension in the devices' order.

    Inside shard_map. The gradient is a reduce-scatter.
    """
    size = lax.axis_size(axis_name)
    if size == 1:
        return x  # XLA:CPU would copy it
    if platform() != "tpu":
        return lax.all_gather(x, axis_name, axis=axis, tiled=True)
    if axis == x.ndim - 1:  # else a part ends within a row of 128 lanes, and is copied
        return all_gather(x.swapaxes(axis - 1, axis), axis_name, axis - 1).swapaxes(axis - 1, axis)
    if size < STAGED_FROM or size % FIRST_STAGE:
        return lax.all_gather(x, axis_name, axis=axis, tiled=True)
    devices = range(size)
    near = [list(devices[i : i + FIRST_STAGE]) for i in devices[::FIRST_STAGE]]
    far = [list(devices[i::FIRST_STAGE]) for i in range(FIRST_STAGE)]
    for groups in (near, far):
        x = lax.all_gather(x, axis_name, axis=axis, tiled=True, axis_index_groups=groups)
    return x
