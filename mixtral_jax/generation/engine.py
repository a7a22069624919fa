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

import itertools
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

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
from mixtral_jax.generation.placing import Placing, memory_of_device, rows_that_fit
from mixtral_jax.generation.programs import NOTHING, empty
from mixtral_jax.generation.request import Options, Request, Serving, check_request
from mixtral_jax.generation.results import Answer
from mixtral_jax.generation.routing import ChosenExperts
from mixtral_jax.generation.scheduler import Scheduler, Turn
from mixtral_jax.interop.strict_json import quote
from mixtral_jax.kernels import platform
from mixtral_jax.model.cache import bytes_of_row, places
from mixtral_jax.model.mixtral import Mixtral, compute_dtype
from mixtral_jax.model.unstacked import converts_blocks, in_layers, unstacked, whole_fits

PART = Serving.part
ROWS = 8
SLOW = 0.01
"""Seconds from which an iterator's next request had better not be waited for too."""
_END: Any = object()


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
        context: int | None = None,
        part: int = PART,
        cache_dtype: str | None = None,
        consume: bool = False,
    ):
        """Args:
          tokenizer: None for answers without text.
          eos_id: ends an answer; the tokenizer's by default, and without one nothing does.
          rows: answers in progress at a time; fewer where memory does not hold their cache, and
            rounded up to a multiple of the devices that the batch is split over.
          context: most tokens of a prompt and its answer, up to the model's, which is the default.
          part: most tokens of a prompt between two decoding steps; a power of two from 16 on.
          cache_dtype: of keys and values: int8, or None for what is computed in.
          consume: on GPU and TPU, whose engine has the layers apart, free the model's own arrays,
            which nothing else may then use: memory need not hold the weights twice.

        Raises:
          ValueError: if the model drops tokens beyond a capacity: answers would depend on others.
          InputError: if not one row fits in memory, the tokenizer is another model's, or a value
            makes no sense.
        """
        self.config: ModelConfig = model.config
        for name in ("capacity_factor", "receive_factor"):
            value = getattr(self.config, name)
            if value is not None:
                raise ValueError(f"{name}={value} would drop tokens: sampling wants None")
        Serving(rows, context, part, cache_dtype)  # checks them
        if tokenizer is not None and tokenizer.vocab_size != self.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} pieces and the model's vocab_size is "
                f"{self.config.vocab_size}: give the model's own, or None"
            )
        self.tokenizer = tokenizer
        self._eos = eos_id if eos_id is not None or tokenizer is None else tokenizer.eos_id
        most = self.config.max_position_embeddings
        self.context = min(context or most, most)
        mesh, length = model.embedding_VD.get_value().sharding.mesh, places(self.context)
        with jax.set_mesh(mesh):
            dtype = jnp.dtype(cache_dtype or compute_dtype(self.config))
            shards, here = sharding.batch_shards(), platform()
        if here != "cpu":
            whole = whole_fits(model, mesh, memory_of_device(mesh))
            model = in_layers(model, consume=consume, whole=whole)
        size = bytes_of_row(self.config, length, dtype)
        self.rows = self._rows_in_memory(rows or ROWS, size, mesh, shards)
        options: dict[str, str] = {}
        if here == "cpu":
            several = self.rows > shards
            model = unstacked(model, transposed=not several)
            options = small_products() if several and not converts_blocks(model) else {}
        graphdef, state = nnx.split(model)
        params, structure = jax.tree.flatten(state)  # once, and not for each call

        def merge(params):
            return nnx.merge(graphdef, jax.tree.unflatten(structure, params))

        fresh = jax.jit(partial(empty, model, self.rows, length, dtype))
        placing = Placing(mesh, self.rows, shards)
        self._devices = Devices(Programs(merge, mesh, options), params, fresh, placing)
        self._scheduler = Scheduler(self._devices, placing, length, part)
        self._chosen_experts = ChosenExperts(merge, self.config, placing)
        self._busy = False

    def _rows_in_memory(self, wanted: int, size: int, mesh: jax.sharding.Mesh, shards: int) -> int:
        """As many rows of `size` bytes as are wanted, rounded up for the shards, or as fit."""
        fit = rows_that_fit(size, mesh)
        if fit < shards:
            raise InputError(
                f"a cache of {shards} rows of {self.context} tokens takes "
                f"{shards * size / 1e9:.3g} GB, which memory does not hold: use a shorter "
                "context, or cache_dtype=int8"
            )
        return min(-(-wanted // shards) * shards, fit)

    # ---- for users -----------------------------------------------------------------------------

    def request(self, prompt: str, **options) -> Request:
        """A request from a text and the fields of Options."""
        if self.tokenizer is None:
            raise ValueError("an engine without a tokenizer knows tokens alone: make a Request")
        ids = (self.tokenizer.bos_id, *self.tokenizer.encode(prompt))
        return Request(ids, Options(**options))

    def stream(self, request: Request) -> Iterator[Event]:
        """Answer one request, a token at a time.

        Once the stream is closed, or dropped, the engine is as good as new, however early.

        Raises:
          InputError: at once, if it cannot be answered.
        """
        self.check(request)
        return self.run([request])

    def generate(self, requests: Iterable[Request]) -> list[list[Answer]]:
        """The answers to each request, n of them; one that cannot be answered has `error` set."""
        asked = list(requests)
        answers: list[list[Answer]] = [[] for _ in asked]
        for event in self.run(asked):
            if event.answer is not None:
                answers[event.request].append(event.answer)
        return [sorted(some, key=lambda answer: answer.index) for some in answers]

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Raises:
        InputError: naming the request, if it cannot be answered.
        TypeError: if it is none.
        """
        if not isinstance(request, Request):
            kind = type(request).__name__
            raise TypeError(f"{name} is of type {kind}, not a Request: engine.request makes one")
        if request.options.stop and self.tokenizer is None:
            raise InputError(
                f"{name}: stop={quote(request.options.stop)} is text, and the engine has no "
                "tokenizer: use stop_token_ids"
            )
        check_request(request, self.config.vocab_size, self.context, name)

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Answer requests, which are read as rows become free; gives what is made as it comes.

        The last event of each answer has the whole of it. A request that cannot be answered gives
        one event, whose answer says why; the others go on. So does an answer end whose logits are
        not finite.

        An iterator is asked for the next request between turns, where a row is free, after all
        that has been made was given: while it waits, so do the answers in progress.

        Raises:
          RuntimeError: if it is answering already.
          TypeError: for what is no Request.
        """
        if self._busy:
            raise RuntimeError(
                "the engine is answering already: give it all requests together, and close() the "
                "stream that you left"
            )
        self._busy = True
        try:
            yield from self._run(iter(requests), isinstance(requests, Collection))
        finally:
            self._busy = False
            self._scheduler.end()

    def experts(self, tokens: Sequence[int], layer: int) -> np.ndarray:
        """ids [tokens, k] of the experts of a layer (from 0) that each token of a text goes to.

        Raises:
          InputError: if there is no such layer or token, or the text goes beyond the context.
        """
        text = Request(tokens, Options(0, prompt_logprobs=0))
        vocabulary, context = self.config.vocab_size, self.config.max_position_embeddings
        check_request(text, vocabulary, context, "the text")
        return self._chosen_experts(self._devices.params, tokens, layer)

    def warm_up(self, score: bool = False) -> None:
        """Compile every shape that serving may need, those of scored prompts too if asked to."""
        self._scheduler.warm_up(score)

    def forget(self) -> None:
        """Let no later prompt use what the rows hold.

        Raises:
          RuntimeError: if it is answering.
        """
        if self._busy:
            raise RuntimeError("the engine is answering: let it end before it forgets")
        self._scheduler.forget()

    def compiled(self) -> int:
        """How many programs have been compiled so far."""
        return self._devices.compiled

    # ---- turns ---------------------------------------------------------------------------------

    def _run(self, requests: Iterator[Request], at_hand: bool) -> Iterator[Event]:
        """Args: at_hand: whether no request need be waited for."""
        self._scheduler.begin()
        waiting: deque[Task] = deque()
        ahead: deque[list[Turn]] = deque()
        number, more = 0, True
        while True:
            if more and not at_hand and len(waiting) < self._scheduler.free:
                for turn in itertools.chain(*ahead):
                    yield from self._read(turn)
                ahead.clear()
            most = self.rows if at_hand else self._scheduler.free
            while more and len(waiting) < most:
                began = time.monotonic()
                request = next(requests, _END)
                slow = not number or time.monotonic() - began > SLOW  # the first waits for none
                if request is _END:
                    more = False
                    break
                try:
                    self.check(request, f"prompt {number + 1}")
                except InputError as error:
                    yield Event.refused(number, request, str(error))
                else:
                    waiting.extend(self._tasks(number, request))
                number += 1
                if slow and not at_hand and jax.process_count() == 1:  # hosts read in step
                    break
            fresh = self._scheduler.fresh  # turns() ends it
            turns = self._scheduler.turns(waiting)
            if turns:
                ahead.append(turns)
            if len(ahead) > 1 or (ahead and (fresh or not turns)):
                for turn in ahead.popleft():
                    yield from self._read(turn)
            elif not turns and not waiting and not more:
                return

    def _tasks(self, number: int, request: Request) -> list[Task]:
        return [
            Task.begin(number, index, request, self.tokenizer, self._eos)
            for index in range(request.options.n)
        ]

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
                _, start, count, answers = turn.parts[place]
                if task.options.prompt_logprobs is not None:
                    task.scored(_at(made.prompt, place), start, count)
                if not answers:
                    if start + count == len(task.prompt):
                        yield task.end_scored()
                    continue
            wanted = task.options.logprobs is not None
            found = _at(made.logprobs, place) if wanted else None
            token = int(made.token_B[place])
            if token == NOTHING:
                event = task.fail(f"token {len(task.tokens) + 1} of the answer")
            else:
                event = task.push(token, found)
            self._scheduler.pushed(task)
            yield event


def _at(arrays, place: int):
    return jax.tree.map(lambda array: array[place], arrays)
