"""How a bad value in a config is refused: in one line that names the key and what it may be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from the user. The command line prints it as one line and exits with code 2."""


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise InputError(f"{name}={value!r} is not one of {listed}")


def nearest(key: object, known: Iterable[str]) -> str:
    """How the refusal of an unknown key ends: with the closest known one, or with all."""
    known = list(known)
    start = str(key)[:100]  # comparing takes the product of the lengths
    close = difflib.get_close_matches(start, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; valid: {', '.join(known)}"


def check_at_least(section: object, prefix: str, minimum: float, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value >= minimum:
            raise InputError(f"{prefix}.{name}={value} must be at least {minimum}")


def check_above_zero(section: object, prefix: str, *names: str, empty: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and not value > 0:
            raise InputError(f"{prefix}.{name}={value} must be above 0{empty}")
