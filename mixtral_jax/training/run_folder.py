"""The folder of a run: whose it is, and whether a config may go on in it."""

from __future__ import annotations

import dataclasses
import os
import pathlib

import jax

from mixtral_jax import config_io
from mixtral_jax.config import Config, InputError, MeshConfig

CONFIG = "config.yaml"
TOKENIZER = "tokenizer.model"

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
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / CONFIG).exists():
        raise InputError(
            f"run.dir={folder} holds other files and no {CONFIG}: choose another folder"
        )
    wrong = differences(config_io.load(folder / CONFIG), config)
    if wrong:
        key, old, new = wrong[0]
        more = f" (and {len(wrong) - 1} more keys)" if len(wrong) > 1 else ""
        raise InputError(
            f"run.dir={folder} holds a run with {key}={old}, not {new}{more}: choose another "
            f"run.dir, or remove that one to start again"
        )
    return True


def write(config: Config) -> pathlib.Path:
    """Make the folder and put the config there, whole or not at all; returns the folder.

    On several hosts one of them writes: the folder is shared.
    """
    folder = pathlib.Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() != 0:
        return folder
    temporary = folder / f"{CONFIG}.tmp"
    config_io.save(config, temporary)
    temporary.replace(folder / CONFIG)
    return folder
