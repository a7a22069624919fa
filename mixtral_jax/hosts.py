"""What several hosts tell each other, so that they do the same or stop together.

Every host runs the same program, and most of its steps are steps of all devices. A host that goes
another way, or ends, leaves the others waiting in the next of them; one with another setting trains
something else without a word. So they compare what they were given (`same`), and whatever a host
does alone and may fail at stands in a block that all of them leave alike (`together`).

Every function here must be called by every host at the same place, and with one host costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import platform
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax.config import InputError

_NAMED = 4  # hosts that a message names, of those with the same text


def gather(text: str) -> list[str]:
    """What each host says, in the order of their numbers."""
    if jax.process_count() == 1:
        return [text]
    mine = np.frombuffer(text.encode(errors="backslashreplace"), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    if not sizes.any():
        return [""] * len(sizes)
    padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few shapes to compile
    padded[: len(mine)] = mine
    texts = multihost_utils.process_allgather(padded)
    return [bytes(row[:size]).decode() for row, size in zip(texts, sizes, strict=True)]


def on_any_host(told: bool) -> bool:
    """Whether any host says so."""
    if jax.process_count() == 1:
        return told
    return bool(multihost_utils.process_allgather(np.asarray(told)).any())


def same(told: Mapping[str, str], advice: str) -> None:
    """Check that all hosts say the same.

    Args:
      told: a short text, or the hash of a long one, under the name that a message gives it.
      advice: what to do where they differ.
    Raises:
      InputError: on every host, naming what differs, and how.
    """
    if jax.process_count() == 1:
        return
    heard = [json.loads(text) for text in gather(json.dumps(dict(told)))]
    wrong = []
    for name in dict.fromkeys(name for one in heard for name in one):
        by_text: dict[str, list[int]] = {}
        for host, one in enumerate(heard):
            by_text.setdefault(one.get(name, "not there"), []).append(host)
        if len(by_text) > 1:
            parts = [f"{text} on {_named(who)}" for text, who in by_text.items()]
            wrong.append(f"{name} ({', '.join(parts)})")
    if wrong:
        raise InputError(f"the hosts differ in {'; '.join(wrong)}: {advice}")


def same_program(told: Mapping[str, str]) -> None:
    """`same`, also of what runs: this project's code, JAX, and Python with what {stdlib} names."""
    if jax.process_count() == 1:
        return
    code = hashlib.sha256()
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    runs = {
        "the code of mixtral_jax": code.hexdigest()[:12],
        "the version of JAX": jax.__version__,
        "the version of Python": platform.python_version(),
    }
    same({**runs, **told}, "give all of them the same command and the same environment")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block for what each host does alone, such as reading its files; no collective step in it.

    Raises:
      InputError: `host 1: MESSAGE` on every host, where a host raised an InputError; where it
        raised another exception, so on the other hosts.
    """
    if jax.process_count() == 1:
        yield
        return
    mine = None
    try:
        yield
    except Exception as error:
        mine = error
    heard = gather("" if mine is None else str(mine) or type(mine).__name__)
    if mine is not None and not isinstance(mine, InputError):
        raise mine
    for host, text in enumerate(heard):
        if text:
            raise InputError(f"host {host}: {text}") from None


def _named(who: Sequence[int]) -> str:
    shown = ", ".join(map(str, who[:_NAMED])) + (", ..." if len(who) > _NAMED else "")
    return f"host {shown}" if len(who) == 1 else f"hosts {shown}"
