"""TPU slices that are not there: their chips, with the figures that Google publishes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from mixtral_jax import sharding
from mixtral_jax.config import InputError, MeshConfig
from mixtral_jax.model.flops import peak_flops


@dataclass(frozen=True)
class Chip:
    """What one chip has, beside the arithmetic that model/flops.py holds.

    Source: the pages "TPU v5e", "TPU v5p" and "TPU v6e" of cloud.google.com/tpu/docs. They give the
    interconnect per chip and in both directions together; a chip has two links along each axis of
    the torus, so a link carries, one way, a fourth of that over the number of axes.
    """

    hbm_bytes: float
    hbm_bytes_per_second: float
    interconnect_bytes_per_second: float
    """Of all links of a chip, both directions added up."""
    torus_axes: int
    priced_flops: float
    """FLOP/s at which the compiler's estimate prices a bfloat16 product (large and dense)."""
    priced_bytes: float
    """Bytes/s of memory at which it prices an elementwise operation."""
    wraps_at: int
    """An axis of a slice is a ring if its length is a multiple of this; otherwise it is a line."""

    @property
    def link_bytes_per_second(self) -> float:
        """Of one link in one direction."""
        return self.interconnect_bytes_per_second / (4 * self.torus_axes)


CHIPS = {
    "v5e": Chip(16 * 2**30, 819e9, 400e9, 2, 184.9e12, 737.7e9, wraps_at=16),
    "v5p": Chip(95 * 2**30, 2765e9, 1200e9, 3, 394.0e12, 2350e9, wraps_at=4),
    "v6e": Chip(32 * 2**30, 1640e9, 800e9, 2, 918.0e12, 1638e9, wraps_at=16),
}

# What libtpu would otherwise look for on a TPU VM, and complain in many lines that it is not there.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # any: the slice is described apart from it
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # another process may compile too
}


@dataclass(frozen=True)
class Slice:
    """A slice of chips, each of which is one device."""

    name: str
    """For example v5p:4x4x4."""
    chip: Chip
    devices: tuple[jax.Device, ...]

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s of one chip."""
        return peak_flops(self.devices[0].device_kind)

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis of the torus."""
        return tuple(1 + max(places) for places in zip(*(d.coords for d in self.devices)))

    def links(self, devices: Sequence[jax.Device]) -> list[tuple[int, int]]:
        """For each torus axis along which a group of devices extends, (chips, links a chip has).

        A chip has two links along an axis that the group fills and that is a ring; along a line,
        where all that reaches the chip at its end comes over one link, one.
        """
        extents = [len(set(places)) for places in zip(*(d.coords for d in devices))]
        return [
            (chips, 2 if chips == length > 2 and length % self.chip.wraps_at == 0 else 1)
            for chips, length in zip(extents, self.shape)
            if chips > 1
        ]


def get_slice(name: str) -> Slice:
    """The slice of a name such as v5p:4x4x4, of which libtpu knows a description.

    Call it before the first use of a device: JAX is told to look for no TPU.

    Raises:
      InputError: if libtpu is not installed, or knows no slice of that name.
    """
    kind = name.partition(":")[0]
    if kind not in CHIPS or ":" not in name:
        raise InputError(
            f"--compile-only {name!r} must look like v5p:4x4x4, with one of {', '.join(CHIPS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu, which compiles for TPUs, is not installed: "
            "pip install -r requirements-tpu.txt (no TPU is needed)"
        )
    return Slice(name, CHIPS[kind], tuple(get_devices(name)))


def get_devices(name: str) -> list[jax.Device]:
    """Descriptions of a slice's devices, to make a mesh of and compile for.

    Raises:
      InputError: if libtpu knows no slice of that name.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # whatever libtpu raises
        reason = str(error).partition("\n")[0]
        raise InputError(f"--compile-only {name!r} is not a slice: {reason}") from None


def make_mesh(config: MeshConfig, target: Slice) -> jax.sharding.Mesh:
    """A config's mesh over all the chips of a slice.

    Raises:
      InputError: if it has more or fewer devices than the slice.
    """
    if config.size != len(target.devices):
        raise InputError(
            f"the mesh has {config.size} devices and {target.name} has {len(target.devices)} "
            "chips: set mesh.data, mesh.fsdp, mesh.expert and mesh.tensor so that their product "
            f"is {len(target.devices)}"
        )
    sizes = (config.data, config.fsdp, config.expert, config.tensor)
    return sharding.make_mesh(*sizes, devices=target.devices)
