"""Models in and out: the interface for everybody, used by train.py and generate.py too."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import jax
import tqdm

from mixtral_jax import hosts, sharding
from mixtral_jax.config import (
    DTYPES,
    InputError,
    MeshConfig,
    ModelConfig,
    check_choice,
    check_mesh,
)
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.interop import folders, loading, own, own_arrays, saving
from mixtral_jax.interop.folders import Kind
from mixtral_jax.model.int8 import Int8Param
from mixtral_jax.model.mixtral import Block, Mixtral
from mixtral_jax.model.quantized import quantized


def load_model(
    path: str | os.PathLike,
    mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
    int8: bool = False,
) -> tuple[Mixtral, Tokenizer | None]:
    """The model and the tokenizer in a checkpoint folder of any kind.

        model, tokenizer = mixtral_jax.load_model("Mixtral-8x7B-v0.1", make_mesh(expert=8))
        logits_BLV = model(token_ids_BL)

    Recognised: this project's own checkpoints (a run folder, or one step of it), Hugging Face's
    form and Mistral's. Each tensor goes from its file to the devices that own it; the host holds
    a few tensors at a time. The model drops no tokens, whatever the run that made it did.

    Args:
      mesh: from sharding.make_mesh; None is one device.
      dtype: float32 or bfloat16, of the weights and of what is computed. None keeps the weights as
        they are stored, but float16 or several types as float32, and computes in float32 on CPU and
        in bfloat16 elsewhere.
      int8: the large matrices in int8, for inference; see model/quantized.py. Each is quantised as
        it is read, so no host or device holds the model in another type; of this project's own
        checkpoints the whole model is read first.
    Returns:
      The model, and the tokenizer or None if the folder has none (a SentencePiece
      `tokenizer.model`; a `tokenizer.json` alone is not one).
    Raises:
      InputError: in one line that names the file and the tensor, or the mesh axis, at fault.
    """
    mesh = sharding.make_mesh() if mesh is None else mesh
    checkpoint = open_checkpoint(path)
    config = checkpoint.config.dropless()
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
        config = dataclasses.replace(config, param_dtype=dtype, compute_dtype=dtype)
    check_mesh(config, MeshConfig(**mesh.shape))
    return checkpoint.load(config, mesh, int8), checkpoint.tokenizer


def save_model(
    model: Mixtral,
    tokenizer: Tokenizer | None,
    path: str | os.PathLike,
    format: str,
    max_shard_size: int = saving.SHARD_BYTES,
) -> None:
    """Write a model to a new folder, which appears when it is whole.

    Args:
      model: its parameters lie on a mesh.
      path: of a folder that does not exist or is empty.
      format: orbax, this project's own; huggingface; or mistral.
      max_shard_size: bytes in one file; huggingface only.
    Raises:
      InputError: if the folder holds something or cannot be written, or a size is below 1.
      ValueError: if the model is in int8 or its layers are in a list, which no format holds.
    """
    if isinstance(getattr(model, "head_DV", None), Int8Param):
        raise ValueError("the model is in int8, which no format holds: save it before `quantized`")
    if not isinstance(model.layers, Block):
        raise ValueError("the model's layers are in a list: save it before `unstacked`")
    if max_shard_size < 1:
        raise InputError(f"max_shard_size={max_shard_size} must be at least 1")
    check_choice("format", format, tuple(kind.value for kind in Kind))
    if format == Kind.OWN.value:
        saving.write_own(model, tokenizer, path)
        return
    weights = saving.ModelWeights(model)
    write = {Kind.HUGGING_FACE: saving.write_huggingface, Kind.MISTRAL: saving.write_mistral}
    options = {"max_shard_size": max_shard_size} if format == Kind.HUGGING_FACE.value else {}
    write[Kind(format)](weights, saving.tokenizer_files(tokenizer), path, **options)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder that has been looked at, whose weights are still to be read."""

    path: pathlib.Path
    config: ModelConfig
    """param_dtype is the type that the weights are stored in, or float32 if several."""
    tokenizer: Tokenizer | None
    _load: Callable[[ModelConfig, jax.sharding.Mesh, bool], Mixtral]

    def load(self, config: ModelConfig, mesh: jax.sharding.Mesh, int8: bool = False) -> Mixtral:
        """The model on a mesh.

        Args:
          config: the checkpoint's, perhaps with other types, exchange or remat.
          int8: as for `load_model`.
        """
        return self._load(config, mesh, int8)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Look at a checkpoint folder of any kind: recognise it, read its config, plan its tensors.

    Raises:
      InputError: naming the file and the tensor at fault.
    """
    path = pathlib.Path(path)
    if folders.recognise(path) is Kind.OWN:
        step = own.find(path)
        extras = own.load_extras(step)
        config = dataclasses.replace(extras.config.model, checkpoint="")

        def load_own(config: ModelConfig, mesh: jax.sharding.Mesh, int8: bool) -> Mixtral:
            model = own_arrays.load_model(step, config, mesh)
            return quantized(model, consume=True) if int8 else model

        return Checkpoint(step, config, extras.tokenizer, load_own)
    weights = folders.open_weights(path)
    if weights.format.dense:
        raise folders.dense_error(path)
    tokenizer = folders.load_tokenizer(path, weights.config.vocab_size)

    def load(config: ModelConfig, mesh: jax.sharding.Mesh, int8: bool) -> Mixtral:
        with hosts.together(), progress_bar("loading", weights.nbytes) as bar:
            return loading.load(weights, config, mesh, bar.update, int8)

    return Checkpoint(path, weights.config, tokenizer, load)


def progress_bar(title: str, total: int) -> tqdm.tqdm:
    """A bar of bytes on standard error: on the first host, at a terminal, if it takes a while."""
    hidden = jax.process_index() != 0 or not sys.stderr.isatty()
    return tqdm.tqdm(
        desc=title, total=total, unit="B", unit_scale=True, disable=hidden, delay=1, leave=False
    )
