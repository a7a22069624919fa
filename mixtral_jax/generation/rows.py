"""The rows of the engine's cache as the host knows them, and the sizes it has programs for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixtral_jax.generation.answering import Task
from mixtral_jax.model.cache import ROUND

LEAST_PART = ROUND
MOST_LANES = 8
"""Prompts that a device runs parts of at a time."""
STEP = 1024
"""Places by which large caches differ."""
COPY = 32
"""Tokens in common from which it pays to copy another row's cache."""


class Part(NamedTuple):
    """Tokens of a task's prompt that one lane runs."""

    task: Task
    start: int
    count: int
    answers: bool
    """Whether the answer begins at its end."""


class Row:
    """A row of the cache, as the host knows it."""

    def __init__(self, places: int):
        self.task: Task | None = None
        self.last_task: Task | None = None
        """The task that it has, or had last."""
        self.used = 0
        """When it was taken last."""
        self.marked = False
        """Whether it has a history or a bias, which the next request must not inherit."""
        self._tokens, self._count = np.empty(places, np.int32), 0

    @property
    def written(self) -> np.ndarray:
        """The tokens whose keys and values it holds, from its first place on."""
        return self._tokens[: self._count]

    def clear(self) -> None:
        """Let no request use what it holds."""
        self._count = 0

    def write(self, tokens: np.ndarray | list[int]) -> None:
        """Note tokens in the places after those that are written."""
        self._tokens[self._count : self._count + len(tokens)] = tokens
        self._count += len(tokens)


def choose(
    rows: Sequence[Row], free: Sequence[int], prompt: np.ndarray
) -> tuple[int, int, int | None]:
    """Where a request begins.

    Args:
      free: the rows that it may take, at least one.
      prompt: the tokens that it could find in a row.
    Returns:
      (its row, tokens of the prompt that are there, a row to copy them from first or None).
    """
    shared = [common(row.written, prompt) for row in rows]
    oldest = min(free, key=lambda i: rows[i].used)
    own = max(free, key=lambda i: (shared[i], -rows[i].used))
    best = max(range(len(rows)), key=lambda i: shared[i])
    if shared[best] >= shared[own] + COPY:
        return oldest, shared[best], best
    if shared[own] >= LEAST_PART:
        return own, shared[own], None
    return oldest, 0, None


def common(written: np.ndarray, prompt: np.ndarray) -> int:
    """How many tokens two sequences have in common at their beginning."""
    count = min(len(written), len(prompt))
    for place, (one, other) in enumerate(zip(written[:4], prompt[:4])):  # as most differ
        if one != other:
            return place
    differ = written[:count] != prompt[:count]
    return int(differ.argmax()) if differ.any() else count


def context_for(tokens: int) -> int:
    """The context that holds so many tokens and leads to one of few sizes of the cache.

    They are powers of two, and multiples of STEP from there on, as doubling wastes memory.
    """
    size = 64
    while size - ROUND < tokens:
        size += min(size, STEP)
    return size - ROUND


def length_of(tokens: int, room: int | None = None) -> int:
    """The power of two, 16 or more, that holds so many tokens, or the last one within room."""
    length = LEAST_PART
    while length < tokens and (room is None or 2 * length <= room):
        length *= 2
    return length


def lanes_of(length: int, part: int, rows: int) -> int:
    """Lanes of a device with so many rows, where several prompts run together.

    With places for twice the tokens of one part, as prompts that end leave some empty.
    """
    return min(MOST_LANES, rows, max(1, 2 * part // length))
