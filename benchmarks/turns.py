"""Processes that take turns, each waiting while the others work."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import measure
from measure import InputError


class Contestant:
    """A process that takes a turn whenever a line comes in: one that calls `work`."""

    def __init__(self, name: str, command: list[str]):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process, self.name = subprocess.Popen([sys.executable, *command], **pipes), name
        self.turns: list[dict] = []
        self.about: dict[str, str] = self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:  # it has said why on standard error
            raise InputError(f"{self.name} ended with code {self._process.wait()}")
        return json.loads(line)

    def turn(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self.turns.append(self._answer())

    def end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    @property
    def seconds(self) -> float:
        """The median of its turns."""
        return statistics.median(turn["seconds"] for turn in self.turns)

    @property
    def peak_bytes(self) -> int:
        """The most memory it had in use."""
        return self.turns[-1]["peak_bytes"]


def work(turn: Callable[[], float | None]) -> None:
    """What the process of a contestant does: a turn to warm up, and one for each line.

    Args:
      turn: returns its seconds, or None if it is to be timed from outside.
    """
    turn()
    print(json.dumps(measure.about_machine()), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        seconds = turn()
        seconds = time.perf_counter() - began if seconds is None else seconds
        line = {"seconds": seconds, "peak_bytes": measure.peak_bytes()}
        print(json.dumps(line), flush=True)


def second_of_two(step: Callable[[], None]) -> Callable[[], float]:
    """A turn of two steps in a row, of which the second is timed.

    A virtual machine may hand memory that is free back to its host while others work, and the first
    step then waits for all that it allocates: seconds, which no step in the middle of a run takes.
    """

    def turn() -> float:
        step()
        began = time.perf_counter()
        step()
        return time.perf_counter() - began

    return turn


def compete(commands: dict[str, list[str]], turns: int, alone: bool = False) -> list[Contestant]:
    """All contestants, after their turns.

    Args:
      commands: of each by its name.
      alone: each takes all its turns and ends before the next one starts.
    """
    if alone:
        done = []
        for name, command in commands.items():
            done.append(Contestant(name, command))
            for _ in range(turns):
                done[-1].turn()
            done[-1].end()
        return done
    there = [Contestant(name, command) for name, command in commands.items()]
    for _ in range(turns):
        for one in there:
            one.turn()
    for one in there:
        one.end()
    return there
