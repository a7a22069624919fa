"""Which request is in which row of the cache, and what the devices do next.

Work is ordered before the host has read what came of that before it, and noted as it is ordered. A
task waits until `_admit` gives it a row and a place among the lanes of that row's device. Parts of
its prompt make `done` grow, and the row's `written`, though no device may have run them yet. The
last part makes its first token: from then on it decodes. `ordered` counts tokens that were ordered,
`tokens` holds those that were read (`pushed`), a turn or more later. It leaves the row when its
last token is ordered, or one that ends it is read. A row's `task` occupies it; its `last_task` is
the one whose options the devices' arrays have for that row, until another is admitted.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from mixtral_jax.generation.answering import Task
from mixtral_jax.generation.devices import Devices
from mixtral_jax.generation.placing import Placing
from mixtral_jax.generation.programs import Made
from mixtral_jax.generation.rows import (
    COPY,
    LEAST_PART,
    MOST_LANES,
    Part,
    Row,
    choose,
    common,
    lanes_of,
    length_of,
)

CORES = 8
"""From which two programs compile in the time of one."""


class Turn(NamedTuple):
    """What the devices have been told to do, until the host reads what came of it."""

    made: Made
    tasks: dict[int, Task]
    """By their place in `made`."""
    parts: dict[int, Part]
    """Of prompts, by place; none where it was a decoding step."""


class Scheduler:
    """The rows of the cache and, for each device, the prompts that it runs parts of: its lanes."""

    def __init__(self, devices: Devices, placing: Placing, places: int, part: int):
        """Args: places: of a row; part: most tokens of a prompt between two decoding steps."""
        self._devices, self._placing, self._places, self._part = devices, placing, places, part
        self._rows = [Row(places) for _ in range(placing.rows)]
        self._torn = False  # while what rows hold may not be what is noted of them
        self._lanes: list[list[Task]] = [[] for _ in range(placing.shards)]
        self._clock = 0
        self.fresh = True
        """Until the first turns, which do not decode: a first token comes before that compiles."""

    @property
    def free(self) -> int:
        """Rows without a task."""
        return sum(row.task is None for row in self._rows)

    def warm_up(self, score: bool) -> None:
        """Compile every shape, those of scored prompts too if asked to."""
        with self._whole():
            length = LEAST_PART
            while length <= min(self._part, self._places):
                for lanes in {1, self._lanes_of(length)}:
                    self._devices.extend(self._tasks(), {}, (lanes, length), False)
                if score:
                    self._devices.extend(self._tasks(), {}, (1, length), True)
                length *= 2
            self._devices.decode(self._tasks(), ())
            self._devices.copy(0, 0)
            self._devices.mark({})
            self.fresh = False

    def begin(self) -> None:
        """Free all rows; where cores are many, compile decoding while the first part compiles."""
        self.end()
        if not self._devices.compiled and (os.cpu_count() or 1) >= CORES:
            self._devices.begin_decoding(self._tasks())

    def end(self) -> None:
        """Free all rows."""
        for row in self._rows:
            row.task = None
        self._lanes = [[] for _ in self._lanes]

    def forget(self) -> None:
        """Let no later prompt use what the rows hold."""
        for row in self._rows:
            row.clear()

    def pushed(self, task: Task) -> None:
        """A task's newest token has been read: its row holds what came before it.

        Of an answer that failed nothing may be used again.
        """
        row = self._rows[task.row]
        if row.last_task is task:
            if task.answer is not None and task.answer.error is not None:
                row.clear()
            else:
                before = len(row.written) - len(task.prompt)
                row.write(task.tokens[before:-1])
            if task.answer is not None:
                row.task = None

    def turns(self, waiting: deque[Task]) -> list[Turn]:
        """Parts of prompts, about `part` tokens a device, and one decoding step."""
        with self._whole():
            return self._turns(waiting)

    @contextlib.contextmanager
    def _whole(self) -> Iterator[None]:
        """Where what is done within does not end, as after Ctrl-C, the next begins with empty rows.

        An exception may come between a program, which takes the memory of the progress it is given,
        and what is noted of it.
        """
        if self._torn:
            self._devices.begin_anew()
            self._rows = [Row(self._places) for _ in self._rows]
        self._torn = True
        yield
        self._torn = False

    def _turns(self, waiting: deque[Task]) -> list[Turn]:
        turns, budget = [], self._part
        while budget > 0:
            self._fill_lanes(waiting)
            if not any(self._lanes):
                break
            turn, tokens = self._next_parts()
            turns.append(turn)
            budget -= tokens
        fresh, self.fresh = self.fresh, False
        if fresh and turns:
            return turns
        if alive := {i: row.task for i, row in enumerate(self._rows) if _decodes(row.task)}:
            for place, task in alive.items():
                task.ordered += 1
                if not _decodes(task):  # its last token: the row is free for the next request
                    self._rows[place].task = None
            turns.append(Turn(self._devices.decode(self._tasks(), alive), alive, {}))
        return turns

    def _fill_lanes(self, waiting: deque[Task]) -> None:
        """Give requests rows until each device has a part's worth of prompts to run."""

        def ahead(shard: int) -> int:
            return sum(map(_left, self._lanes[shard]))

        while waiting:
            free = {
                shard: [i for i in self._placing.rows_of(shard) if self._rows[i].task is None]
                for shard, lanes in enumerate(self._lanes)
                if len(lanes) < MOST_LANES and ahead(shard) < self._part
            }
            shard = min((shard for shard in free if free[shard]), key=ahead, default=None)
            if shard is None:
                return
            for task in waiting:
                if not _waits(task) and self._admit(task, shard, free[shard]):
                    waiting.remove(task)
                    break
            else:
                return

    def _admit(self, task: Task, shard: int, free: list[int]) -> bool:
        """Give a task one of the free rows of the shard, and what it can use of what rows hold.

        Returns: false if it had better wait for what it shares with a prompt that is being run.
        """
        prefix = task.prompt[:-1] if task.options.prompt_logprobs is None else task.prompt[:0]
        own, done, source = choose(self._rows, free, prefix)
        running = [other for lanes in self._lanes for other in lanes]
        shares = [common(other.prompt, prefix) for other in running]
        if running and max(shares) >= done + COPY:
            task.behind = max(zip(running, shares, strict=True), key=lambda pair: pair[1])
            return False
        if source is not None:
            self._devices.copy(source, own)
        self._clock += 1
        row = self._rows[own]
        row.task = row.last_task = task
        row.used = self._clock
        row.clear()
        row.write(task.prompt[:done])
        task.row, task.done, task.cached = own, done, done
        self._lanes[shard].append(task)
        if task.marks or row.marked:
            self._devices.mark({shard: task})
            row.marked = task.marks
        return True

    def _tasks(self) -> list[Task | None]:
        """By row, the task that it has or had last."""
        return [row.last_task for row in self._rows]

    def _next_parts(self) -> tuple[Turn, int]:
        """Run the next parts of prompts, all of one length: that of the first on each device.

        Returns: the turn, and the most tokens that a device has in it.
        """
        first = [lanes[0] for lanes in self._lanes if lanes]
        room = min(self._places - task.done for task in first)
        length = length_of(min(max(map(_left, first)), self._part), room)
        score = any(task.options.prompt_logprobs is not None for task in first)
        several = not score and max(map(len, self._lanes)) > 1
        each = self._lanes_of(length) if several else 1
        parts: dict[int, Part] = {}
        for shard, lanes in enumerate(self._lanes):
            chosen = [
                task
                for task in lanes
                if score
                or (task.options.prompt_logprobs is None and task.done + length <= self._places)
            ]
            for lane, task in enumerate(chosen[:each], shard * each):
                start, count = task.done, min(length, _left(task))
                answers = start + count == len(task.prompt) and task.options.max_new_tokens > 0
                parts[lane] = Part(task, start, count, answers)
        for task, start, count, answers in parts.values():
            task.done += count
            self._rows[task.row].write(task.prompt[start : task.done])
            if not _left(task):
                self._lanes[self._placing.shard_of(task.row)].remove(task)
                task.ordered = int(answers)
                if not _decodes(task):
                    self._rows[task.row].task = None
        made = self._devices.extend(self._tasks(), parts, (each, length), score)
        tasks = {lane: part.task for lane, part in parts.items()}
        counts = [part.count for part in parts.values()]
        tokens = np.bincount([lane // each for lane in parts], counts)
        return Turn(made, tasks, parts), int(tokens.max())

    def _lanes_of(self, length: int) -> int:
        return lanes_of(length, self._part, self._placing.rows // self._placing.shards)


def _decodes(task: Task | None) -> bool:
    """Whether a task has its prompt behind it, and tokens left to ask for."""
    return task is not None and 0 < task.ordered < task.options.max_new_tokens


def _waits(task: Task) -> bool:
    """Whether it still had better wait for what another one's prompt makes."""
    return task.behind is not None and task.behind[0].done + COPY <= task.behind[1]


def _left(task: Task) -> int:
    """Tokens of its prompt that have not been run."""
    return len(task.prompt) - task.done
