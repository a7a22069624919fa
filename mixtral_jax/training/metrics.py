"""What a run reports: metrics.jsonl, TensorBoard and the progress bar.

metrics.jsonl has one JSON object a line. Training lines hold step, loss (cross-entropy, nats a
token), load_balance, router_z, grad_norm, learning_rate, tokens_per_second, step_seconds, mfu
(where the chip's peak is known), dropped_assignments (assignments dropped for want of room since
the line before), skipped_steps, expert_load_max_over_mean (a number a layer) and expert_share (for
each layer, each expert's share of the assignments). A number that is not finite is null. Validation
lines hold step, validation_loss (nats a token), validation_dropped_assignments where a bound is
set, and, for text, validation_bits_per_byte.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from mixtral_jax.command_line import one_line
from mixtral_jax.config import Config
from mixtral_jax.files import whole_file
from mixtral_jax.interop.strict_json import finite
from mixtral_jax.model.flops import PEAK_FLOPS, training_flops_per_token
from mixtral_jax.training.step import StepMetrics


def training_record(
    step: int, metrics: StepMetrics, seconds: float, dropped: float, config: Config
) -> dict:
    """One training line, from a step's metrics on the host, the mean seconds a step took and the
    assignments dropped since the line before."""
    assignments = np.asarray(metrics.statistics.assignments_E, np.float64)
    share = assignments / np.maximum(assignments.sum(axis=-1, keepdims=True), 1)
    record = {
        "step": step,
        "loss": float(metrics.losses.cross_entropy),
        "load_balance": float(metrics.losses.load_balance),
        "router_z": float(metrics.losses.router_z),
        "grad_norm": float(metrics.grad_norm),
        "learning_rate": float(metrics.learning_rate),
        "tokens_per_second": float(metrics.tokens) / seconds,
        "step_seconds": seconds,
        "dropped_assignments": int(dropped),
        "skipped_steps": int(metrics.skipped),
        "expert_load_max_over_mean": (share.max(axis=-1) * share.shape[-1]).round(4).tolist(),
        "expert_share": share.round(5).tolist(),
    }
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    if peak:
        flops = training_flops_per_token(config.model, config.training.sequence_length)
        rate = record["tokens_per_second"] / config.mesh.size
        record["mfu"] = rate * flops / peak
    return record


def trim(path: pathlib.Path, last_step: int) -> None:
    """Drop the lines after a step, and a half-written one, before a run goes on from there."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("step", 0) <= last_step:
            kept.append(line + "\n")
    with whole_file(path) as unfinished:
        unfinished.write_text("".join(kept), encoding="utf-8")


class Clock:
    """Mean seconds a step, without the time spent validating and saving."""

    def __init__(self) -> None:
        self.steps = 0
        self._began = time.perf_counter()

    def lap(self) -> float:
        """Seconds a step since the last lap."""
        now = time.perf_counter()
        mean = (now - self._began) / max(self.steps, 1)
        self._began, self.steps = now, 0
        return mean

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        now = time.perf_counter()
        yield
        self._began += time.perf_counter() - now


def say(text: str) -> None:
    """Print a line on the first host, above the progress bar if there is one."""
    if jax.process_index() == 0:
        _print(text)


def _print(text: str) -> None:
    tqdm.write(one_line(text))
    sys.stdout.flush()


class _Printed(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _print(record.getMessage())


@contextlib.contextmanager
def warnings_said() -> Iterator[None]:
    """A block in which what the project warns of is printed as `say` does, on every host."""
    logger, handler = logging.getLogger(__name__.partition(".")[0]), _Printed()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


class Reporter:
    """Writes records on the first host, and moves the progress bar there."""

    def __init__(self, run_dir: pathlib.Path, first_step: int, steps: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        path = run_dir / "metrics.jsonl"
        trim(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        from tensorboardX import SummaryWriter  # slow to import

        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(
            total=steps,
            disable=first_step >= steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )

    def write(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and its numbers to TensorBoard."""
        if not self._active:
            return
        self._file.write(json.dumps({k: finite(v) for k, v in record.items()}) + "\n")
        self._file.flush()
        for name, value in record.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "step":
                self._board.add_scalar(name, value, record["step"])
            elif name == "expert_load_max_over_mean":
                for layer, load in enumerate(value):
                    self._board.add_scalar(f"{name}/layer_{layer}", load, record["step"])

    def advance(self, step: int, record: dict[str, Any] | None) -> None:
        """Move the bar to a step, and show a record's loss and speed beside it."""
        if not self._active:
            return
        if record is not None:
            speed = record["tokens_per_second"]
            text = f"loss {record['loss']:.3f}, {speed:,.0f} tokens/s"
            if record["dropped_assignments"]:
                text += f", {record['dropped_assignments']} dropped"
            if record["skipped_steps"]:
                text += f", {record['skipped_steps']} steps skipped"
            self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        if self._active:
            self._active = False
            self._bar.close()
            self._file.close()
            self._board.close()
