"""The run: set up or resume, then step, report, validate and save until done."""

from __future__ import annotations

import math
import pathlib
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
from flax import nnx

from mixtral_jax import config_io, hosts, sharding
from mixtral_jax.command_line import StartUp, give_back_memory, interruptions, one_line
from mixtral_jax.config import Config, InputError, TrainingError
from mixtral_jax.data.batches import train_batches
from mixtral_jax.data.corpus import check_source
from mixtral_jax.data.packing import Batch
from mixtral_jax.data.validation import validation_set
from mixtral_jax.files import naming
from mixtral_jax.interop.models import open_checkpoint
from mixtral_jax.training import report, run_folder
from mixtral_jax.training.announcement import announcement
from mixtral_jax.training.checkpoint import FOLDER, Checkpoints, Extras
from mixtral_jax.training.metrics import Clock, Reporter, say, training_record, warnings_said
from mixtral_jax.training.placement import Placement
from mixtral_jax.training.step import (
    TrainState,
    abstract_train_state,
    initial_state,
    kernels_of_step,
    make_train_step,
    make_validation_step,
    state_from,
)
from mixtral_jax.training.texts import fingerprints, open_texts


def train(config: Config) -> None:
    """Train as the config says, or go on where its run folder left off.

    Raises:
      InputError: for what a user can mend; nothing has been written then.
      TrainingError: if too many steps in a row were not finite, the run folder takes no more, or
        another host is gone.
    """
    start_up = StartUp()
    sharding.start(config.mesh)
    mesh = sharding.mesh_from_config(config.mesh)
    hosts.same_program(config_io.by_key(config))
    start_up.end("devices")
    with jax.set_mesh(mesh), run_folder.Hold() as hold, warnings_said():
        kernels_of_step(config)
        with naming(f"run.dir={config.run.dir}"):
            run = Run(config, mesh, start_up, hold)
        try:
            try:
                run.loop()
            except jax.errors.JaxRuntimeError as error:
                if jax.process_count() == 1:
                    raise
                run.checkpoints.abandon()
                raise TrainingError(_lost(error)) from None
            finally:
                run.close()
        except OSError as error:
            raise TrainingError(f"{config.run.dir} cannot be written: {error}") from None


def _lost(error: jax.errors.JaxRuntimeError) -> str:
    """What is said where a step of several hosts fails: most often, one of them is gone."""
    return (
        f"host {jax.process_index()} cannot go on with the others, if they are still there "
        f"({str(error).splitlines()[0][:200]}): the same command on all of them goes on from the "
        "newest checkpoint"
    )


