"""From one form of checkpoint to another: what the command interop/convert.py does."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
import time
from typing import NamedTuple

from mixtral_jax import sharding
from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.files import check_free
from mixtral_jax.interop import folders, loading, models, saving
from mixtral_jax.interop.folders import Kind
from mixtral_jax.interop.source import INDEX
from mixtral_jax.interop.upcycling import Upcycled
from mixtral_jax.model.mixtral import Mixtral

# What Hugging Face's form may hold beside weights and config.
BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)


class Upcycling(NamedTuple):
    """How a dense model becomes a sparse one."""

    experts: int
    per_token: int
    seed: int


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    to: Kind,
    dtype: str | None = None,
    max_shard_size: int = saving.SHARD_BYTES,
    upcycling: Upcycling | None = None,
) -> None:
    """Write the checkpoint in a folder to a new folder in another form.

    Bars and what was not carried over go to standard error, a line of what was done to standard
    output.

    Args:
      dtype: float32 or bfloat16; None keeps the type of each tensor. orbax has one type for all:
        float32 where a source has several, or float16.
      max_shard_size: bytes in one file; huggingface only.
    Raises:
      InputError: naming the file and tensor, or the value, at fault; nothing is at `target` then.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    check_free(target)
    began = time.perf_counter()
    if folders.recognise(source) is Kind.OWN:
        if upcycling:
            raise InputError(f"--upcycle is for a dense model: {source} has experts already")
        _from_own(source, target, to, dtype, max_shard_size)
    else:
        _from_files(source, target, to, dtype, max_shard_size, upcycling)
    seconds = time.perf_counter() - began
    files = [path for path in target.rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files)
    print(
        f"{one_line(target)}: {to.value}, {len(files)} files, {written / 1e9:.3f} GB in "
        f"{seconds:.1f} s ({written / seconds / 1e9:.2f} GB/s)"
    )


def _from_own(source, target, to, dtype, max_shard_size) -> None:
    checkpoint = models.open_checkpoint(source)
    model = _on_host(checkpoint.load, checkpoint.config, dtype)
    if to is Kind.OWN:
        saving.write_own(model, checkpoint.tokenizer, target)
    else:
        beside = saving.tokenizer_files(checkpoint.tokenizer)
        _write(saving.ModelWeights(model), beside, target, to, dtype, max_shard_size, {})


def _from_files(source, target, to, dtype, max_shard_size, upcycling) -> None:
    weights = folders.open_weights(source)
    if upcycling:
        weights = Upcycled(weights, *upcycling)
    elif weights.format.dense:
        raise folders.dense_error(source)
    tokenizer = folders.load_tokenizer(source, weights.config.vocab_size)
    if to is Kind.OWN:
        with models.progress_bar("reading", weights.nbytes) as bar:

            def load(config, mesh):
                return loading.load(weights, config, mesh, bar.update)

            model = _on_host(load, weights.config, dtype)
        saving.write_own(model, tokenizer, target)
        carried = [folders.find_tokenizer(source)] if tokenizer else []
    else:
        carried = _beside(source, to)
        beside = saving.tokenizer_files(tokenizer)
        beside |= {path.name: _content(path) for path in carried}
        token_ids = folders.describe(source).token_ids
        _write(weights, beside, target, to, dtype, max_shard_size, token_ids)
    weights.close()
    _say_what_was_left(source, [*carried, *(file.path for file in weights.files)])


def _on_host(load, config: ModelConfig, dtype: str | None) -> Mixtral:
    """A model on the CPU, whole."""
    config = dataclasses.replace(config, param_dtype=dtype or config.param_dtype)
    return load(config, sharding.make_mesh())


def _write(weights, beside, target, to, dtype, max_shard_size, token_ids) -> None:
    itemsize = saving.NUMPY_TYPES[dtype or weights.config.param_dtype].itemsize
    total = weights.config.num_parameters * itemsize
    with models.progress_bar("writing", total) as bar:
        if to is Kind.MISTRAL:
            saving.write_mistral(weights, beside, target, dtype, bar.update)
        else:
            options = (dtype, max_shard_size, bar.update, token_ids)
            saving.write_huggingface(weights, beside, target, *options)


def _beside(source: pathlib.Path, to: Kind) -> list[pathlib.Path]:
    """Files of the source that belong beside the target's weights."""
    found = [path for name in folders.TOKENIZERS if (path := source / name).is_file()]
    if to is Kind.HUGGING_FACE:
        found += [path for name in BESIDE if (path := source / name).is_file()]
    return found


def _content(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{one_line(path)} cannot be read: {error.strerror}") from None


def _say_what_was_left(source: pathlib.Path, used: list[pathlib.Path]) -> None:
    """Name the files of the source that the target has nothing of."""
    known = {folders.HUGGING_FACE_CONFIG, folders.MISTRAL_CONFIG, INDEX}
    known |= {path.name for path in used}
    left = sorted(path.name for path in source.iterdir() if path.name not in known)
    if left:
        print(f"not carried over: {', '.join(map(one_line, left))}", file=sys.stderr)
