"""Weights in files, planned before any of them is read.

A plan says for every piece of the model which tensor of which file holds it, and is made from the
files' headers alone: every name is used, every parameter filled and every shape right, or there is
an error that names the file and the tensor.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.interop import configs, layout, names, pickles
from mixtral_jax.interop.names import Entry, Format, Piece
from mixtral_jax.interop.safetensors import SafetensorsFile, TensorInfo
from mixtral_jax.interop.strict_json import quote

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MISTRAL_FILE = "consolidated.safetensors"
_LONGEST_NAME = 255  # of a file, in any file system of Linux
_MOST_MISSING = 1000  # tensors that are counted before an error says that they are missing
DTYPES = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    np.dtype(ml_dtypes.bfloat16): "bfloat16",
}


class File(Protocol):
    """A file of tensors: safetensors or a pickle."""

    path: pathlib.Path
    tensors: Mapping[str, TensorInfo]

    def array(self, name: str) -> np.ndarray: ...
    def prefetch(self, name: str) -> None: ...
    def release(self, name: str) -> None: ...
    def close(self) -> None: ...


class Place(NamedTuple):
    """Where a piece lies."""

    piece: Piece
    entry: Entry
    file: File

    @property
    def info(self) -> TensorInfo:
        return self.file.tensors[self.entry.name]


@dataclass(frozen=True)
class FileWeights:
    """The weights of a checkpoint folder, in Hugging Face's or Mistral's form."""

    config: ModelConfig
    """param_dtype is the type that holds every tensor without loss."""
    format: Format
    places: Mapping[Piece, Place]
    """In the order of the files."""

    @property
    def files(self) -> list[File]:
        return list({id(place.file): place.file for place in self.places.values()}.values())

    @property
    def nbytes(self) -> int:
        """Of all tensors, each counted once."""
        return sum(info.stop - info.start for file in self.files for info in file.tensors.values())

    def dtype(self, piece: Piece) -> np.dtype:
        """The piece's type in its file."""
        return self.places[piece].info.dtype

    def read(
        self, piece: Piece, wanted: str = "", slices: Mapping[str, slice] | None = None
    ) -> tuple[np.ndarray, str]:
        """(array, layout) of the part of a piece that slices name by letter; see from_tensor.

        Args:
          wanted: layout that the caller would like; not heeded, because this is a view.
        """
        place = self.places[piece]
        tensor = place.file.array(place.entry.name)
        return layout.from_tensor(
            tensor, place.entry, names.sizes(self.config), piece.expert, slices
        )

    def prefetch(self, piece: Piece) -> None:
        """Have the system read a piece that will soon be wanted."""
        place = self.places[piece]
        place.file.prefetch(place.entry.name)

    def release(self, piece: Piece) -> None:
        """Give back the memory that holds what was read of a piece."""
        place = self.places[piece]
        place.file.release(place.entry.name)

    def close(self) -> None:
        for file in self.files:
            file.close()


# ---- the files of a folder ---------------------------------------------------------------------


def huggingface_files(folder: pathlib.Path) -> list[File]:
    """The safetensors files that a folder's index names, or its only one.

    Raises:
      InputError: for an index that does not match the files, or points out of the folder.
    """
    if not (folder / INDEX).exists():
        return [SafetensorsFile(folder / SINGLE)]
    name = one_line(folder / INDEX)
    weight_map = configs.read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{name} has no weight_map: it is not the index of a checkpoint")
    for tensor, shard in weight_map.items():
        own_name = isinstance(shard, str) and pathlib.PurePath(shard).name == shard
        if not own_name or shard in ("", "..") or len(shard) > _LONGEST_NAME:
            raise InputError(
                f"{name}: {quote(tensor)} is in {quote(shard)}, which is no file of that folder"
            )
    shards = sorted(set(weight_map.values()))
    if (folder / SINGLE).exists() and shards != [SINGLE]:  # transformers would take that one
        raise InputError(f"{one_line(folder)} has both {SINGLE} and {INDEX}: remove one of them")
    files = []
    for shard in shards:
        if not os.path.exists(folder / shard):  # unlike Path.exists, whatever the name
            missing = sum(s == shard for s in weight_map.values())
            raise InputError(
                f"{one_line(folder / shard)} is missing: {INDEX} expects {missing} tensors there"
            )
        files.append(SafetensorsFile(folder / shard))
    for file in files:
        name = one_line(file.path)
        listed = {tensor for tensor, shard in weight_map.items() if shard == file.path.name}
        for tensor in sorted(listed - set(file.tensors)):
            raise InputError(f"{name} has no tensor {quote(tensor)}, which {INDEX} expects there")
        for tensor in sorted(set(file.tensors) - listed):
            raise InputError(
                f"{name} has a tensor {quote(tensor)} that {INDEX} does not name there"
            )
    return files


