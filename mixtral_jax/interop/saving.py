"""Models into files, a tensor at a time: Hugging Face's form, Mistral's and this project's own.

A folder is written under a temporary name and renamed when it is whole, so that a reader finds all
of it or nothing.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.command_line import one_line
from mixtral_jax.config import Config, InputError, ModelConfig, TrainingConfig
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.files import check_free, naming, new_folder
from mixtral_jax.interop import (
    configs,
    folders,
    layout,
    loading,
    names,
    own,
    own_arrays,
    source,
    tokenizer_json,
)
from mixtral_jax.interop.names import Format, Piece
from mixtral_jax.interop.safetensors import write_safetensors
from mixtral_jax.model.mixtral import Mixtral

SHARD_BYTES = 5 * 10**9
NUMPY_TYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class Weights(Protocol):
    """Where pieces come from: files, or a model on devices."""

    config: ModelConfig

    def dtype(self, piece: Piece) -> np.dtype: ...
    def read(self, piece: Piece, wanted: str) -> tuple[np.ndarray, str]: ...
    def release(self, piece: Piece) -> None: ...


class ModelWeights:
    """The pieces of a model whose parameters lie on this host's devices."""

    def __init__(self, model: Mixtral):
        """Raises InputError if other hosts hold a part of the model."""
        if jax.process_count() > 1:
            raise InputError(
                "a model on several hosts is saved as orbax; python -m mixtral_jax.interop.convert "
                "then gives it other forms, on one host"
            )
        self.config = model.config
        self._parameters = {}
        for path, leaf in nnx.to_flat_state(nnx.state(model)):
            name, array = ".".join(map(str, path)), leaf[...]
            on = {shard.device: shard.data for shard in array.addressable_shards}
            shares = loading.shares_of(name, array.shape, array.sharding)
            self._parameters[name] = [(share, on[share.devices[0]]) for share in shares]

    def dtype(self, piece: Piece) -> np.dtype:
        return self._parameters[piece.parameter][0][1].dtype

    def read(self, piece: Piece, wanted: str) -> tuple[np.ndarray, str]:
        """(array, layout) of a whole piece, in the wanted layout, transposed on its device."""
        axes = layout.transposition(piece.letters, wanted)
        counts, whole = names.sizes(self.config), None
        shape = tuple(counts[letter] for letter in wanted)
        for share, array in self._parameters[piece.parameter]:
            place = share.place_of(piece)
            if place is None:
                continue
            with sharding.no_mesh():
                part = np.asarray(_transposed(_picked(array, np.array(place, np.int32)), axes))
            if part.shape == shape:
                return part, wanted
            whole = np.empty(shape, part.dtype) if whole is None else whole
            slices = share.rest(wanted)
            whole[tuple(slices[letter] for letter in wanted)] = part
        return whole, wanted

    def release(self, piece: Piece) -> None:
        """Nothing to give back."""


@jax.jit
def _picked(array, place):
    for number in range(place.shape[0]):
        array = jax.lax.dynamic_index_in_dim(array, place[number], 0, keepdims=False)
    return array


@partial(jax.jit, static_argnums=1)
def _transposed(array, axes):  # by itself: fused with the slice it takes XLA:CPU ten times as long
    return array.transpose(axes)


