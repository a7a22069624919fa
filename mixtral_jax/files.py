"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError

UNFINISHED = ".partial"
"""How the names end of what is being written, or was when its process was killed."""


def _unfinished(folder: pathlib.Path) -> pathlib.Path:
    # Short, for what it becomes may have the longest name; by chance, for process ids are the same
    # in several containers.
    return folder / f".{secrets.token_hex(8)}{UNFINISHED}"


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """A block that writes: what a disk does not take is an InputError, which begins with `name`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{name} cannot be written: {error.strerror or error}") from None


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A new file's path beside `path`: flushed to disk and renamed to it where the block succeeds.

    After any error there is at `path` what was there before, and no other file.

    Raises:
      OSError: if it cannot be written.
    """
    path = pathlib.Path(path)
    if "\0" in str(path):  # Python's own functions raise ValueError
        raise OSError(errno.EINVAL, "a name cannot hold a null character")
    unfinished = _unfinished(path.parent)
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """A temporary folder beside `path`, which gets its name when the block ends without an error.

    Raises:
      InputError: if there is something at `path`, or it cannot be written.
    """
    check_free(path)
    target = pathlib.Path(path).resolve()
    unfinished = _unfinished(target.parent)
    with naming(one_line(path)):
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            if target.is_dir():
                target.rmdir()  # it was empty
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def check_free(path: str | os.PathLike[str]) -> None:
    """Raises InputError if a path cannot become a new folder, which an empty one makes way for."""
    path = pathlib.Path(path)
    with naming(one_line(path)):  # no permission, a name too long
        free = not any(path.iterdir()) if path.is_dir() else not os.path.lexists(path)
        held = path.is_dir() and (os.path.ismount(path.resolve()) or path.samefile("."))
    if not free:
        raise InputError(f"{one_line(path)} exists already: name a new folder, or remove that one")
    if held:
        raise InputError(
            f"{one_line(path)} is where a disk is mounted or this command runs: name a new folder "
            "in it"
        )
