"""How the axes of a mesh lie on the torus of a slice, and what its links carry: arithmetic alone.

The model is that of collectives.py, which reads off a compiled program what is sent.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jax.experimental import mesh_utils

from mixtral_jax.analysis.chips import Chip, SliceName
from mixtral_jax.kernels.gather import FIRST_STAGE, STAGED_FROM

Links = list[tuple[int, int]]
"""Of a group of chips, for each axis of the torus that it extends along: (chips, links a chip)."""


@dataclass(frozen=True)
class Place:
    """A device of a slice that is not there: what JAX wants to know of it to lay out a mesh."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int
    device_kind: str
    platform: str = "tpu"


@functools.cache
def lay_out(target: SliceName, sizes: tuple[int, ...]) -> list[Links]:
    """The links of each mesh axis, where sharding.make_mesh lays it on a slice.

    Args:
      target: its devices are as many as the product of the sizes.
      sizes: of the mesh axes within one slice.
    """
    grid = mesh_utils.create_device_mesh(sizes, _places(target), allow_split_physical_axes=True)
    lines = (np.moveaxis(grid, axis, 0).reshape(size, -1)[:, 0] for axis, size in enumerate(sizes))
    return [links_of([place.coords for place in line], target.shape, target.chip) for line in lines]


@functools.cache
def _places(target: SliceName) -> list[Place]:
    x, y, z = (range(n) for n in (*target.shape, 1)[:3])
    cores, kind = range(target.chip.per_chip), target.chip.device_kind
    coords = ((at[::-1], core) for *at, core in itertools.product(z, y, x, cores))
    return [Place(number, tuple(at), core, kind) for number, (at, core) in enumerate(coords)]


def links_of(coords: Sequence[Sequence[int]], shape: Sequence[int], chip: Chip) -> Links:
    """The links of a group of devices at these places of a torus of this shape."""
    extents = [len(set(along)) for along in zip(*coords)]
    return [(n, chip.links(n, length)) for n, length in zip(extents, shape) if n > 1]


def sent_seconds(sent_bytes: float, links: Links, chip: Chip) -> float:
    """For each device of a group to send so much, over all its links in the group at once."""
    if not links:
        return 0.0
    return sent_bytes / (chip.link_bytes_per_second * sum(n for _, n in links))


def gather_seconds(whole_bytes: float, devices: int, links: Links, chip: Chip) -> float:
    """To gather an array on each device of a group, or to sum and scatter it."""
    return sent_seconds(whole_bytes * (devices - 1) / devices, links, chip)


def staged_gather_seconds(whole_bytes: float, devices: int, links: Links, chip: Chip) -> float:
    """The same in two stages, as kernels/gather.py does it over many devices."""
    if devices < STAGED_FROM or devices % FIRST_STAGE or not links:
        return gather_seconds(whole_bytes, devices, links, chip)
    near, far, rest, parts = [], [], FIRST_STAGE, devices // FIRST_STAGE
    for chips, count in reversed(links):  # neighbours lie along the last
        inside = math.gcd(chips, rest)
        rest //= inside
        if inside > 1:
            near.append((inside, count if inside == chips else 1))
        if inside < chips:
            far.append((chips // inside, 1 if inside > 1 else count))
    first = gather_seconds(whole_bytes / parts, FIRST_STAGE, near, chip)
    return first + gather_seconds(whole_bytes, parts, far, chip)


def all_to_all_seconds(buffer_bytes: float, links: Links, chip: Chip) -> float:
    """To send a buffer in equal parts to every device of a group."""
    if not links:
        return 0.0
    return buffer_bytes * max(n / (4 * count) for n, count in links) / chip.link_bytes_per_second


def network_seconds(part_bytes: float, slices: int, chip: Chip) -> float:
    """To sum over slices an array of which each device holds a part."""
    return 2 * part_bytes * (slices - 1) / slices / chip.network_bytes_per_second


def network_gather_seconds(part_bytes: float, slices: int, chip: Chip) -> float:
    """To gather over slices such an array on each device, or to sum and scatter it."""
    return part_bytes * (slices - 1) / chip.network_bytes_per_second