def _write_json(path: pathlib.Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


TokenizerFiles = Mapping[str, bytes]
"""The files of a tokenizer by name."""


def tokenizer_files(tokenizer: Tokenizer | None) -> TokenizerFiles:
    """The file of a tokenizer, under the name that tells its version where the pieces do not."""
    return {} if tokenizer is None else {tokenizer.file_name: tokenizer.model_bytes}


# ---- the forms ---------------------------------------------------------------------------------


class Writer:
    """The tensors of a format, made from pieces as they are wanted."""

    def __init__(
        self, weights: Weights, form: Format, dtype: str | None, progress: Callable[[int], object]
    ):
        self._weights, self._form, self._progress = weights, form, progress
        self._sizes = names.sizes(weights.config)
        self._dtype = dtype and NUMPY_TYPES[dtype]

    def tensors(self) -> list[tuple[Piece, tuple[str, np.dtype, tuple[int, ...]]]]:
        """Each piece with its tensor's name, type and shape, in the order of the model."""
        return [(piece, self._tensor(piece)) for piece in names.pieces(self._weights.config)]

    def _tensor(self, piece: Piece) -> tuple[str, np.dtype, tuple[int, ...]]:
        entry = self._form.entry(piece)
        dtype = self._dtype or self._weights.dtype(piece)
        return entry.name, dtype, layout.tensor_shape(entry, self._sizes)

    def write(self, path: pathlib.Path, tensors: Sequence) -> None:
        """One safetensors file of these tensors."""
        write_safetensors(path, [tensor for _, tensor in tensors], self._arrays(tensors))

    def _arrays(self, tensors: Sequence) -> Iterator[np.ndarray]:
        for piece, (_, dtype, _) in tensors:
            entry = self._form.entry(piece)
            array, letters = self._weights.read(piece, layout.letters_of(entry))
            array = layout.to_tensor(array, letters, entry, self._sizes)
            yield array.astype(dtype, copy=False)
            self._progress(array.nbytes)
            self._weights.release(piece)


def nbytes(tensor: tuple[str, np.dtype, tuple[int, ...]]) -> int:
    """Of a tensor's data."""
    _, dtype, shape = tensor
    return dtype.itemsize * int(np.prod(shape, dtype=np.int64))


def shards(tensors: Sequence, most: int) -> list[list]:
    """The tensors in order, in as few files of at most so many bytes as one pass gives."""
    files, used = [[]], 0
    for piece, tensor in tensors:
        size = nbytes(tensor)
        if files[-1] and used + size > most:
            files.append([])
            used = 0
        files[-1].append((piece, tensor))
        used += size
    return files


def _nothing(count: int) -> None:
    pass


def write_huggingface(
    weights: Weights,
    tokenizer: TokenizerFiles,
    path: str | os.PathLike,
    dtype: str | None = None,
    max_shard_size: int = SHARD_BYTES,
    progress: Callable[[int], object] = _nothing,
    token_ids: Mapping[str, Any] = {},
) -> None:
    """A folder that transformers' MixtralForCausalLM reads.

    Args:
      dtype: float32 or bfloat16; None keeps each tensor's.
      max_shard_size: bytes of tensors in one file; a larger tensor has a file of its own.
      progress: called with the number of bytes of each tensor.
      token_ids: what a config.json has said; of others the tokenizer's, and null without one.
    """
    token_ids = {**_ids_of(tokenizer), **token_ids}
    with new_folder(path) as folder:
        writer = Writer(weights, names.HUGGING_FACE, dtype, progress)
        files = shards(writer.tensors(), max_shard_size)
        weight_map, total = {}, 0
        for number, tensors in enumerate(files, 1):
            name = source.SINGLE
            if len(files) > 1:
                name = f"model-{number:05}-of-{len(files):05}.safetensors"
            writer.write(folder / name, tensors)
            weight_map |= {tensor[0]: name for _, tensor in tensors}
            total += sum(nbytes(tensor) for _, tensor in tensors)
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            _write_json(folder / source.INDEX, index)
        stored = {str(tensor[1]) for tensors in files for _, tensor in tensors}
        stored = stored.pop() if len(stored) == 1 else "float32"
        values = configs.to_huggingface(weights.config, stored, token_ids)
        _write_json(folder / folders.HUGGING_FACE_CONFIG, values)
        _write_json(folder / "generation_config.json", configs.generation_config(token_ids))
        _write_tokenizer(folder, _for_transformers(tokenizer))


def _tokenizer_in(files: TokenizerFiles) -> Tokenizer | None:
    """The tokenizer of a SentencePiece file among these."""
    name = next((name for name in folders.TOKENIZERS if name in files), None)
    return None if name is None else Tokenizer.from_bytes(files[name], name)


def _ids_of(files: TokenizerFiles) -> dict[str, int]:
    """Where a text begins and ends, if a tokenizer says it."""
    tokenizer = _tokenizer_in(files)
    if tokenizer is None:
        return {}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}


def _for_transformers(files: TokenizerFiles) -> TokenizerFiles:
    """The files, and those that AutoTokenizer wants beside a SentencePiece model, if not there."""
    tokenizer = _tokenizer_in(files)
    if tokenizer is None or tokenizer_json.TOKENIZER_JSON in files:
        return files
    return {**tokenizer_json.huggingface_files(tokenizer), **files}


def write_mistral(
    weights: Weights,
    tokenizer: TokenizerFiles,
    path: str | os.PathLike,
    dtype: str | None = None,
    progress: Callable[[int], object] = _nothing,
) -> None:
    """A folder that mistral-inference reads; arguments as for `write_huggingface`."""
    with new_folder(path) as folder:
        writer = Writer(weights, names.MISTRAL, dtype, progress)
        writer.write(folder / source.MISTRAL_FILE, writer.tensors())
        _write_json(folder / folders.MISTRAL_CONFIG, configs.to_mistral(weights.config))
        _write_tokenizer(folder, tokenizer)


def _write_tokenizer(folder: pathlib.Path, files: TokenizerFiles) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_own(model: Mixtral, tokenizer: Tokenizer | None, path: str | os.PathLike) -> None:
    """One of this project's checkpoints, without an optimizer; orbax makes it appear whole.

    Raises:
      InputError: if there is something at `path`, or it cannot be written.
    """
    check_free(path)
    path = pathlib.Path(path).resolve()
    length = min(TrainingConfig.sequence_length, model.config.max_position_embeddings)
    config = Config(model=model.config, training=TrainingConfig(sequence_length=length))
    extras = own.Extras(config, np.zeros((0, 2), np.int64), tokenizer, None)
    with naming(one_line(path)):
        if path.is_dir():
            path.rmdir()  # it is empty, and orbax makes it
        path.parent.mkdir(parents=True, exist_ok=True)
        own_arrays.write_model(model, extras, path)
