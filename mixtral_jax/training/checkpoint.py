"""Checkpoints: everything that resuming or sampling needs, written in the background by orbax.

A run's checkpoints/ holds one folder a step, and in each:

  params      the weights, by name
  optimizer   the rest of the training state
  run         JSON: config, place in the data, tokenizer (base64) and a checksum of every array

A folder gets its final name only when whole, so that a half-written one is never picked up. The
checksums are sums of bit patterns modulo 2^32: the same on every mesh, and a damaged file that
still decodes is found out.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from mixtral_jax import config_io, sharding
from mixtral_jax.config import Config, InputError, ModelConfig
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.model.mixtral import Mixtral, abstract_state
from mixtral_jax.training.step import TrainState

FOLDER = "checkpoints"


class Extras(NamedTuple):
    """What a checkpoint holds beside arrays."""

    config: Config
    data_state: np.ndarray
    """int64, a line for each row of the batch: where it is in its documents."""
    tokenizer: Tokenizer | None
    validation_loss: float | None


def _by_path(tree: Any) -> dict[str, jax.Array]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _from_paths(like: Any, arrays: dict[str, jax.Array]) -> Any:
    leaves, structure = jax.tree.flatten_with_path(like)
    return jax.tree.unflatten(structure, [arrays[jax.tree_util.keystr(p)] for p, _ in leaves])


def _split(state: TrainState) -> tuple[dict, dict]:
    """(params by name, everything else by path)."""
    return nnx.to_pure_dict(state.params), _by_path(state._replace(params=None))


def _bit_sum(x: jax.Array) -> jax.Array:
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jnp.sum(jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32), dtype=jnp.uint32)


def checksums(tree: Any) -> dict[str, int]:
    """For each array, the sum of its elements' bit patterns modulo 2^32."""
    sums = jax.device_get(jax.jit(lambda t: jax.tree.map(_bit_sum, t))(_by_path(tree)))
    return {path: int(value) for path, value in sums.items()}


def _validation_loss(metrics: dict) -> float:
    return metrics["validation_loss"]