def mistral_files(folder: pathlib.Path) -> list[File]:
    """Mistral's consolidated.safetensors, or its pickles where PyTorch can read them safely."""
    if (folder / MISTRAL_FILE).exists():
        return [SafetensorsFile(folder / MISTRAL_FILE)]
    return pickles.open_pickles(pickles.find(folder))


# ---- planning ----------------------------------------------------------------------------------


def format_of(tensors: Sequence[str], huggingface: bool, dense: bool) -> Format:
    """Which names a folder's tensors have."""
    if not huggingface:
        if dense:
            return names.MISTRAL_DENSE
        parts = any(".block_sparse_moe.w" in name for name in tensors)
        return names.MISTRAL_PARTS if parts else names.MISTRAL
    if dense:
        return names.HUGGING_FACE_DENSE
    fused = any(".mlp.experts." in name for name in tensors)
    return names.HUGGING_FACE_FUSED if fused else names.HUGGING_FACE


def plan(folder: pathlib.Path, files: Sequence[File], config: ModelConfig, form: Format):
    """Where each piece of the model lies; reads nothing but what opening the files has read.

    Raises:
      InputError: for a missing, extra or repeated tensor, or one of the wrong shape or type.
    """
    homes: dict[str, File] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor in homes:
                raise InputError(
                    f"{one_line(file.path)}: tensor {quote(tensor)} is in "
                    f"{one_line(homes[tensor].path.name)} too"
                )
            homes[tensor] = file
    counts = names.sizes(config)
    places, missing = [], []
    for piece in names.pieces(config):
        if piece.parameter not in form.entries:
            continue  # a dense model has no router
        entry = form.entry(piece)
        if entry.name not in homes:
            missing.append(entry.name)
            if len(missing) == _MOST_MISSING:  # a config may promise millions
                break
            continue
        place = Place(piece, entry, homes[entry.name])
        _check(place, layout.tensor_shape(entry, counts))
        places.append(place)
    if missing:
        count = f"{len(set(missing)) - 1}{' or' if len(missing) == _MOST_MISSING else ''} more"
        more = f" (and {count})" if len(set(missing)) > 1 else ""
        raise InputError(
            f"{one_line(folder)} lacks tensor {missing[0]}{more}: its config promises "
            f"{config.num_hidden_layers} layers of {config.num_local_experts} experts"
        )
    for tensor in sorted(set(homes) - {place.entry.name for place in places}):
        raise InputError(
            f"{one_line(homes[tensor].path)}: tensor {quote(tensor)} is not a Mixtral's"
        )
    order = {id(file): number for number, file in enumerate(files)}
    places.sort(key=lambda place: (order[id(place.file)], place.info.start))
    types = {place.info.dtype for place in places}
    only_bfloat16 = types == {np.dtype(ml_dtypes.bfloat16)}
    config = replace(config, param_dtype="bfloat16" if only_bfloat16 else "float32")
    return FileWeights(config, form, {place.piece: place for place in places})


def _check(place: Place, wanted: tuple[int, ...]) -> None:
    where = f"{one_line(place.file.path)}: tensor {place.entry.name}"
    info = place.info
    if info.shape != wanted:
        raise InputError(f"{where} has shape {info.shape}, and its config wants {wanted}")
    if info.dtype not in DTYPES:
        raise InputError(f"{where} is {info.dtype}: weights must be {', '.join(DTYPES.values())}")
