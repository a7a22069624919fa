"""The engine's calls to its devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np

from mixtral_jax.generation.answering import Task
from mixtral_jax.generation.compiled import Programs
from mixtral_jax.generation.placing import Placing
from mixtral_jax.generation.programs import Made, Progress, RowOptions
from mixtral_jax.generation.rows import Part


class Devices:
    """A model's parameters, the progress of its rows, and the programs that move it on."""

    def __init__(
        self,
        programs: Programs,
        params: Sequence[jax.Array],
        empty: Callable[[], Progress],
        placing: Placing,
    ):
        """Args: empty: makes a progress in which nothing is live, with the mesh set."""
        self.params = params
        self._empty = empty
        self._programs = programs
        self._placing = placing
        self._tasks: list[Task | None] | None = None
        self._rows: RowOptions | None = None
        self._alive: tuple[set[int], jax.Array] | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the progress of all rows, even where a program has taken its memory."""
        self.progress: Progress | None = None  # frees it before the next is made
        with jax.set_mesh(self._placing.mesh):
            self.progress = self._empty()

    @property
    def compiled(self) -> int:
        """How many programs have been compiled."""
        return len(self._programs)

    def extend(
        self,
        tasks: list[Task | None],
        parts: dict[int, Part],
        shape: tuple[int, int],
        score: bool,
    ) -> Made:
        """Run parts of prompts.

        Args:
          tasks: the last of each row.
          parts: by lane, counted over all devices.
          shape: lanes of each device, and the tokens that each part is padded to.
          score: whether log-probabilities of the prompts are wanted.
        """
        lanes = self._placing.lanes(shape, parts)
        arguments = (self.params, self.progress, self._placed(tasks), lanes)
        self.progress, made = self._programs("extend", *arguments, shape=shape, score=score)
        return made

    def decode(self, tasks: list[Task | None], alive: Iterable[int]) -> Made:
        """One more token in the rows that are alive."""
        self.progress, made = self._programs("decode", *self._decoding(tasks, alive))
        return made

    def begin_decoding(self, tasks: list[Task | None]) -> None:
        """Compile decoding, in a thread of its own."""
        self._programs.begin("decode", *self._decoding(tasks, ()))

    def copy(self, source: int, target: int) -> None:
        """Put the cache of one row into another."""
        rows = self._placing.whole(np.int32(source), np.int32(target))
        self.progress = self._programs("copy", self.progress, *rows)

    def mark(self, tasks: dict[int, Task]) -> None:
        """Set what the rows of tasks, by device, remember of their prompts, and their bias."""
        vocabulary = self.progress.bias_BV.shape[1]
        self.progress = self._programs(
            "admit", self.progress, *self._placing.marks(vocabulary, tasks)
        )

    def _decoding(self, tasks: list[Task | None], alive: Iterable[int]) -> tuple:
        if self._alive is None or self._alive[0] != (alive := set(alive)):
            is_alive = np.zeros(len(tasks), bool)
            is_alive[list(alive)] = True
            self._alive = (alive, *self._placing.split(is_alive))
        return self.params, self.progress, self._placed(tasks), self._alive[1]

    def _placed(self, tasks: Sequence[Task | None]) -> RowOptions:
        """What the tasks of the rows ask, on the devices; placed anew where one has changed."""
        if self._rows is None or self._tasks != tasks:
            self._tasks, self._rows = list(tasks), self._placing.row_options(tasks)
        return self._rows