class Checkpoints:
    """The checkpoints of one run, for writing and resuming.

    Keeps the newest `keep` and the one with the lowest validation loss.
    """

    def __init__(self, run_dir: str | pathlib.Path, keep: int):
        self.folder = pathlib.Path(run_dir).resolve() / FOLDER
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=_validation_loss, reverse=True, n=1)
        options = ocp.CheckpointManagerOptions(
            best_fn=_validation_loss,  # without it the metrics would not be written
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, extras: Extras) -> None:
        """Start writing a checkpoint; returns when the arrays may be changed again."""
        params, rest = _split(state)
        run = {
            "config": config_io.to_dict(extras.config),
            "data_state": extras.data_state.tolist(),
            "tokenizer": None,
            "checksums": {"params": checksums(params), "optimizer": checksums(rest)},
        }
        if extras.tokenizer is not None:
            run["tokenizer"] = base64.b64encode(extras.tokenizer.model_bytes).decode()
        loss = extras.validation_loss
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.StandardSave(rest),
                run=ocp.args.JsonSave(run),
            ),
            metrics={"validation_loss": float("inf") if loss is None else loss},
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Extras]:
        """The state and extras of a step, laid out as `abstract` says.

        Raises:
          InputError: naming the checkpoint if it is damaged, and the one before it that is whole.
        """
        try:
            return self._restore(step, abstract)
        except InputError as error:
            for earlier in reversed([s for s in self.steps() if s < step]):
                try:
                    self._restore(earlier, abstract)
                except InputError:
                    continue
                raise InputError(
                    f"{error}; checkpoint {earlier} before it is whole: add "
                    f"run.resume_step={earlier} to go on from there"
                ) from None
            raise

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, Extras]:
        path = self.folder / str(step)
        params, rest = _split(abstract)
        run = read_run(path)
        params = _restore_arrays(path, "params", params, run)
        rest = _restore_arrays(path, "optimizer", rest, run)
        state = _from_paths(abstract._replace(params=None), rest)
        graph_params = jax.tree.map(lambda a: a, abstract.params)
        nnx.replace_by_pure_dict(graph_params, params)
        return state._replace(params=graph_params), _extras(run)

    def set_aside_after(self, step: int) -> list[pathlib.Path]:
        """Move the checkpoints newer than a step out of the folder; returns their new paths."""
        moved = []
        for newer in [s for s in self.steps() if s > step]:
            target = self.folder.parent / f"set-aside-{FOLDER}-{newer}"
            if jax.process_index() == 0:
                (self.folder / str(newer)).rename(target)
            moved.append(target)
        if jax.process_count() > 1:
            ocp.multihost.sync_global_processes("set_aside")
        self._manager.reload()
        return moved

    def wait(self) -> None:
        """Return when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def read_run(path: pathlib.Path) -> dict:
    """The JSON of a checkpoint.

    Raises:
      InputError: if it is not there or is not this project's.
    """
    try:
        run = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(path / "run")
        missing = {"config", "data_state", "tokenizer", "checksums"} - set(run)
    except Exception as error:
        raise InputError(f"checkpoint {path} is damaged: {_first_line(error)}") from None
    if missing:
        raise InputError(f"checkpoint {path} is not of this project: run has no {missing.pop()}")
    return run


def _extras(run: dict) -> Extras:
    tokenizer = run["tokenizer"]
    if tokenizer is not None:
        tokenizer = Tokenizer.from_bytes(base64.b64decode(tokenizer))
    data_state = np.asarray(run["data_state"], np.int64)
    return Extras(config_io.from_dict(run["config"]), data_state, tokenizer, None)


def _restore_arrays(path: pathlib.Path, item: str, abstract: Any, run: dict) -> Any:
    try:
        with ocp.StandardCheckpointer() as checkpointer, _quiet():
            arrays = checkpointer.restore(path / item, abstract)
    except Exception as error:
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats each task's error
        raise InputError(f"checkpoint {path} is damaged in {item}: {_first_line(error)}") from None
    for name, value in checksums(arrays).items():
        if run["checksums"][item].get(name) != value:
            raise InputError(f"checkpoint {path} is damaged in {item}: {name} has changed on disk")
    return arrays


@contextlib.contextmanager
def _quiet():
    """Hide orbax's warnings about sharding files: the target's shardings are always given."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# ---- for sampling ------------------------------------------------------------------------------


def find(path: str | pathlib.Path) -> pathlib.Path:
    """The newest checkpoint in a run folder, in its checkpoints/ folder, or the one named itself.

    Raises:
      InputError: if there is none.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"checkpoint folder {path} does not exist")
    if (path / "run").is_dir() and (path / "params").is_dir():
        return path.resolve()
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    if not steps:
        raise InputError(
            f"{path} holds no checkpoint: name a run folder such as runs/quickstart, or one step "
            f"in its {FOLDER}/"
        )
    return max(steps, key=lambda p: int(p.name)).resolve()


def load_extras(path: pathlib.Path) -> Extras:
    """Config and tokenizer of the checkpoint at a path that `find` gave."""
    return _extras(read_run(path))


def load_model(path: pathlib.Path, config: ModelConfig, mesh: jax.sharding.Mesh) -> Mixtral:
    """The model of a checkpoint, each device reading its slices only.

    Args:
      path: from `find`.
      config: the checkpoint's, perhaps with another exchange or compute type.
      mesh: any mesh that the model's sizes split over.
    Raises:
      InputError: if the checkpoint is damaged.
    """
    graphdef, state = abstract_state(config)
    shardings = sharding.param_shardings(state, mesh)
    abstract = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )
    params = _restore_arrays(path, "params", nnx.to_pure_dict(abstract), read_run(path))
    nnx.replace_by_pure_dict(abstract, params)
    return nnx.merge(graphdef, abstract)
