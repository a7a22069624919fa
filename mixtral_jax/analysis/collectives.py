"""What a compiled program sends between devices, read from its text, and the time on the links.

The model of the interconnect, for one collective among a group of n devices:

- A device sends (n - 1) / n of the gathered array for all-gather, of the array to be scattered for
  reduce-scatter, twice that for all-reduce, and of its send buffer for all-to-all.
- ragged-all-to-all sends its rows in use, taken to be as evenly spread as a balanced router makes
  them: the smaller of its two buffers, as the larger one is sized for the worst case.
- Links along all torus axes of the group work at once, each at its published rate. The time is the
  bytes over the bandwidth of the links that one device has in the group. Bytes of an all-to-all
  travel several links: along a torus axis of m devices, m / 4 of the bytes of a device's buffer
  pass each of them (m / 8 if the axis is a ring, which has two links a device).
- Between slices each device exchanges its part of an array with its likes, over the data-centre
  network; the compiler has split that off from what happens within the slices.
- Collectives do not share links, and there is no latency.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixtral_jax.analysis import torus
from mixtral_jax.analysis.topology import Slice, slices_of

KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.+?) ([a-z-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_FUSED_SCATTER = "all-reduce-scatter"  # how a computation is named that the TPU runs as one


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str
    """One of KINDS."""
    buffer_bytes: float
    """The whole array on one device: gathered, summed, to be scattered or to be sent."""
    group: tuple[int, ...]
    """The first of its groups of devices, as places in the mesh."""

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends."""
        devices = len(self.group)
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.buffer_bytes
        times = 2 if self.kind == "all-reduce" else 1
        return times * self.buffer_bytes * (devices - 1) / devices

    def seconds(self, target: Slice, mesh_devices: Sequence) -> float:
        """Time on the links of a slice, by the model above."""
        devices = [mesh_devices[place] for place in self.group]
        if slices_of(devices) > 1:
            return self.sent_bytes / target.chip.network_bytes_per_second
        links, chip = target.links(devices), target.chip
        if self.kind.endswith("all-to-all"):
            return torus.all_to_all_seconds(self.buffer_bytes, links, chip)
        if self.kind.startswith("collective"):
            return self.sent_bytes / chip.link_bytes_per_second if links else 0.0
        return torus.sent_seconds(self.sent_bytes, links, chip)


def read_collectives(text: str, devices: int) -> list[Collective]:
    """The collectives of an optimized HLO program, each as often as it is run.

    Those among single devices are left out. One that runs beside other work stands in the text
    where it starts, in each fusion that carries it on, and where it is done: a chain, counted once.

    Args:
      text: what compiled.as_text() gives.
      devices: those that the program runs on.
    """
    sizes, found, computation, chains = {}, [], "", set()
    for line in text.splitlines():
        if heading := _COMPUTATION.match(line):
            computation = heading[1]
        operation = _OPERATION.match(line)
        if not operation:
            continue
        name, shape, opcode, rest = operation.groups()
        sizes[name] = shape_bytes(shape)
        if opcode == "send" and (between := _between_slices(shape, rest, devices)):
            found.append(between)
        kind = opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if chain := re.search(r'chain_id="(\d+)"', rest):
            if chain[1] in chains:
                continue
            chains.add(chain[1])
        group = _first_group(rest, devices)
        buffer = _buffer_bytes(kind, opcode, sizes, name, rest, len(group))
        if kind == "all-reduce" and computation.startswith(_FUSED_SCATTER):
            kind = "reduce-scatter"
        if len(group) > 1:
            found.append(Collective(kind, buffer, group))
    return found


def shape_bytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple, as HLO writes its type."""
    total = 0
    for kind, dimensions in _ARRAY.findall(shape):
        bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
        total += math.prod(int(n) for n in dimensions.split(",") if n) * bits // 8
    return total


def _buffer_bytes(kind, opcode, sizes, name, rest, devices) -> float:
    """The whole array of a collective, from the type of its result."""
    result = sizes[name]
    if opcode == "all-gather-start":  # operands and results together
        return result * devices / (devices + 1)
    if opcode == "collective-permute-start":
        return result / 2
    if kind == "reduce-scatter":
        return result * devices
    if kind == "ragged-all-to-all":
        operand = re.match(r"[^%]*%([\w.-]+)", rest)
        return min(result, sizes.get(operand[1], result)) if operand else result
    return result


def _between_slices(shape: str, rest: str, devices: int) -> Collective | None:
    """What a device exchanges with its like in other slices, which lie one after another.

    Within the slices the compiler has collectives of its own.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', rest)
    numbers = re.search(r'_xla_megascale_target="\{([\d,]+)\}', rest)
    if not kind or not numbers:
        return None
    slices, kind = len(_numbers(numbers[1])), kind[1].lower().replace("_", "-")
    buffer = shape_bytes(shape.partition("}")[0])  # the first of a tuple
    if kind == "all-gather":
        buffer *= slices
    known = kind if kind in KINDS else "collective-permute"
    return Collective(known, buffer, tuple(range(0, devices, devices // slices)))


# ---- groups of devices -------------------------------------------------------------------------


def _first_group(rest: str, devices: int) -> tuple[int, ...]:
    """The first group of the attribute replica_groups; every device where there is none."""
    everyone = tuple(range(devices))
    pair = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    if pair:
        return int(pair[1]), int(pair[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return tuple(int(n) for n in listed[1].split(","))
    reshaped = re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest)
    if reshaped:
        groups = _iota(reshaped[2]).reshape(_numbers(reshaped[1]))
        return tuple(groups[0].tolist())
    mesh = re.search(
        r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\((\[[^)]*\)?)\))? \{([^}]*)\}", rest
    )
    return _mesh_group(*mesh.groups()) if mesh else everyone


def _mesh_group(sizes: str, order: str | None, axes: str) -> tuple[int, ...]:
    """The first group of devices that differ only along some axes of a mesh."""
    shape = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = _iota(order) if order else np.arange(math.prod(shape.values()))
    ids = ids.reshape(list(shape.values()))
    along = re.findall(r"'([^']+)'", axes)
    index = tuple(slice(None) if name in along else 0 for name in shape)
    return tuple(ids[index].reshape(-1).tolist())


def _iota(text: str) -> np.ndarray:
    """Numbers from 0 as HLO writes them: [2,4] or [2,4]T(1,0), flat."""
    shape, _, turned = text.partition("T")
    numbers = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return (numbers.transpose(_numbers(turned)) if turned else numbers).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
