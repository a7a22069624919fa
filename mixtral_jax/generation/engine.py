"""Many requests on one model: continuous batching, prompts in parts, prefixes used again.

The cache has a fixed number of rows, split over the devices as the batch is. A request waits for a
free row; its prompt is run in parts, together with those of others, and between these the rows that
have their prompts behind them decode; a row whose answer has ended takes the next request while the
others go on. What a row's cache holds stays there: a prompt that begins as one before it, in any
row, in use or not, begins where they differ.

Shapes are few: parts of 16, 32, 64 ... tokens up to `part`, of one prompt on each device or of as
many as `rows.lanes_of` says, and one decoding step of all rows. They are compiled when first used,
or all by `warm_up`.

The devices are one turn ahead of the host: a turn begins before the host has read what the one
before it made. An answer that ends by what the model says costs one step in vain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.generation.answering import Event, Task
from mixtral_jax.generation.compiled import Programs, small_products
from mixtral_jax.generation.devices import Devices
from mixtral_jax.generation.placing import Placing, rows_that_fit
from mixtral_jax.generation.programs import Made, empty
from mixtral_jax.generation.request import Options, Request, Serving, check_request
from mixtral_jax.generation.results import Answer
from mixtral_jax.generation.routing import Routing
from mixtral_jax.generation.rows import (
    COPY,
    LEAST_PART,
    MOST_LANES,
    Row,
    choose,
    common,
    lanes_of,
    length_of,
)
from mixtral_jax.model.cache import bytes_of_row, places
from mixtral_jax.model.mixtral import Mixtral, compute_dtype
from mixtral_jax.model.unstacked import unstacked

PART = Serving.part
ROWS = 8


class Turn(NamedTuple):
    """What the devices have been told to do, until the host reads what came of it."""

    made: Made
    tasks: dict[int, Task]
    """By their place in `made`."""
    parts: dict[int, tuple[int, int, bool]]
    """Of prompts: (start, count, whether the answer begins), by place."""


class Engine:
    """Answers requests with one model on the mesh that its parameters lie on.

        engine = Engine(model, tokenizer)
        for event in engine.stream(engine.request("def main(", max_new_tokens=20)):
            print(event.text, end="")
        answers = engine.generate([engine.request("a"), engine.request("b", n=3)])

    A request's answer depends on nothing else in its batch, up to the rounding of sums.
    """

    def __init__(
        self,
        model: Mixtral,
        tokenizer: Tokenizer | None = None,
        *,
        eos_id: int | None = None,
        rows: int | None = None,
        capacity: int | None = None,
        part: int = PART,
        cache_dtype: str | None = None,
    ):
        """Args:
          tokenizer: None for answers without text.
          eos_id: ends an answer; the tokenizer's by default, and without one nothing does.
          rows: answers in progress at a time; fewer where memory does not hold their cache, and
            rounded up to a multiple of the devices that the batch is split over.
          capacity: most tokens of a prompt and its answer; the model's context by default.
          part: most tokens of a prompt between two decoding steps; a power of two from 16 on.
          cache_dtype: of keys and values: int8, or None for what is computed in.

        Raises:
          ValueError: if the model drops tokens beyond a capacity: answers would depend on others.
          InputError: if not one row fits in memory, or a value makes no sense.
        """
        self.config: ModelConfig = model.config
        for name in ("capacity_factor", "receive_factor"):
            value = getattr(self.config, name)
            if value is not None:
                raise ValueError(f"{name}={value} would drop tokens: sampling wants None")
        Serving(rows, capacity, part, cache_dtype)  # checks them
        self.tokenizer = tokenizer
        self._eos = eos_id if eos_id is not None or tokenizer is None else tokenizer.eos_id
        context = self.config.max_position_embeddings
        self.capacity = min(capacity or context, context)
        self._part, self._places = part, places(self.capacity)
        self._mesh = model.embedding_VD.get_value().sharding.mesh
        with jax.set_mesh(self._mesh):
            dtype = jnp.dtype(cache_dtype or compute_dtype(self.config))
            self._shards = sharding.batch_shards()
        size = bytes_of_row(self.config, self._places, dtype)
        fit = rows_that_fit(size, self._mesh)
        if fit < self._shards:
            raise InputError(
                f"a cache of {self._shards} rows of {self.capacity} tokens takes "
                f"{self._shards * size / 1e9:.3g} GB, which memory does not hold: use a shorter "
                "context, or cache_dtype=int8"
            )
        self.rows = min(-(-(rows or ROWS) // self._shards) * self._shards, fit)
        on_cpu, alone = self._mesh.devices.flat[0].platform == "cpu", self.rows == self._shards
        if on_cpu:
            model = unstacked(model, transposed=alone)
        graphdef, params = nnx.split(model)
        with jax.set_mesh(self._mesh):
            make = partial(empty, model, self.rows, self._places, dtype)
            progress = jax.jit(make)()
        self._placing = Placing(self._mesh, self.rows, self._shards)
        options = small_products() if on_cpu and not alone else {}
        programs = Programs(graphdef, self._mesh, options)
        self._devices = Devices(programs, params, progress, self._placing)
        self._routing = Routing(graphdef, self.config, self._placing)
        self._rows = [Row() for _ in range(self.rows)]
        self._lanes: list[list[Task]] = [[] for _ in range(self._shards)]
        self._clock, self._busy = 0, False

    # ---- for users -----------------------------------------------------------------------------

    def request(self, prompt: str, **options) -> Request:
        """A request from a text and the fields of Options."""
        if self.tokenizer is None:
            raise ValueError("an engine without a tokenizer knows tokens alone: make a Request")
        ids = (self.tokenizer.bos_id, *self.tokenizer.encode(prompt))
        return Request(ids, Options(**options))

    def stream(self, request: Request) -> Iterator[Event]:
        """Answer one request, a token at a time. Stopping early leaves the engine as good as new.

        Raises:
          InputError: at once, if it cannot be answered.
        """
        self.check(request)
        return self.run([request])

    def generate(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """The answers to each request, n of them; one that cannot be answered has `error` set."""
        answers: list[list[Answer]] = [[] for _ in requests]
        for event in self.run(requests):
            if event.answer is not None:
                answers[event.request].append(event.answer)
        return [sorted(some, key=lambda answer: answer.index) for some in answers]

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Raises: InputError: naming the request, if it cannot be answered."""
        check_request(request, self.config.vocab_size, self.capacity, name)

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Answer requests, which are read as rows become free; gives what is made as it comes.

        The last event of each answer has the whole of it. A request that cannot be answered gives
        one event, whose answer says why; the others go on.

        Raises:
          RuntimeError: if it is answering already.
        """
        if self._busy:
            raise RuntimeError("the engine is answering already: give it all requests together")
        self._busy = True
        try:
            yield from self._run(iter(requests))
        finally:
            self._busy = False
            for row in self._rows:
                row.task = None
            self._lanes = [[] for _ in range(self._shards)]

    def experts(self, tokens: Sequence[int], layer: int) -> np.ndarray:
        """ids [tokens, k] of the experts of a layer (from 0) that each token of a text goes to.

        Raises:
          InputError: if there is no such layer.
        """
        return self._routing(self._devices.params, tokens, layer)

    def warm_up(self, score: bool = False) -> None:
        """Compile every shape that serving may need, those of scored prompts too if asked to."""
        length = LEAST_PART
        while length <= min(self._part, self._places):
            for lanes in {1, self._lanes_of(length)}:
                self._devices.extend(self._asked(), {}, (lanes, length), False)
            if score:
                self._devices.extend(self._asked(), {}, (1, length), True)
            length *= 2
        self._devices.decode(self._asked(), ())
        self._devices.copy(0, 0)
        self._devices.mark({})

    def forget(self) -> None:
        """Let no later prompt use what the rows hold.

        Raises:
          RuntimeError: if it is answering.
        """
        if self._busy:
            raise RuntimeError("the engine is answering: let it end before it forgets")
        for row in self._rows:
            row.written = []

    def compiled(self) -> int:
        """How many programs have been compiled so far."""
        return self._devices.compiled

    # ---- turns ---------------------------------------------------------------------------------

    def _run(self, requests: Iterator[Request]) -> Iterator[Event]:
        if not self._devices.compiled:  # decoding compiles while the first part of a prompt does
            self._devices.begin_decoding(self._asked())
        waiting: deque[Task] = deque()
        ahead: deque[list[Turn]] = deque()
        number, more = 0, True
        while True:
            while more and len(waiting) < self.rows:
                request = next(requests, None)
                if request is None:
                    more = False
                    break
                try:
                    self.check(request, f"prompt {number + 1}")
                except InputError as error:
                    yield Event.refused(number, request, str(error))
                else:
                    waiting.extend(self._tasks(number, request))
                number += 1
            turns = self._turns(waiting)
            if turns:
                ahead.append(turns)
            if len(ahead) > 1 or (ahead and not turns):
                for turn in ahead.popleft():
                    yield from self._read(turn)
            elif not turns and not waiting and not more:
                return

    def _tasks(self, number: int, request: Request) -> list[Task]:
        return [
            Task.begin(number, index, request, self.tokenizer, self._eos)
            for index in range(request.options.n)
        ]

    def _turns(self, waiting: deque[Task]) -> list[Turn]:
        """Parts of prompts, about `part` tokens a device, and one decoding step."""
        turns, budget = [], self._part
        while budget > 0:
            self._fill_lanes(waiting)
            if not any(self._lanes):
                break
            turn, tokens = self._next_parts()
            turns.append(turn)
            budget -= tokens
        if alive := {i: row.task for i, row in enumerate(self._rows) if _decodes(row.task)}:
            for place, task in alive.items():
                task.asked += 1
                if not _decodes(task):  # its last token: the row is free for the next request
                    self._rows[place].task = None
            turns.append(Turn(self._devices.decode(self._asked(), alive), alive, {}))
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
                if self._admit(task, shard, free[shard]):
                    waiting.remove(task)
                    break
            else:
                return

    def _admit(self, task: Task, shard: int, free: list[int]) -> bool:
        """Give a task one of the free rows of the shard, and what it can use of what rows hold.

        Returns: false if it had better wait for what it shares with a prompt that is being run.
        """
        prefix = task.prompt[:-1] if task.options.prompt_logprobs is None else ()
        own, done, source = choose(self._rows, free, prefix)
        running = [other.prompt for lanes in self._lanes for other in lanes]
        if any(common(prompt, prefix) >= done + COPY for prompt in running):
            return False
        if source is not None:
            self._devices.copy(source, own)
        self._clock += 1
        row = self._rows[own]
        row.task = row.asks = task
        row.used, row.written = self._clock, list(task.prompt[:done])
        task.row, task.done, task.cached = own, done, done
        self._lanes[shard].append(task)
        if task.marks or row.marked:
            self._devices.mark({shard: task})
            row.marked = task.marks
        return True

    def _asked(self) -> list[Task | None]:
        """By row, the task that it has or had last."""
        return [row.asks for row in self._rows]

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
        parts: dict[int, tuple[Task, int, int, bool]] = {}
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
                parts[lane] = (task, start, count, answers)
        for task, start, count, answers in parts.values():
            task.done += count
            self._rows[task.row].written += task.prompt[start : task.done]
            if not _left(task):
                self._lanes[self._placing.shard_of(task.row)].remove(task)
                task.asked = int(answers)
                if not _decodes(task):
                    self._rows[task.row].task = None
        made = self._devices.extend(self._asked(), parts, (each, length), score)
        tasks = {lane: task for lane, (task, *_) in parts.items()}
        tokens = np.bincount([lane // each for lane in parts], [p[2] for p in parts.values()])
        return Turn(made, tasks, {lane: part[1:] for lane, part in parts.items()}), int(
            tokens.max()
        )

    def _lanes_of(self, length: int) -> int:
        return lanes_of(length, self._part, self.rows // self._shards)

    def _read(self, turn: Turn) -> Iterator[Event]:
        """What a turn made, for its tasks."""
        made, options = turn.made, [task.options for task in turn.tasks.values()]
        if all(o.logprobs is None for o in options):
            made = made._replace(logprobs=None)
        if all(o.prompt_logprobs is None for o in options):
            made = made._replace(prompt=None)
        made = jax.device_get(made)
        for place, task in turn.tasks.items():
            if task.answer is not None:  # it had ended before: a step in vain
                continue
            if place in turn.parts:
                start, count, answers = turn.parts[place]
                if task.options.prompt_logprobs is not None:
                    task.scored(_at(made.prompt, place), start, count)
                if not answers:
                    if start + count == len(task.prompt):
                        yield task.end("length", None)
                    continue
            wanted = task.options.logprobs is not None
            found = _at(made.logprobs, place) if wanted else None
            event = task.push(int(made.token_B[place]), found)
            row = self._rows[task.row]
            if row.asks is task:
                row.written = [*task.prompt, *task.tokens[:-1]]
                if task.answer is not None:
                    row.task = None
            yield event


def _decodes(task: Task | None) -> bool:
    """Whether a task has its prompt behind it, and tokens left to ask for."""
    return task is not None and 0 < task.asked < task.options.max_new_tokens


def _left(task: Task) -> int:
    """Tokens of its prompt that have not been run."""
    return len(task.prompt) - task.done


def _at(arrays, place: int):
    return jax.tree.map(lambda array: array[place], arrays)
