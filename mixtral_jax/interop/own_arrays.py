"""The arrays of this project's own checkpoints, through orbax, with a checksum of each.

The checksums are sums of bit patterns modulo 2^32: the same on every mesh, and a damaged file that
still decodes is found out.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import pathlib
import re
import shutil
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.interop import own
from mixtral_jax.interop.strict_json import one_line
from mixtral_jax.model.mixtral import Mixtral, abstract_state


def by_path(tree: Any) -> dict[str, jax.Array]:
    """The leaves of a tree under their paths, as texts."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _bit_sum(x: jax.Array) -> jax.Array:
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jnp.sum(jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """For each array, the sum of its elements' bit patterns modulo 2^32."""
    sums = jax.device_get(jax.jit(lambda t: jax.tree.map(_bit_sum, t))(by_path(tree)))
    return {path: int(value) for path, value in sums.items()}


def restore(path: pathlib.Path, item: str, abstract: Any, run: dict) -> Any:
    """The arrays of an item, laid out as `abstract` says and checked against the checksums.

    Raises:
      InputError: if the item is damaged, naming it.
    """
    try:
        with ocp.StandardCheckpointer() as checkpointer, _quiet():
            arrays = checkpointer.restore(path / item, abstract)
    except Exception as error:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats each task's error
        raise InputError(f"checkpoint {path} is damaged in {item}: {_first_line(error)}") from None
    for name, value in checksums(arrays).items():
        if run["checksums"].get(item, {}).get(name) != value:
            raise InputError(f"checkpoint {path} is damaged in {item}: {name} has changed on disk")
    return arrays


@contextlib.contextmanager
def _quiet():
    """Hide orbax's warnings about sharding files, for the target's shardings are always given, and
    the errors of its threads, which are raised too."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def load_model(path: pathlib.Path, config: ModelConfig, mesh: jax.sharding.Mesh) -> Mixtral:
    """The model of a checkpoint, each device reading its slices only.

    Args:
      path: from `own.find`.
      config: the checkpoint's, perhaps with another exchange or types.
      mesh: any mesh that the model's sizes split over.
    Raises:
      InputError: if the checkpoint is damaged.
    """
    run = own.read_run(path)
    stored = own.extras_of(run).config.model.param_dtype
    graphdef, state = abstract_state(config)
    shardings = sharding.param_shardings(state, mesh)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, jnp.dtype(stored), sharding=s), state, shardings
    )
    params = restore(path, own.PARAMS, nnx.to_pure_dict(abstract), run)
    if stored != config.param_dtype:
        params = jax.tree.map(lambda a: a.astype(config.param_dtype), params)
    nnx.replace_by_pure_dict(abstract, params)
    return nnx.merge(graphdef, abstract)


def write_model(model: Mixtral, extras: own.Extras, path: pathlib.Path) -> None:
    """Write a checkpoint without an optimizer; `path` does not exist, and its folder does.

    Raises:
      InputError: if it cannot be written; nothing is there then.
    """
    params = nnx.to_pure_dict(nnx.state(model))
    run = own.run_of(extras, {own.PARAMS: checksums(params)})
    path, threads = path.resolve(), set(threading.enumerate())
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer, _quiet():
            items = {own.PARAMS: ocp.args.StandardSave(params), own.RUN: ocp.args.JsonSave(run)}
            checkpointer.save(path, args=ocp.args.Composite(**items))
    except BaseException as error:
        with _quiet():
            _join(set(threading.enumerate()) - threads)
        if jax.process_index() == 0:
            _remove(path)
        # tensorstore says with a ValueError that a disk is full.
        if not isinstance(error, OSError | ValueError | RuntimeError):
            raise
        raise InputError(f"{one_line(path)} cannot be written: {_reason(error)}") from None


def _join(threads: set[threading.Thread]) -> None:
    """Wait for threads that write, not for those that wait for work."""
    end = time.monotonic() + 2
    for thread in threads:
        with contextlib.suppress(Exception):  # orbax's threads raise what they met here, too
            thread.join(max(0, end - time.monotonic()))


def _remove(path: pathlib.Path) -> None:
    """What orbax has begun of a checkpoint, which it leaves; tensorstore may still be writing."""
    for _ in range(5):
        for begun in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(begun, ignore_errors=True)
        time.sleep(0.1)


def _reason(error: Exception) -> str:
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else one_line(_first_line(error))
