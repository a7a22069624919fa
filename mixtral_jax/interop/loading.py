"""From files to devices, a tensor at a time.

Each device first gets its empty share of every parameter. Then the tensors are read in the order of
the files, each slice once, by the host whose devices own it, and written into place, where experts
and layers lie stacked. A host holds a few tensors at a time, whatever the model's size.

A CPU's devices have the host's own memory, where the share is written in blocks and then belongs to
the device without a copy. To other devices the slice goes as it lies in the file, and is transposed
there.

One tensor, worked: layers.3.attention.wq.weight of 8x7B in Mistral's form, on fsdp=2 and tensor=2.
Its piece is layer 3 of the parameter wq_DKGH; its entry gives the tensor [4096, 4096] the layout
`KGhp D`. The first device's share has L 0:32, D 0:2048, K 0:4, and G and H whole: a buffer of shape
[32, 2048, 4, 4, 128], where the piece's place is (3,). The tensor is viewed as [K, G, h, p, D] and
cut to those K and D; the pairs p, which RoPE turns together in this form, are brought apart. What
is left, [4, 4, 128, 2048] with the letters KGHD, is transposed by the axes (3, 0, 1, 2) to the
piece's own DKGH, and written to the buffer's [3].
"""

from __future__ import annotations

import collections
import itertools
import math
import mmap
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.interop import quantizing
from mixtral_jax.interop.layout import transposition
from mixtral_jax.interop.names import Piece
from mixtral_jax.interop.quantizing import Part
from mixtral_jax.interop.source import FileWeights
from mixtral_jax.model.mixtral import Mixtral, abstract_state

WORKERS = 4
"""Pieces under way at a time: more than two cores can copy, because some wait for the disk."""
BLOCK = 128
"""Rows that a transposing copy writes at a time: measured in docs/performance.md."""


class Share(NamedTuple):
    """The part of a parameter that some devices of this host hold, all the same."""

    slices: Mapping[str, slice]
    """By letter of the model's layout, L for the layers; with start and stop."""
    devices: tuple[jax.Device, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in self.slices.values())

    def place_of(self, piece: Piece) -> tuple[int, ...] | None:
        """Layer and expert of a piece within the share; None if it lies elsewhere."""
        place = []
        for letter, number in (("L", piece.layer), ("E", piece.expert)):
            if number is not None:
                part = self.slices[letter]
                if not part.start <= number < part.stop:
                    return None
                place.append(number - part.start)
        return tuple(place)

    def rest(self, letters: str) -> dict[str, slice]:
        """The slices of these letters."""
        return {letter: self.slices[letter] for letter in letters}


def load(
    weights: FileWeights,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    progress: Callable[[int], object],
    int8: bool = False,
) -> Mixtral:
    """A model from files, on a mesh.

    Args:
      config: the weights' own, perhaps with other types or exchange.
      progress: called with the number of bytes that this host has read of each piece.
      int8: give what `quantized` would make of the model; each matrix is quantised as it is read.
    """
    graphdef, abstract = (quantizing.abstract_state if int8 else abstract_state)(config)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
    where = {name: sharding.param_shardings(leaf, mesh).get_value() for name, leaf in flat.items()}
    buffers: dict[str, list[Buffer]] = {
        name: [make_buffer(share, leaf.dtype) for share in shares_of(name, leaf.shape, where[name])]
        for name, leaf in flat.items()
    }
    targets = collections.defaultdict(list)  # by parameter, as the files have them
    for name, made in buffers.items():
        part = quantizing.part_of(name)
        targets[part.parameter] += [(part, buffer) for buffer in made]

    def transfer(piece: Piece, following: Piece | None) -> int:
        if following is not None:
            reader.submit(weights.prefetch, following)
        count = 0
        for part, buffer in targets[piece.parameter]:
            place = buffer.share.place_of(piece)
            if place is not None:
                count += _copy(weights, piece, part, buffer, place)
        weights.release(piece)
        return count

    order = list(weights.places)
    later = itertools.chain(order[2 * WORKERS :], itertools.repeat(None))
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(WORKERS) as pool:
        for piece in order[: 2 * WORKERS]:
            reader.submit(weights.prefetch, piece)
        for count in _bounded_map(pool, transfer, zip(order, later)):
            progress(count)
    for name, leaf in flat.items():
        arrays = [array for buffer in buffers.pop(name) for array in buffer.arrays()]
        leaf.set_value(jax.make_array_from_single_device_arrays(leaf.shape, where[name], arrays))
    return nnx.merge(graphdef, abstract)


def _copy(weights: FileWeights, piece: Piece, part: Part, buffer: Buffer, place) -> int:
    """Read what a buffer holds of a piece, write it there, and count the bytes."""
    if part.field:
        letters = part.letters if piece.expert is None else part.letters.replace("E", "")
        array, count = quantizing.read(weights, piece, part, buffer.share.rest(letters))
        buffer.write(place, array, tuple(range(array.ndim)))
        return count
    array, letters = weights.read(piece, slices=buffer.share.rest(piece.letters))
    buffer.write(place, array, transposition(letters, piece.letters))
    return array.nbytes