class Run:
    """One training run on one mesh: the state, the data and the files that belong together."""

    def __init__(
        self, config: Config, mesh: jax.sharding.Mesh, start_up: StartUp, hold: run_folder.Hold
    ):
        self.config, self.mesh, self._start_up = config, mesh, start_up
        self._profiling, self.last_validation, self._saved = False, None, 0
        folder = pathlib.Path(config.run.dir)
        with hosts.together():
            begun = run_folder.check(config)
            if not begun:
                check_source(config)
            else:
                hold.take(folder)
        run_folder.check_shared(folder, begun)
        self.placement = Placement(config, mesh)
        checkpoints, self.first = self._found(folder, begun)
        corpus = self.files = self.tokenizer = None
        with hosts.together():
            if config.data.source == "files":
                checkpoint = checkpoints and checkpoints.folder / str(self.first)
                corpus, self.tokenizer = open_texts(config, checkpoint, say)
                self.files = corpus.files
            self.batches = train_batches(config, self.tokenizer, self.placement.rows, corpus)
            self.held_out = None
            if config.training.validate_every:
                self.held_out = validation_set(config, self.tokenizer, corpus)
        if corpus is not None:
            hosts.same(*fingerprints(corpus, self.tokenizer))
        start_up.end("data")
        if self.first < config.training.steps:
            # Beside making the state, which on CPU is mostly compiling too.
            self._compiling = ThreadPoolExecutor(1, "compile").submit(self._compile)
        self.state = self._fresh_state() if checkpoints is None else self._restored(checkpoints)
        start_up.end("state")
        with hosts.together():
            folder.mkdir(parents=True, exist_ok=True)
            hold.take(folder)
        run_folder.check_shared(folder, True)
        with hosts.together():
            self.folder = run_folder.write(config)
            if self.tokenizer is not None and jax.process_index() == 0:
                self.tokenizer.save(self.folder / self.tokenizer.file_name)
            self.reporter = Reporter(self.folder, self.first, config.training.steps)
        self.checkpoints = Checkpoints(self.folder, config.training.keep_checkpoints)
        self._validation_step = jax.jit(make_validation_step(config))

    def _found(self, folder: pathlib.Path, begun: bool) -> tuple[Checkpoints | None, int]:
        """The checkpoints to go on from, if there are any, and the step; otherwise step 0."""
        wanted, checkpoints, steps = self.config.run.resume_step, None, []
        if begun and (folder / FOLDER).is_dir():
            checkpoints = Checkpoints(folder, self.config.training.keep_checkpoints)
            steps = checkpoints.steps()
        hosts.same({f"the checkpoints of run.dir={folder}": str(steps)}, run_folder.SHARED)
        if wanted is not None and wanted not in steps:
            raise InputError(f"run.resume_step={wanted} is not a checkpoint of {folder}: {steps}")
        if not steps:
            return None, 0
        return checkpoints, steps[-1] if wanted is None else wanted

    def _restored(self, checkpoints: Checkpoints) -> TrainState:
        """What the checkpoint of the first step holds; the batches go on from there too."""
        config, step = self.config, self.first
        state, extras = checkpoints.restore(step, abstract_train_state(config, self.mesh))
        for path in checkpoints.set_aside_after(step):
            say(f"moved the newer checkpoint to {path}")
        checkpoints.close()
        self.batches.restore(extras.data_state[self.placement.rows], step)
        self._saved = step
        say(f"resuming {config.run.dir} at step {step}")
        return state

    def _fresh_state(self) -> TrainState:
        """Random weights, or those of model.checkpoint."""
        config = self.config
        if not config.model.checkpoint:
            return initial_state(config, self.mesh)
        with hosts.together():
            opened = open_checkpoint(config.model.checkpoint)
        model = opened.load(config.model, self.mesh)
        say(f"starting from the weights in {config.model.checkpoint}")
        return state_from(nnx.state(model), config, self.mesh)

    def loop(self) -> None:
        """Step until training.steps, or until told to stop."""
        training, steps = self.config.training, self.config.training.steps
        if self.first >= steps:
            say(f"{self.folder} is complete at step {self.first}: raise training.steps to go on")
            if not (self.folder / report.FILE).exists():
                self._finish()
            return
        for line in announcement(self.config, self.mesh, self.held_out, self.first):
            say(line)
        train_step, seconds = self._compiling.result()
        give_back_memory()
        say(f"compiled in {seconds:.1f} s")
        self._start_up.end("compiling")
        clock, dropped = Clock(), 0.0
        with interruptions(signal.SIGTERM) as told:
            for step in range(self.first + 1, steps + 1):
                self._profile(step)
                batch = self._next_batch(step)
                self.state, metrics = train_step(self.state, batch)
                metrics = jax.device_get(metrics)
                self._check(step, int(metrics.skipped_in_a_row))
                dropped += metrics.statistics.dropped.sum()
                if step == self.first + 1:
                    self._start_up.end("the step")
                    say(self._start_up.report("step"))
                clock.steps += 1
                record = None
                if step % training.log_every == 0 or step == steps:
                    record = training_record(step, metrics, clock.lap(), dropped, self.config)
                    self.reporter.write(record)
                    dropped = 0.0
                self.reporter.advance(step, record)
                if step < steps and hosts.on_any_host(told.is_set() or self.checkpoints.failed):
                    self.checkpoints.check()
                    # At once: whoever stops it may not wait.
                    if record is None:
                        record = training_record(step, metrics, clock.lap(), dropped, self.config)
                        self.reporter.write(record)
                    self._save(step, None)
                    self.checkpoints.wait()
                    say(f"stopped by a signal; saved at step {step}")
                    return
                with clock.paused():
                    self._validate_and_save(step, int(metrics.skipped_in_a_row))
        self._finish()

    def _next_batch(self, step: int) -> Batch:
        """The batch of a step; where the data cannot be read, what was trained so far is saved."""
        try:
            return self.placement(next(self.batches))
        except InputError:
            if jax.process_count() == 1 and step - 1 > self._saved:
                self._save(step - 1, None)
                self.checkpoints.wait()
                say(f"saved at step {step - 1}")
            raise

    def _compile(self) -> tuple[Callable, float]:
        """The step, compiled, and how many seconds that took; for a thread of its own."""
        began = time.perf_counter()
        with jax.set_mesh(self.mesh):
            step = jax.jit(make_train_step(self.config), donate_argnums=0)
            abstract = abstract_train_state(self.config, self.mesh)
            compiled = step.lower(abstract, self.placement.abstract()).compile()
        return compiled, time.perf_counter() - began

    def _check(self, step: int, row: int) -> None:
        """Stop the run if too many steps in a row were skipped."""
        if row and (row == 1 or row % 10 == 0):
            say(f"step {step}: loss or gradient not finite; {row} in a row skipped")
        if row >= self.config.training.max_skipped_steps:
            raise TrainingError(
                f"loss or gradient was not finite in {row} steps in a row, the last of them step "
                f"{step}: lower training.learning_rate, or go on from a checkpoint in "
                f"{self.checkpoints.folder}"
            )

    def _profile(self, step: int) -> None:
        steps = self.config.training.profile_range
        if steps and step == max(steps[0], self.first + 1) <= steps[1]:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self._profiling = True
        if self._profiling and step > steps[1]:
            self._end_profile()

    def _end_profile(self) -> None:
        if self._profiling:
            self._profiling = False
            jax.profiler.stop_trace()
            say(f"profile: {self.folder}/profile")

    # ---- validation and checkpoints ------------------------------------------------------------

    def _validate_and_save(self, step: int, skipped: int) -> None:
        """Where the step is one for it; skipped: steps in a row, the last of them this one."""
        training, loss = self.config.training, None
        last = step == training.steps
        save = last or step % training.checkpoint_every == 0
        if training.validate_every and (save or step % training.validate_every == 0):
            loss = self._validate(step)
        # The weights, which skipped steps leave as they were, may be at fault: many saves of them
        # would push out good ones. One where a run ends, or is stopped, loses nothing.
        if save and skipped and not last:
            say(f"step {step}: not saved, as {skipped} steps in a row were skipped")
        elif save:
            self._save(step, loss)

    def _save(self, step: int, loss: float | None) -> None:
        state = self.placement.of_all_rows(self.batches.state)
        extras = Extras(self.config, state, self.tokenizer, loss, self.files)
        self.checkpoints.save(step, self.state, extras)
        self._saved = step

    def _validate(self, step: int) -> float:
        """Score the held-out text; writes a validation line and returns the loss."""
        rows = list(range(self.config.training.batch_size))
        nats = tokens = dropped = 0.0
        for batch in self.held_out.batches:
            mine = self.placement(batch, rows)
            sums, lost = jax.device_get(self._validation_step(self.state.params, mine))
            nats, tokens = nats + float(sums.cross_entropy), tokens + float(sums.tokens)
            dropped += float(lost)
        record = {"step": step, "validation_loss": nats / tokens}
        model = self.config.model
        if model.capacity_factor is not None or model.receive_factor is not None:
            record["validation_dropped_assignments"] = int(dropped)
        if self.held_out.text:
            record["validation_bits_per_byte"] = nats / math.log(2) / len(self.held_out.text)
        self.reporter.write(record)
        self.last_validation = record
        return record["validation_loss"]

    # ---- the end -------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Draw the report and say how the run went."""
        self._end_profile()
        self.checkpoints.wait()
        malformed = self.batches.malformed
        if jax.process_index() != 0:
            return
        compressors, lines = {}, []
        if self.held_out is not None and self.held_out.text:
            text = self.held_out.text
            compressors = report.compression_bits_per_byte(text)
            if self.last_validation is not None:
                model = self.last_validation["validation_bits_per_byte"]
                lines = report.summary_lines(model, compressors, len(text))
        balanced = float(self.config.model.num_experts_per_tok)
        path = report.draw_report(self.folder, balanced, compressors)
        if malformed.count:
            lines.append(f"skipped {malformed}")
        self.reporter.close()
        lines += [f"report: {path}", f"checkpoints: {self.folder / FOLDER}"]
        print("\n".join(map(one_line, lines)))

    def close(self) -> None:
        self._end_profile()
        self.batches.close()
        self.reporter.close()
        self.checkpoints.close()
