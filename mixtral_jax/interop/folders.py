"""Which kind of checkpoint a folder holds, and everything about it but the weights. No JAX here."""

from __future__ import annotations

import contextlib
import enum
import os
import pathlib
from typing import Any

from mixtral_jax import config_io
from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.interop import configs, own, pickles, source

HUGGING_FACE_CONFIG, MISTRAL_CONFIG = "config.json", "params.json"
# The first that is there; a folder with several has the same pieces in each.
TOKENIZERS = ("tokenizer.model.v3", "tokenizer.model.v2", "tokenizer.model.v1", "tokenizer.model")


# Files that say that the weights beside them are not the model, and what to do.
_NOT_THE_MODEL = {
    "adapter_config.json": "merge the adapter into the weights first, or remove the file",
    "quantize_config.json": "convert its quantized weights to bfloat16 first, or remove the file",
}


class Kind(enum.Enum):
    """The forms that a checkpoint comes in; values are the names that `convert` and users type."""

    OWN = "orbax"
    HUGGING_FACE = "huggingface"
    MISTRAL = "mistral"


def recognise(path: str | os.PathLike) -> Kind:
    """The kind of checkpoint in a folder, told by its files.

    Where a folder holds weights in several forms, safetensors are taken before pickles, and among
    those Hugging Face's before Mistral's.

    Raises:
      InputError: if it is none, naming what is missing.
    """
    try:
        return _recognise(pathlib.Path(path))
    except OSError as error:  # no permission, a name too long
        raise InputError(f"checkpoint folder {one_line(path)}: {error.strerror}") from None


def _recognise(path: pathlib.Path) -> Kind:
    name = one_line(path)
    if not path.is_dir():
        what = "is a file: name its folder" if path.exists() else "does not exist"
        raise InputError(f"checkpoint folder {name} {what}")
    if own.is_one(path):
        return Kind.OWN
    if any((path / name).exists() for name in (source.INDEX, source.SINGLE)):
        return Kind.HUGGING_FACE
    if (path / source.MISTRAL_FILE).exists() or pickles.find(path):
        return Kind.MISTRAL
    expected = f"{source.SINGLE}, {source.INDEX} or {source.MISTRAL_FILE}"
    for pattern in ("*.safetensors", "*.bin", "*.gguf", HUGGING_FACE_CONFIG, MISTRAL_CONFIG):
        if found := sorted(path.glob(pattern)):
            raise InputError(f"{name} has {one_line(found[0].name)} but no {expected}")
    raise InputError(
        f"{name} holds no checkpoint: name a run folder such as runs/quickstart, one step in its "
        f"{own.FOLDER}/, or a folder with {expected}"
    )


def describe(path: str | os.PathLike) -> configs.Description:
    """The sizes of the model in a folder, from its config alone.

    Raises:
      InputError: if there is none, or it asks for what Mixtral is not.
    """
    path, kind = pathlib.Path(path), recognise(path)
    if kind is Kind.OWN:
        return configs.describe(own.load_extras(own.find(path)).config.model)
    file = path / HUGGING_FACE_CONFIG
    # The eight-part pickles of 8x7B lie beside Hugging Face's config and have none of their own.
    if kind is Kind.MISTRAL and ((path / MISTRAL_CONFIG).exists() or not file.exists()):
        file = path / MISTRAL_CONFIG
        return configs.from_mistral(configs.read_json(file), str(file))
    return configs.from_huggingface(configs.read_json(file), str(file))


def open_weights(path: str | os.PathLike) -> source.FileWeights:
    """The weights of a folder in Hugging Face's or Mistral's form, planned and not read.

    Raises:
      InputError: naming the file and the tensor at fault.
    """
    path, kind = pathlib.Path(path), recognise(path)
    if kind is Kind.OWN:
        raise InputError(
            f"{one_line(path)} holds this project's own checkpoint, whose files orbax reads"
        )
    for name, fix in _NOT_THE_MODEL.items():
        if (path / name).exists():
            raise InputError(f"{one_line(path)} has {name}: {fix}")
    description = describe(path)
    huggingface = kind is Kind.HUGGING_FACE
    files = source.huggingface_files(path) if huggingface else source.mistral_files(path)
    tensors = [tensor for file in files for tensor in file.tensors]
    form = source.format_of(tensors, huggingface, description.dense)
    return source.plan(path, files, ModelConfig(**description.sizes), form)


def find_tokenizer(path: pathlib.Path) -> pathlib.Path | None:
    """The SentencePiece file of a folder, if it has one."""
    return next((path / name for name in TOKENIZERS if (path / name).is_file()), None)


def load_tokenizer(path: str | os.PathLike, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder of any kind, or None if it has none.

    Raises:
      InputError: if its vocabulary is not the embedding's.
    """
    path = pathlib.Path(path)
    if recognise(path) is Kind.OWN:
        return own.load_extras(own.find(path)).tokenizer
    file = find_tokenizer(path)
    if file is None:
        return None
    try:
        tokenizer = Tokenizer.from_file(file)
    except InputError as error:
        raise InputError(one_line(error)) from None
    if tokenizer.vocab_size != vocab_size:
        reason = "it is another model's"
        if tokenizer.vocab_size < vocab_size:
            reason = (
                f"tokens were added to it; rename {file.name} to do without a tokenizer, or put "
                f"one of {vocab_size} pieces in its place"
            )
        raise InputError(
            f"tokenizer {one_line(file)} has {tokenizer.vocab_size} pieces, but the embedding has "
            f"{vocab_size} rows: {reason}"
        )
    return tokenizer


def training_sizes(checkpoint: str, run_dir: str = "") -> dict[str, Any]:
    """The model's keys of a training config that starts from a checkpoint; see config_io.load.

    A run that was begun from it has them itself: the checkpoint may be gone.

    Raises:
      InputError: as `describe`, or because the checkpoint has no experts.
    """
    with contextlib.suppress(InputError):
        begun = config_io.load(pathlib.Path(run_dir) / own.CONFIG).model
        if begun.checkpoint == checkpoint:
            return configs.describe(begun).sizes
    description = describe(checkpoint)
    if description.dense:
        raise dense_error(pathlib.Path(checkpoint))
    return description.sizes


def dense_error(path: pathlib.Path) -> InputError:
    """What to do with a dense model."""
    name = one_line(path)
    return InputError(
        f"{name} holds a dense model: make a sparse one of it with python -m "
        f"mixtral_jax.interop.convert {name} TARGET --to orbax --upcycle 8"
    )
