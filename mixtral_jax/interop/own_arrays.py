"""The arrays of this project's own checkpoints, through orbax, with a checksum of each.

The checksums are sums of bit patterns modulo 2^32: the same on every mesh, and a damaged file that
still decodes is found out.
"""

from __future__ import annotations

import atexit
import contextlib
import glob
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from mixtral_jax import hosts, sharding
from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.interop import own
from mixtral_jax.model.mixtral import Mixtral, abstract_state


def by_path(tree: Any) -> dict[str, jax.Array]:
    """The leaves of a tree under their paths, as texts."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@jax.jit
def _bit_sum(x: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)


def _bit_sum_on_cpu(x: jax.Array) -> np.ndarray:
    """The same: XLA:CPU would write all of the words down first, as many bytes again or twice."""
    word = _WORDS[x.dtype.itemsize]
    parts = [np.asarray(s.data) for s in x.addressable_shards if s.replica_id == 0]
    sums = [np.sum(np.ascontiguousarray(part).view(word), dtype=np.uint32) for part in parts]
    return np.sum(np.array(sums), dtype=np.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """For each array, the sum of its elements' bit patterns modulo 2^32."""

    def bit_sum(x: jax.Array):
        here = x.is_fully_addressable and all(d.platform == "cpu" for d in x.devices())
        return _bit_sum_on_cpu(x) if here else _bit_sum(x)

    sums = jax.device_get({path: bit_sum(x) for path, x in by_path(tree).items()})
    return {path: int(value) for path, value in sums.items()}


def restore(path: pathlib.Path, item: str, abstract: Any, run: dict) -> Any:
    """The arrays of an item, laid out as `abstract` says and checked against the checksums.

    Raises:
      InputError: on every host, if the item is damaged, naming it.
    """
    # Each host reads its slices alone: orbax would have the others wait for one that cannot.
    host = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=host, active_processes={host})
    with hosts.together():
        try:
            with ocp.StandardCheckpointer(multiprocessing_options=alone) as checkpointer, quiet():
                arrays = checkpointer.restore(path / item, abstract)
        except Exception as error:
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats each task's error
            raise InputError(
                f"checkpoint {path} is damaged in {item}: {_first_line(error)}"
            ) from None
    for name, value in checksums(arrays).items():
        if run["checksums"].get(item, {}).get(name) != value:
            raise InputError(f"checkpoint {path} is damaged in {item}: {name} has changed on disk")
    return arrays


@contextlib.contextmanager
def quiet():
    """Hide orbax's warnings about sharding files, for the target's shardings are always given, and
    the errors of its threads, which are raised too."""
    hide_closed_loops()
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def hide_closed_loops() -> None:
    """Hide, from now on, what tensorstore has to say to an event loop that an error has closed."""
    if sys.unraisablehook.__module__ != __name__:
        sys.unraisablehook = partial(_unless_closed, sys.unraisablehook)
        sys.unraisablehook.__module__ = __name__


def _unless_closed(otherwise: Callable[[Any], None], unraisable: Any) -> None:
    """Also what orbax's coroutines say that are closed as the program ends."""
    said = str(unraisable.exc_value)
    if said != "Event loop is closed" and not said.startswith("sys.meta_path is None"):
        otherwise(unraisable)


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
    with hosts.together():
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
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer, quiet():
            items = {own.PARAMS: ocp.args.StandardSave(params), own.RUN: ocp.args.JsonSave(run)}
            checkpointer.save(path, args=ocp.args.Composite(**items))
    except BaseException as error:
        with quiet():
            _join(set(threading.enumerate()) - threads)
        # What tensorstore has begun goes on, and its threads say what they miss then.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        if jax.process_index() == 0:
            _remove(path)
            atexit.register(_remove, path, tries=1)
        # tensorstore says with a ValueError that a disk is full.
        if not isinstance(error, OSError | ValueError | RuntimeError):
            raise
        raise InputError(f"{one_line(path)} cannot be written: {reason(error)}") from None


def _join(threads: set[threading.Thread]) -> None:
    """Wait for threads that write, not for those that wait for work."""
    end = time.monotonic() + 2
    for thread in threads:
        with contextlib.suppress(Exception):  # orbax's threads raise what they met here, too
            thread.join(max(0, end - time.monotonic()))


def _remove(path: pathlib.Path, tries: int = 5) -> None:
    """What orbax has begun of a checkpoint, which it leaves; tensorstore may still be writing."""
    for _ in range(tries):
        for begun in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(begun, ignore_errors=True)
        time.sleep(0.1)


def reason(error: Exception) -> str:
    """In a few words, why orbax cannot write."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else one_line(_first_line(error))
