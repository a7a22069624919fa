"""How much memory this host has left, as Linux tells it."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple


class _Form(NamedTuple):
    """Where a version of control groups says what."""

    folder: str
    limit: str
    used: str
    prefix: str
    """Of the entries in memory.stat that count the groups below too."""


_FORMS = {  # by the controllers that /proc/self/cgroup names
    "": _Form("sys/fs/cgroup", "memory.max", "memory.current", ""),
    "memory": _Form(
        *("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
    ),
}


def free_memory(root: str | os.PathLike = "/") -> int:
    """Bytes that can be had without swapping: memory that only caches files is free.

    The least of what the host has and what the limits of this process's control groups leave.

    Args:
      root: the folder that proc and sys lie in.
    """
    root = pathlib.Path(root)
    found = [*_of_host(root), *_of_groups(root)]
    return min(found) if found else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_host(root: pathlib.Path) -> Iterator[int]:
    with contextlib.suppress(OSError, LookupError, ValueError):
        yield 1024 * int(_table(root / "proc/meminfo")["MemAvailable:"])


def _of_groups(root: pathlib.Path) -> Iterator[int]:
    """Of each group with a limit, from the process's own up."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        form = _FORMS.get(controllers)
        if form is None:
            continue
        group = pathlib.PurePosixPath(path.lstrip("/"))
        for part in (group, *group.parents):
            folder = root / form.folder / part
            # A container may not see the outer groups, and one without a limit says "max".
            with contextlib.suppress(OSError, LookupError, ValueError):
                limit, used = (int((folder / n).read_text()) for n in (form.limit, form.used))
                told = _table(folder / "memory.stat")
                files = (int(told[f"{form.prefix}{kind}_file"]) for kind in ("active", "inactive"))
                yield max(limit - used + sum(files), 0)


def _table(path: pathlib.Path) -> dict[str, str]:
    """The first two words of each line."""
    return dict(line.split()[:2] for line in path.read_text().splitlines())
