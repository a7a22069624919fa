"""The file that --report names: refused before minutes of work, and written whole. No JAX here."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from typing import Any

from mixtral_jax import command_line
from mixtral_jax.config import InputError
from mixtral_jax.files import naming, whole_file


def check_path(path: str) -> None:
    """Refuse a report's file that cannot be written, now and not minutes later.

    Raises:
      InputError: naming the file, and why.
    """
    if not path:
        return
    target = pathlib.Path(os.path.realpath(path))
    if os.path.isdir(path):
        raise InputError(f"--report {path} is a folder: name a file in it")
    if _is_replaced(path):
        if not target.parent.is_dir():
            raise InputError(f"--report {path}: there is no folder {pathlib.Path(path).parent}")
        with naming(f"--report {path}"), tempfile.TemporaryFile(dir=target.parent):
            pass


def write(report: Any, path: str) -> None:
    """Write a report as JSON, whole or not at all, if a file is named.

    Raises:
      InputError: naming the file, if it cannot be written.
    """
    if not path:
        return
    text, target = json.dumps(report, indent=1) + "\n", pathlib.Path(os.path.realpath(path))
    with naming(f"--report {path}"):
        if not _is_replaced(path):
            pathlib.Path(path).write_text(text, encoding="utf-8")
            return
        with whole_file(target) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def show(report: Any, path: str, shown: str) -> None:
    """Write a report, if a file is named, and print it as text: one though the other cannot be.

    Raises:
      InputError: naming the file, if it cannot be written.
      BrokenPipeError, OutputError: as command_line.write.
    """
    try:
        write(report, path)
    finally:
        command_line.write(f"{shown}\n")


def _is_replaced(path: str) -> bool:
    """Whether it is an ordinary file, or none yet, and no pipe and no terminal."""
    return os.path.isfile(path) or not os.path.exists(path)
