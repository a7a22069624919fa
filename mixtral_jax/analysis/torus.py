"""How the axes of a mesh lie on the torus of a slice, and what its links carry: arithmetic alone.

The model is that of collectives.py, which reads off a compiled program what is sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mixtral_jax.analysis.chips import Chip, SliceName
from mixtral_jax.kernels.gather import FIRST_STAGE, STAGED_FROM

Links = list[tuple[int, int]]
"""Of a group of chips, for each axis of the torus that it extends along: (chips, links a chip)."""


def lay_out(target: SliceName, sizes: Sequence[int]) -> list[Links]:
    """The links of each mesh axis, as jax.make_mesh lays a mesh on a slice.

    From the last axis to the first, each takes as many whole axes of the torus as make up its
    size, or else parts of them.

    Args:
      target: its chips are as many as the product of the sizes, or half of it where a chip counts
        as two devices: the last mesh axis then has both.
      sizes: of the mesh axes within one slice.
    """
    free, found = list(target.shape), []
    rest = target.chip.per_chip
    for size in reversed(sizes):
        inside = math.gcd(size, rest)
        size, rest = size // inside, rest // inside
        taken = _whole_axes(free, size)
        if taken is None:
            taken = _parts(free, size)
        links = []
        for axis, chips in taken:
            links.append((chips, target.chip.links(chips, target.shape[axis])))
            free[axis] //= chips
        found.append(links)
    return found[::-1]


def fits(target: SliceName, sizes: Sequence[int]) -> bool:
    """Whether mesh axes of these sizes can be laid on a slice's torus, whole axes or parts."""
    laid = lay_out(target, sizes)
    chips = math.prod(chips for links in laid for chips, _ in links)
    return chips * target.chip.per_chip == math.prod(sizes)


def _whole_axes(free: list[int], size: int) -> list[tuple[int, int]] | None:
    """(axis, chips) of the most whole axes whose product is the size."""
    axes = [axis for axis, chips in enumerate(free) if chips > 1]
    for count in range(len(axes), -1, -1):
        for chosen in itertools.combinations(axes, count):
            if math.prod(free[axis] for axis in chosen) == size:
                return [(axis, free[axis]) for axis in chosen]
    return None


def _parts(free: list[int], size: int) -> list[tuple[int, int]]:
    """(axis, chips) of parts of axes whose product is the size, as far as it goes."""
    taken = []
    for axis in sorted(range(len(free)), key=lambda axis: -free[axis]):
        part = math.gcd(free[axis], size)
        if part > 1:
            taken.append((axis, part))
            size //= part
    return taken


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
    *others, (chips, count) = links
    near = [(FIRST_STAGE, count if chips == FIRST_STAGE else 1)]
    left = [(chips // FIRST_STAGE, 1)] if chips > FIRST_STAGE else []
    far, parts = [*others, *left], devices // FIRST_STAGE
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
