"""Signals that ask a run to stop, heard by every host."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM or SIGINT puts its number in; a second SIGINT interrupts at once."""
    received: list[int] = []

    def handler(number, frame):
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def heard_anywhere(signals: list[int]) -> bool:
    """Whether any host has received one; every host must ask at the same step."""
    if jax.process_count() == 1:
        return bool(signals)
    told = multihost_utils.process_allgather(np.asarray(bool(signals)))
    return bool(told.any())
