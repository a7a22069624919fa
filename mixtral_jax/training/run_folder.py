"""The folder of a run: whose it is, and whether a config may go on in it."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import pathlib
import socket
import time
from typing import TextIO

import jax

from mixtral_jax import config_io, hosts
from mixtral_jax.config import Config, InputError, MeshConfig
from mixtral_jax.files import UNFINISHED, whole_file
from mixtral_jax.interop.own import CONFIG

LOCK = ".lock"
SHARED = "it must be on a disk that all of them share"

# What may differ when a run goes on: where and how it computes, not what.
MAY_CHANGE = {
    "model": {"attention", "exchange", "grouped_matmul", "receive_factor", "remat", "scan_layers"},
    "mesh": {field.name for field in dataclasses.fields(MeshConfig)},
    "training": {
        *("steps", "log_every", "checkpoint_every", "keep_checkpoints", "validate_every"),
        *("max_skipped_steps", "profile_steps"),
    },
    "data": {"malformed"},
    "run": {"dir", "resume_step"},
}


def differences(old: Config, new: Config) -> list[tuple[str, object, object]]:
    """(key, old value, new value) of every key that differs and must not."""
    before, after = config_io.to_dict(old), config_io.to_dict(new)
    return [
        (f"{section}.{key}", before[section][key], value)
        for section, values in after.items()
        for key, value in values.items()
        if key not in MAY_CHANGE[section] and before[section][key] != value
    ]


def check(config: Config) -> bool:
    """Whether this run was begun before; writes nothing.

    Raises:
      InputError: if the folder is not writable, or holds another run or something else.
    """
    folder = pathlib.Path(config.run.dir)
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise InputError(f"run.dir={folder}: {parent} is a file: choose another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"run.dir={folder}: {parent} is not writable: choose another folder")
    found = [path.name for path in folder.iterdir()] if folder.exists() else []
    if all(name == LOCK or name.endswith(UNFINISHED) for name in found):
        return False
    if not (folder / CONFIG).exists():
        raise InputError(
            f"run.dir={folder} holds other files and no {CONFIG}: choose another folder"
        )
    try:
        begun = config_io.load(folder / CONFIG)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}; choose another run.dir") from None
    wrong = differences(begun, config)
    if wrong:
        told = "; ".join(f"{key}={old}, not {new}" for key, old, new in wrong)
        raise InputError(
            f"run.dir={folder} holds a run with {told}: choose another run.dir, or remove that "
            "one to start again"
        )
    return True


def write(config: Config) -> pathlib.Path:
    """Put the config into the folder, which exists, whole or not at all; returns the folder.

    On several hosts one of them writes: the folder is shared.
    """
    folder = pathlib.Path(config.run.dir)
    if jax.process_index() != 0:
        return folder
    # With the step to resume from, the saved config would go back there each time it is used.
    run = dataclasses.replace(config.run, resume_step=None)
    with whole_file(folder / CONFIG) as unfinished:
        config_io.save(dataclasses.replace(config, run=run), unfinished)
    return folder


def check_shared(folder: pathlib.Path, held: bool) -> None:
    """Check that all hosts see one folder, by what the one that holds it has written there.

    Args:
      held: whether the first host holds it; one of them that says otherwise differs too.
    Raises:
      InputError: on every host, where they do not.
    """
    found = "no run"
    if held:
        try:
            found = (folder / LOCK).read_text(encoding="utf-8", errors="replace").strip()
        except OSError as error:
            found = f"{LOCK}: {error.strerror}"
    hosts.same({f"run.dir={folder}": found}, SHARED)


class Hold:
    """Keeps other processes from training in a run folder, from `take` to the end of the block."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def take(self, folder: pathlib.Path) -> None:
        """Take a folder that exists, if this has not been done.

        Raises:
          InputError: if another process has it.
        """
        if self._file is not None or jax.process_index() != 0:
            return
        self._file = (folder / LOCK).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            raise InputError(
                f"run.dir={folder} is in use by {holder}: wait for it to end, or choose another "
                "run.dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        self._file.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
        self._file.flush()
        os.fsync(self._file.fileno())  # the other hosts look for it
