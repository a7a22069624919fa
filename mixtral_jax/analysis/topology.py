"""TPU slices that are not there: libtpu's descriptions of them, and the links of their devices."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from mixtral_jax import sharding
from mixtral_jax.analysis import gpus, torus
from mixtral_jax.analysis.chips import Chip, parse
from mixtral_jax.config import InputError, MeshConfig

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
    """One slice of chips, or several of the same shape."""

    name: str
    """For example v5p:4x4x4, or 2 x v5p:4x4x4."""
    chip: Chip
    devices: tuple[jax.Device, ...]
    priced = True
    """Whether the compiler says what a program takes of time."""

    @property
    def limit(self) -> int:
        """Bytes of one device."""
        return int(self.chip.hbm_bytes)

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.per_chip

    @property
    def shape(self) -> tuple[int, ...]:
        """Chips along each axis of the torus."""
        return tuple(1 + max(places) for places in zip(*(d.coords for d in self.devices)))

    def links(self, devices: Sequence[jax.Device]) -> list[tuple[int, int]]:
        """For each torus axis along which a group of devices extends, (chips, links a chip has).

        Of a group in several slices, those within a slice.
        """
        return torus.links_of([device.coords for device in devices], self.shape, self.chip)


def slices_of(devices: Sequence[jax.Device]) -> int:
    """The number of slices that a group of devices lies in."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def get_slice(name: str, slices: int = 1) -> Slice:
    """The slice of a name such as v5p:4x4x4, or several, of which libtpu knows a description.

    Call it before the first use of a device: JAX is told to look for no TPU.

    Raises:
      InputError: if libtpu is not installed, or knows no slice of that name.
    """
    chip = parse(name).chip
    if slices < 1:
        raise InputError(f"--slices {slices} must be at least 1")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu, which compiles for TPUs, is not installed: "
            "pip install -r requirements-tpu.txt (no TPU is needed)"
        )
    shown = name if slices == 1 else f"{slices} x {name}"
    return Slice(shown, chip, tuple(get_devices(name, slices)))


def get_devices(name: str, slices: int) -> list[jax.Device]:
    """Descriptions of the devices of some slices, to make a mesh of and compile for.

    Raises:
      InputError: if libtpu knows no slice of that name.
    """
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    options = {"num_slices": slices} if slices > 1 else {}
    if name.startswith("v4:"):  # otherwise a device is one of a chip's two cores
        options["chip_config_name"] = "megacore"
    if set(parse(name).shape) == {1}:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return list(topologies.get_topology_desc(name, platform="tpu", **options).devices)
    except Exception as error:  # whatever libtpu raises
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name!r} is not a slice: {reason}") from None


def get_target(name: str, slices: int) -> Slice | gpus.Host:
    """What a name says, of TPUs (v5p:4x4x4) or of GPUs of one host (h200:8).

    Raises:
      InputError: as get_slice and gpus.get_host, or for several hosts.
    """
    if not gpus.names(name):
        return get_slice(name, slices)
    if slices != 1:
        raise InputError(f"--slices {slices} is for TPUs: {name} are GPUs of one host")
    return gpus.get_host(name)


def make_mesh(config: MeshConfig, target: Slice | gpus.Host) -> jax.sharding.Mesh:
    """A config's mesh over all the devices of a slice, or of a host.

    Raises:
      InputError: if it has more or fewer devices.
    """
    if config.size != len(target.devices):
        raise InputError(
            f"the mesh has {config.size} devices and {target.name} has {len(target.devices)}: set "
            "mesh.data, mesh.fsdp, mesh.expert and mesh.tensor so that their product is "
            f"{len(target.devices)}"
        )
    sizes = (config.data, config.fsdp, config.expert, config.tensor)
    return sharding.make_mesh(*sizes, devices=target.devices)
