"""NVIDIA GPUs of one host that are not there: XLA compiles for a description of them.

What it tells is memory. It prices no program for GPU, so a report has no estimate of time.
"""

from __future__ import annotations

import importlib.util
import pathlib
import re
import string
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from mixtral_jax import sharding
from mixtral_jax.config import InputError

DESCRIPTION = pathlib.Path(__file__).parent / "hopper.txtpb"
MOST = 8
"""GPUs of a host."""


@dataclass(frozen=True)
class Gpu:
    """What one has; source: NVIDIA's data sheets, and nvidia-smi for the memory."""

    name: str
    """As XLA knows it: with another it chooses other tiles."""
    hbm_bytes: int
    hbm_bytes_per_second: float


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 81_559 * 2**20, 3.35e12),
    "h200": Gpu("NVIDIA H200 141GB HBM3e", 143_771 * 2**20, 4.8e12),
}


@dataclass(frozen=True)
class Host:
    """Some GPUs of one host, as a topology.Slice is some TPUs."""

    name: str
    """For example h200:8."""
    chip: Gpu
    devices: tuple[jax.Device, ...]
    priced = False

    @property
    def chips(self) -> int:
        return len(self.devices)

    @property
    def limit(self) -> int:
        """Bytes of one that JAX may use."""
        return int(sharding.GPU_MEMORY * self.chip.hbm_bytes)


def names(name: str) -> bool:
    """Whether this is the name of GPUs: its kind is one of GPUS."""
    return name.partition(":")[0] in GPUS


def get_host(name: str) -> Host:
    """The GPUs of a name such as h200:8. Call it before the first use of a device.

    Raises:
      InputError: if the name says no number of GPUs, or JAX's plugin for them is not installed.
    """
    kind, _, number = name.partition(":")
    if not re.fullmatch(f"[1-{MOST}]", number):
        raise InputError(f"{name!r} must look like {kind}:{MOST}, with at most {MOST} GPUs")
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise InputError(
            "jax_cuda13_plugin, which compiles for NVIDIA GPUs, is not installed: "
            "pip install -r requirements-gpu.txt (no GPU is needed)"
        )
    jax.config.update("jax_platforms", "cpu")
    return Host(name, GPUS[kind], tuple(get_devices(kind, int(number))))


def get_devices(kind: str, number: int) -> list[jax.Device]:
    """Descriptions of the devices, to make a mesh of and compile for."""
    gpu = GPUS[kind]
    described = string.Template(DESCRIPTION.read_text(encoding="utf-8")).substitute(
        name=gpu.name, memory=gpu.hbm_bytes, bandwidth=int(gpu.hbm_bytes_per_second)
    )
    options = {"topology": f"1x{number}x1", "target_config": described}
    return list(topologies.get_topology_desc("", platform="cuda", **options).devices)
