"""A run's checkpoints: all that resuming needs, written in the background by orbax.

What a checkpoint holds is written down in interop/own.py. A folder gets its final name only when
whole, so that a half-written one is never picked up.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from mixtral_jax import hosts
from mixtral_jax.config import InputError, TrainingError
from mixtral_jax.interop import own
from mixtral_jax.interop.own import FOLDER, Extras
from mixtral_jax.interop.own_arrays import (
    by_path,
    checksums,
    hide_closed_loops,
    reason,
    restore,
)
from mixtral_jax.training.step import TrainState


def _from_paths(like: Any, arrays: dict[str, jax.Array]) -> Any:
    leaves, structure = jax.tree.flatten_with_path(like)
    return jax.tree.unflatten(structure, [arrays[jax.tree_util.keystr(p)] for p, _ in leaves])


def _split(state: TrainState) -> tuple[dict, dict]:
    """(params by name, everything else by path)."""
    return nnx.to_pure_dict(state.params), by_path(state._replace(params=None))


def _validation_loss(metrics: dict) -> float:
    return metrics["validation_loss"]


_WRITERS = ("async_save", "save_finalize")  # threads of orbax


class _Failures(logging.Filter):
    """Hides what orbax logs, which it raises too, and knows why this host could not write.

    On several hosts orbax raises that late: a host that has failed waits minutes for the others,
    which wait for what it should have written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reason = ""
        """Empty where nothing has failed."""
        logger = logging.getLogger("absl")
        logger.filters[:] = [f for f in logger.filters if not isinstance(f, _Failures)] + [self]
        logger.setLevel(logging.ERROR)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.threadName in _WRITERS and not self.reason:
            self.reason = reason(record.exc_info[1])
        return record.levelno >= logging.CRITICAL


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
        hide_closed_loops()
        self._failed = self._abandoned = False
        self._failures = _Failures()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps of the whole checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, extras: Extras) -> None:
        """Start writing a checkpoint; returns when the arrays may be changed again."""
        params, rest = _split(state)
        sums = {"params": checksums(params), "optimizer": checksums(rest)}
        run = own.run_of(extras, sums)
        loss = extras.validation_loss
        known = loss is not None and math.isfinite(loss)
        self._wait_for_hosts()
        with self._writing():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(params),
                    optimizer=ocp.args.StandardSave(rest),
                    run=ocp.args.JsonSave(run),
                ),
                metrics={"validation_loss": loss if known else float("inf")},
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
        with hosts.together():
            run = own.read_run(path)
        params = restore(path, "params", params, run)
        rest = restore(path, "optimizer", rest, run)
        state = _from_paths(abstract._replace(params=None), rest)
        graph_params = jax.tree.map(lambda a: a, abstract.params)
        nnx.replace_by_pure_dict(graph_params, params)
        return state._replace(params=graph_params), own.extras_of(run)

    def set_aside_after(self, step: int) -> list[pathlib.Path]:
        """Move the checkpoints newer than a step out of the folder; returns their new paths."""
        moved = []
        for newer in [s for s in self.steps() if s > step]:
            with hosts.together():
                target = self._free(f"set-aside-{FOLDER}-{newer}")
                if jax.process_index() == 0:
                    (self.folder / str(newer)).rename(target)
            moved.append(target)
        self._manager.reload()
        return moved

    def _free(self, name: str) -> pathlib.Path:
        """A path in the run folder where nothing is: this name, or with a number behind it."""
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        return next(path for n in names if not (path := self.folder.parent / n).exists())

    @property
    def failed(self) -> bool:
        """Whether this one of several hosts could not write: time for all of them to `check`."""
        return jax.process_count() > 1 and bool(self._failures.reason)

    def check(self) -> None:
        """Of several hosts, all of which must call it.

        Raises:
          TrainingError: on every host, if one of them could not write.
        """
        if jax.process_count() == 1:
            return
        for host, told in enumerate(hosts.gather(self._failures.reason)):
            if told:
                self._fail()
                raise TrainingError(f"host {host}: {self._unwritten(told)}")

    def _wait_for_hosts(self) -> None:
        """Return when no host of several is writing. Raises: TrainingError: as `check`."""
        if jax.process_count() == 1:
            return
        self.check()
        while hosts.on_any_host(self._manager.is_saving_in_progress()):
            time.sleep(0.05)
            self.check()

    def _fail(self) -> None:
        self._failed = True
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # it repeats each task's error

    def _unwritten(self, told: str) -> str:
        return (
            f"a checkpoint cannot be written to {self.folder}: {told}; the same command goes on "
            "from the newest one that is whole"
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Raises: TrainingError: in one line, for what orbax raises where it cannot write."""
        try:
            yield
        except (OSError, ValueError) as error:
            self._fail()
            raise TrainingError(self._unwritten(reason(error))) from None

    def wait(self) -> None:
        """Return when everything saved is on disk.

        Raises:
          TrainingError: if it cannot be written.
        """
        self._wait_for_hosts()
        with self._writing():
            self._manager.wait_until_finished()

    def abandon(self) -> None:
        """Let `close` wait for nothing: other hosts, which writing takes too, are gone."""
        self._abandoned = True

    def close(self) -> None:
        if self._abandoned:
            return
        if self._failed:  # said already; orbax would raise it again
            if jax.process_count() > 1:
                jax.distributed.shutdown()  # else its threads, and this process, wait on for others
            return
        with self._writing():  # alone: what ends this host may not end the others
            self._manager.close()  # which waits
