"""From files to devices, a tensor at a time.

Each device first gets its empty share of every parameter. Then the tensors are read in the order of
the files, each slice once, by the host whose devices own it, and written into place there, where
experts and layers lie stacked. The host holds two tensors at a time, whatever the model's size.
"""

from __future__ import annotations

import collections
import itertools
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.interop import names
from mixtral_jax.interop.layout import transposition
from mixtral_jax.interop.names import Piece
from mixtral_jax.interop.source import FileWeights
from mixtral_jax.model.mixtral import Mixtral, abstract_state

AHEAD = 2  # pieces under way at a time


class Loaded(NamedTuple):
    """A model, and what loading it took."""

    model: Mixtral
    bytes_read: int
    """By this host."""
    seconds: float


class Share(NamedTuple):
    """The part of a parameter that some devices of this host hold, all the same."""

    slices: Mapping[str, slice]
    """By letter of the model's layout, L for the layers; with start and stop."""
    devices: tuple[jax.Device, ...]

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


def load(weights: FileWeights, config: ModelConfig, mesh: jax.sharding.Mesh, progress) -> Loaded:
    """A model from files, on a mesh.

    Args:
      config: the weights' own, perhaps with other types or exchange.
      progress: called with the number of bytes that this host has read of each piece.
    """
    began = time.perf_counter()
    graphdef, abstract = abstract_state(config)
    flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(abstract)}
    where = {name: sharding.param_shardings(leaf, mesh).get_value() for name, leaf in flat.items()}
    shares = {name: shares_of(name, leaf.shape, where[name]) for name, leaf in flat.items()}
    buffers = {
        (name, device): _empty(leaf, share, device)
        for name, leaf in flat.items()
        for share in shares[name]
        for device in share.devices
    }
    total, under_way = 0, collections.deque()
    for piece, following in _with_next(weights.places):
        if following:
            weights.prefetch(following)
        done = []
        for share in shares[piece.parameter]:
            place = share.place_of(piece)
            if place is None:
                continue
            array, letters = weights.read(piece, slices=share.rest(piece.letters))
            total += array.nbytes
            progress(array.nbytes)
            for device in share.devices:
                key = piece.parameter, device
                buffers[key], token = _write(buffers[key], array, letters, piece, place, device)
                done.append(token)
        under_way.append((piece, done))
        if len(under_way) >= AHEAD:
            _finish(weights, *under_way.popleft())
    for piece, done in under_way:
        _finish(weights, piece, done)
    for name, leaf in flat.items():
        arrays = [buffers[name, device] for share in shares[name] for device in share.devices]
        whole = jax.make_array_from_single_device_arrays(leaf.shape, where[name], arrays)
        leaf.set_value(whole)
    return Loaded(nnx.merge(graphdef, abstract), total, time.perf_counter() - began)


def shares_of(name: str, shape: tuple[int, ...], where: jax.sharding.Sharding) -> list[Share]:
    """How this host's devices share a parameter, each different share once."""
    letters = names.letters_of(name)
    letters = letters if len(letters) == len(shape) else "L" + letters
    owners: dict[tuple, list[jax.Device]] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape))
        owners.setdefault(bounds, []).append(device)
    return [
        Share({a: slice(*b) for a, b in zip(letters, bounds)}, tuple(devices))
        for bounds, devices in owners.items()
    ]


def _empty(leaf, share: Share, device: jax.Device) -> jax.Array:
    shape = tuple(part.stop - part.start for part in share.slices.values())
    with sharding.no_mesh():
        return jnp.zeros(shape, leaf.dtype, device=SingleDeviceSharding(device))


def _write(buffer, array: np.ndarray, letters: str, piece: Piece, place, device):
    """The buffer with a piece's part at its place, and a value that is there when it is."""
    axes = transposition(letters, piece.letters)
    if device.platform == "cpu":  # device_put transposes ten times faster than XLA:CPU does
        array, axes = array.transpose(axes), tuple(range(array.ndim))
    with sharding.no_mesh():
        part = jax.device_put(array, device)
        return _update(buffer, part, np.array(place, np.int32), axes=axes)


@partial(jax.jit, donate_argnums=0, static_argnames="axes")
def _update(buffer, part, place, axes):
    part = part.transpose(axes).astype(buffer.dtype)
    stacked = part[(None,) * len(place)]
    starts = [*place, *[0] * part.ndim]
    buffer = jax.lax.dynamic_update_slice(buffer, stacked, starts)
    return buffer, part[(0,) * part.ndim]


def _finish(weights: FileWeights, piece: Piece, done: list[jax.Array]) -> None:
    jax.block_until_ready(done)
    weights.release(piece)


def _with_next(pieces) -> Iterator[tuple[Piece, Piece | None]]:
    return itertools.zip_longest(pieces, itertools.islice(pieces, 1, None))
