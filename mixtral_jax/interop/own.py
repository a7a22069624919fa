"""This project's own checkpoints: where they are and what they hold beside arrays. No JAX here.

A checkpoint is a folder with two items, and a third where training may go on from it:

  params      the weights, by name
  run         JSON: config, place in the data, tokenizer (base64), its version where its pieces do
              not tell, what the data's files were, and a checksum of every array
  optimizer   the rest of the training state

A run keeps one for each saved step, in RUN/checkpoints/STEP.
"""

from __future__ import annotations

import base64
import json
import pathlib
from typing import NamedTuple

import numpy as np

from mixtral_jax import config_io
from mixtral_jax.command_line import one_line
from mixtral_jax.config import Config, InputError
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.interop.strict_json import quote

CONFIG, FOLDER = "config.yaml", "checkpoints"
"""In a run's folder."""
PARAMS, RUN = "params", "run"
_VERSION, _FILES = "tokenizer_version", "files"
_KINDS = {
    "config": dict,
    "data_state": list,
    "tokenizer": str | None,
    "checksums": dict,
}
_JSON = pathlib.Path(RUN) / "metadata"  # where orbax puts an item that is JSON


class Extras(NamedTuple):
    """What a checkpoint holds beside arrays."""

    config: Config
    data_state: np.ndarray
    """int64, a line for each row of the batch: where it is in its documents."""
    tokenizer: Tokenizer | None
    validation_loss: float | None
    files: dict[str, str] | None = None
    """What Corpus.files was; None for data of no files, and in older checkpoints."""


def is_one(path: pathlib.Path) -> bool:
    """Whether a folder is a checkpoint, a run's folder or the checkpoints in one."""
    return _is_whole(path) or bool(_steps(path))


def _is_whole(path: pathlib.Path) -> bool:
    return (path / RUN).is_dir() and (path / PARAMS).is_dir()


def _is_begun(path: pathlib.Path) -> bool:
    return (path / RUN).is_dir() or (path / PARAMS).is_dir()


def _steps(path: pathlib.Path) -> list[pathlib.Path]:
    """The folders named by a number that hold a checkpoint, or a part of one."""
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.name.isdecimal() and _is_begun(p)]


def find(path: str | pathlib.Path) -> pathlib.Path:
    """The newest checkpoint in a run folder, in its checkpoints/ folder, or the one named itself.

    Raises:
      InputError: if there is none.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f"checkpoint folder {path} does not exist")
    if _is_whole(path):
        return path.resolve()
    steps = _steps(path)
    if not steps:
        raise InputError(
            f"{path} holds no checkpoint: name a run folder such as runs/quickstart, or one step "
            f"in its {FOLDER}/"
        )
    return max(steps, key=lambda p: int(p.name)).resolve()


def read_run(path: pathlib.Path) -> dict:
    """The JSON of a checkpoint.

    Raises:
      InputError: if it is not there or is not this project's.
    """
    name = f"checkpoint {one_line(path)}"
    try:
        run = json.loads((path / _JSON).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name} is damaged: {RUN}: {one_line(error)}") from None
    for key, kinds in _KINDS.items():
        if not isinstance(run, dict) or key not in run:
            raise InputError(f"{name} is not of this project: {RUN} has no {key}")
        if not isinstance(run[key], kinds):
            raise InputError(f"{name} is damaged: {RUN} has {key}={quote(run[key])}")
    if not all(isinstance(sums, dict) for sums in run["checksums"].values()):
        raise InputError(f"{name} is damaged: {RUN} has other checksums than numbers by name")
    return run


def extras_of(run: dict) -> Extras:
    """What a checkpoint's JSON says.

    Raises:
      InputError: if it says what no checkpoint does.
    """
    try:
        data_state = np.asarray(run["data_state"], np.int64)
        tokenizer = run["tokenizer"]
        tokenizer = None if tokenizer is None else base64.b64decode(tokenizer)
    except (ValueError, TypeError, OverflowError) as error:
        reason = one_line(error)
        raise InputError(f"checkpoint is damaged: {RUN} cannot be read: {reason}") from None
    if tokenizer is not None:
        suffix = ".v2" if run.get(_VERSION) == "v2" else ""
        tokenizer = Tokenizer.from_bytes(tokenizer, f"tokenizer.model{suffix}")
    config = config_io.from_dict(run["config"])
    return Extras(config, data_state, tokenizer, None, run.get(_FILES))


def run_of(extras: Extras, checksums: dict[str, dict[str, int]]) -> dict:
    """The JSON of a checkpoint, which `extras_of` reads."""
    tokenizer = extras.tokenizer
    # Absent where the pieces say it all, as they do in what older checkpoints hold.
    version = {_VERSION: "v2"} if tokenizer and tokenizer.version == "v2" else {}
    return {
        "config": config_io.to_dict(extras.config),
        "data_state": extras.data_state.tolist(),
        "tokenizer": tokenizer and base64.b64encode(tokenizer.model_bytes).decode(),
        **version,
        _FILES: extras.files,
        "checksums": checksums,
    }


def load_extras(path: pathlib.Path) -> Extras:
    """Config and tokenizer of the checkpoint at a path that `find` gave."""
    return extras_of(read_run(path))
