"""The files that a glob names."""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import sysconfig
from collections.abc import Iterator

STDLIB = "{stdlib}"
NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}
DEEP = "**"


def expand(pattern: str) -> list[str]:
    """The files that a glob names, sorted.

    `{stdlib}` stands for the running Python's standard library, without installed packages. `**`
    enters each folder once, by whichever links lead there.
    """
    stdlib = sysconfig.get_paths()["stdlib"]
    spelled = os.path.expanduser(pattern.replace(STDLIB, glob.escape(stdlib)))
    paths = {path for path in _named(spelled) if os.path.isfile(path)}
    if STDLIB in pattern:
        paths = {p for p in paths if not NOT_STDLIB & set(os.path.relpath(p, stdlib).split(os.sep))}
    return sorted(paths)


def fixed_folder(pattern: str) -> str:
    """The folder of a glob down to its first wildcard, below which its files have their names."""
    parts = pattern.split(os.sep)[:-1]
    fixed = os.sep.join(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    stdlib = sysconfig.get_paths()["stdlib"]
    top = os.sep if os.path.isabs(pattern) else os.curdir
    return os.path.expanduser(fixed.replace(STDLIB, stdlib)) or top


def _named(pattern: str) -> Iterator[str]:
    """What a glob names, some of it several times."""
    parts = pattern.split(os.sep)
    if DEEP not in parts:
        yield from glob.iglob(pattern)
        return
    place = parts.index(DEEP)
    above = os.sep.join(parts[:place]) or (os.sep if place else "")
    below = parts[place + 1 :] or ["*"]
    for folder in _folders(sorted(glob.iglob(above)) if above else [""]):
        yield from _named(os.path.join(glob.escape(folder), *below))


def _folders(tops: list[str]) -> Iterator[str]:
    """These folders and all in them that are not hidden, each once: links may lead in circles."""
    entered, waiting = set(), tops[::-1]
    while waiting:
        folder = waiting.pop()
        try:
            found = os.stat(folder or os.curdir)
            with os.scandir(folder or os.curdir) as entries:
                inner = sorted(entry.name for entry in entries if _is_open_folder(entry))
        except OSError:  # glob passes over what it cannot read, too
            continue
        if (found.st_dev, found.st_ino) not in entered:
            entered.add((found.st_dev, found.st_ino))
            yield folder
            waiting += [os.path.join(folder, name) for name in reversed(inner)]


def _is_open_folder(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):  # a link to itself
        return not entry.name.startswith(".") and entry.is_dir()
    return False
