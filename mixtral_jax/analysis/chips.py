"""TPU chips and slices in figures: what Google publishes, and what its compiler takes for them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from mixtral_jax.config import InputError
from mixtral_jax.model.flops import PEAK_FLOPS


@dataclass(frozen=True)
class Chip:
    """What one device has: a chip, or on TPU7x one of a chip's two halves.

    Source: the pages of each version in cloud.google.com/tpu/docs. They give the interconnect per
    chip and in both directions together; a chip has two links along each axis of the torus, so a
    link carries, one way, a fourth of that over the number of axes. The data-centre network is the
    network card of a host over its chips, one way (v4 and v5e: the scaling book of jax-ml).
    """

    device_kind: str
    """As JAX calls it."""
    hbm_bytes: float
    hbm_bytes_per_second: float
    interconnect_bytes_per_second: float
    """Of all links, both directions added up."""
    torus_axes: int
    wraps_at: int
    """An axis of a slice is a ring if its length is a multiple of this; otherwise it is a line."""
    network_bytes_per_second: float
    """To other slices."""
    pod_chips: int
    """The most that a slice has."""
    priced_flops: float
    """FLOP/s at which the compiler's estimate prices a bfloat16 product (large and dense)."""
    priced_bytes: float
    """Bytes/s of memory at which it prices an elementwise operation."""
    per_chip: int = 1
    """Devices that a chip counts as."""

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s."""
        return PEAK_FLOPS[self.device_kind]

    @property
    def link_bytes_per_second(self) -> float:
        """Of one link in one direction."""
        return self.interconnect_bytes_per_second / (4 * self.torus_axes)

    def links(self, chips: int, length: int) -> int:
        """Of one chip along a torus axis of this length, to so many chips of a group.

        Two along an axis that the group fills and that is a ring; along a line, where all that
        reaches the chip at its end comes over one link, one.
        """
        return 2 if chips == length > 2 and length % self.wraps_at == 0 else 1


GIB = 2**30
CHIPS = {
    "v4": Chip("TPU v4", 32 * GIB, 1228e9, 600e9, 3, 4, 6.25e9, 4096, 254.2e12, 982e9),
    "v5e": Chip("TPU v5 lite", 16 * GIB, 819e9, 400e9, 2, 16, 3.125e9, 256, 184.9e12, 738e9),
    "v5p": Chip("TPU v5", 95 * GIB, 2765e9, 1200e9, 3, 4, 6.25e9, 8960, 394.0e12, 2350e9),
    "v6e": Chip("TPU v6 lite", 32 * GIB, 1640e9, 800e9, 2, 16, 12.5e9, 256, 918.0e12, 1638e9),
    "tpu7x": Chip(
        "TPU7x", 96 * GIB, 3690e9, 600e9, 3, 4, 6.25e9, 9216, 996.0e12, 3686e9, per_chip=2
    ),
}


class SliceName(NamedTuple):
    """What the name of a slice says: v5p:4x4x4."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each axis of the torus."""

    @property
    def devices(self) -> int:
        return math.prod(self.shape) * self.chip.per_chip


def parse(name: str) -> SliceName:
    """What a slice's name says, whether there is such a slice or not.

    Raises:
      InputError: if it names no chip and shape.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", shape):
        raise InputError(
            f"{name!r} must look like v5p:4x4x4, with one of {', '.join(CHIPS)}, or like h200:1"
        )
    chip, sizes = CHIPS[kind], tuple(int(n) for n in shape.split("x"))
    if len(sizes) != chip.torus_axes:
        example = "x".join(["4"] * chip.torus_axes)
        raise InputError(f"{name!r} has {len(sizes)} axes and {kind} {chip.torus_axes}: {example}")
    return SliceName(chip, sizes)


def parse_real(name: str) -> SliceName:
    """What a slice's name says, if hosts and pods can make up such a slice.

    Raises:
      InputError: as parse, or if they cannot.
    """
    target = parse(name)
    (x, y, *_), chips, most = target.shape, math.prod(target.shape), target.chip.pod_chips
    if chips > most:
        raise InputError(f"{name!r} is not a slice: it has {chips:,} chips, and a pod {most:,}")
    if chips > 1 and (x % 2 or y % 2):
        raise InputError(
            f"{name!r} is not a slice: a host has 2 x 2 chips, so the first two axes must be even"
        )
    return target