def _bounded_map(pool: ThreadPoolExecutor, function: Callable, calls: Iterator[tuple]) -> Iterator:
    """Results in order. After an error no further call begins."""
    pending: collections.deque = collections.deque()
    try:
        for call in calls:
            pending.append(pool.submit(function, *call))
            if len(pending) > 2 * WORKERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def shares_of(name: str, shape: tuple[int, ...], where: jax.sharding.Sharding) -> list[Share]:
    """How this host's devices share a parameter, each different share once."""
    letters = quantizing.part_of(name).letters
    letters = letters if len(letters) == len(shape) else "L" + letters
    owners: dict[tuple, list[jax.Device]] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
        owners.setdefault(bounds, []).append(device)
    return [
        Share({a: slice(*b) for a, b in zip(letters, bounds)}, tuple(devices))
        for bounds, devices in owners.items()
    ]


# ---- where shares are put together --------------------------------------------------------------


def make_buffer(share: Share, dtype: jnp.dtype) -> Buffer:
    """An empty share of a parameter, on its devices."""
    on_host = share.devices[0].platform == "cpu"
    return HostBuffer(share, dtype) if on_host else DeviceBuffer(share, dtype)


class HostBuffer:
    """A share of CPU devices, in the host's memory."""

    def __init__(self, share: Share, dtype: jnp.dtype):
        self.share = share
        count = math.prod(share.shape) * dtype.itemsize
        # Pages begin where XLA wants memory that it takes over to begin. NumPy's own memory is made
        # of huge pages, which the system has to gather first while files fill its cache.
        pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._array = np.frombuffer(pages, dtype).reshape(share.shape)

    def write(self, place: tuple[int, ...], array: np.ndarray, axes: tuple[int, ...]) -> None:
        """Put a piece's part, transposed, at its layer and expert."""
        target = self._array[place]
        array, target, convert = _plain(array, target)
        *others, last = range(array.ndim)
        if axes == (last, *others):
            rows = math.prod(array.shape[:-1])
        elif axes == (*range(1, array.ndim), 0):
            rows = array.shape[0]
        else:
            target[...] = convert(array.transpose(axes))
            return
        matrix = np.ascontiguousarray(array).reshape(rows, -1)
        transposed = target.reshape(-1, rows)
        for row in range(0, rows, BLOCK):
            transposed[:, row : row + BLOCK] = convert(matrix[row : row + BLOCK]).T

    def arrays(self) -> list[jax.Array]:
        """One array a device; they share their memory."""
        with sharding.no_mesh():
            return [jax.device_put(self._array, device) for device in self.share.devices]


def _plain(array: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, Callable]:
    """Views of both in types of NumPy's own, and what turns a part of one into the other's.

    Copies of other types, bfloat16 among them, are slow and let no other thread run.
    """
    if array.dtype == target.dtype:
        bits = np.dtype(f"u{array.dtype.itemsize}")
        return array.view(bits), target.view(bits), lambda part: part
    if array.dtype == ml_dtypes.bfloat16 and target.dtype == np.float32:
        # float32's upper half, bit for bit.
        return array.view(np.uint16), target.view(np.uint32), lambda p: p.astype(np.uint32) << 16
    return array, target, lambda part: part.astype(target.dtype)


class DeviceBuffer:
    """A share of accelerators, in their memory."""

    def __init__(self, share: Share, dtype: jnp.dtype):
        self.share, self._lock = share, threading.Lock()
        with sharding.no_mesh():
            self._arrays = [
                jnp.zeros(share.shape, dtype, device=SingleDeviceSharding(device))
                for device in share.devices
            ]

    def write(self, place: tuple[int, ...], array: np.ndarray, axes: tuple[int, ...]) -> None:
        """Put a piece's part, transposed, at its layer and expert; returns when it is there."""
        there, done = np.array(place, np.int32), []
        with sharding.no_mesh():
            parts = [jax.device_put(array, device) for device in self.share.devices]
            with self._lock:  # each update takes the array that the one before it gave
                for number, part in enumerate(parts):
                    updated, token = _update(self._arrays[number], part, there, axes=axes)
                    self._arrays[number] = updated
                    done.append(token)
            jax.block_until_ready(done)

    def arrays(self) -> list[jax.Array]:
        """One array a device."""
        return self._arrays


Buffer = HostBuffer | DeviceBuffer


@partial(jax.jit, donate_argnums=0, static_argnames="axes")
def _update(buffer, part, place, axes):
    """The buffer with a part at its place, and a value that is there when it is."""
    part = part.transpose(axes).astype(buffer.dtype)
    stacked = part[(None,) * len(place)]
    starts = [*place, *[0] * part.ndim]
    return jax.lax.dynamic_update_slice(buffer, stacked, starts), part[(0,) * part.ndim]
