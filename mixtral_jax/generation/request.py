"""What to generate: the requests and the command line, with every check that needs no JAX."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixtral_jax import config_io
from mixtral_jax.config import InputError, MeshConfig, ModelConfig

SEEDS = 2**32


@dataclass(frozen=True)
class Options:
    """How one request is sampled, and how far."""

    max_new_tokens: int = 128
    """Most tokens to make; the end-of-text token, which is not one of them, may come before."""
    temperature: float = 0.8
    """What the logits are divided by; 0 is greedy."""
    top_k: int = 0
    """How many of the most likely tokens to choose from; 0 is all."""
    top_p: float = 1.0
    """Choose from the fewest tokens whose probabilities reach this; 1 is all."""
    seed: int = 0
    """The request's random stream: the same seed gives the same answer in any batch."""

    def __post_init__(self) -> None:
        def check(name: str, good: bool, wanted: str) -> None:
            if not good:
                raise InputError(f"{name}={getattr(self, name)} must {wanted}")

        check("max_new_tokens", self.max_new_tokens >= 1, "be at least 1")
        check("temperature", 0 <= self.temperature <= 1e6, "lie in 0..1e6; 0 is greedy")
        check("top_k", 0 <= self.top_k < 2**31, "be at least 0 (all tokens)")
        check("top_p", 0 < self.top_p <= 1, "be above 0 and at most 1 (all tokens)")
        check("seed", 0 <= self.seed < SEEDS, f"lie in 0..{SEEDS - 1}")


@dataclass(frozen=True)
class Request:
    """A prompt to go on from."""

    tokens: tuple[int, ...]
    """The prompt's ids, with the begin-of-text token in front."""
    options: Options = field(default_factory=Options)


def check_requests(requests: Sequence[Request], vocabulary: int, context: int) -> None:
    """Refuse what a model with this vocabulary and context cannot answer.

    Raises:
      InputError: naming the request (counted from 1) and giving its length and the context's.
    """
    if not requests:
        raise InputError("there is no request")
    for number, request in enumerate(requests, 1):
        length, wanted = len(request.tokens), request.options.max_new_tokens
        if not length:
            raise InputError(f"prompt {number} has no tokens: begin it with the BOS id")
        for token in request.tokens:
            if not 0 <= token < vocabulary:
                raise InputError(f"prompt {number}: token {token} is not in 0..{vocabulary - 1}")
        if length + wanted > context:
            room = context - length
            fix = f"use max_new_tokens={room} or less" if room > 0 else "shorten it"
            raise InputError(
                f"prompt {number} has {length} tokens, BOS included, and with "
                f"max_new_tokens={wanted} goes beyond the model's context of {context}: {fix}"
            )


@dataclass(frozen=True)
class Deployment:
    """Where and how a checkpoint's model computes; the training run's own choices do not matter."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    """One device, whatever the checkpoint was trained on."""
    exchange: str = ""
    """Empty is the platform's best."""
    compute_dtype: str | None = None
    """Empty is the platform's best; None is the checkpoint's."""


def deployment_from_overrides(overrides: Sequence[str]) -> Deployment:
    """Read `section.key=value` texts.

    Raises:
      InputError: for any key that sampling has no use for, naming those it has; or a wrong type.
    """
    axes = [f.name for f in dataclasses.fields(MeshConfig)]
    model_keys = ["exchange", "compute_dtype"]
    allowed = [*(f"mesh.{axis}" for axis in axes), *(f"model.{key}" for key in model_keys)]
    values: dict[str, dict[str, Any]] = config_io.apply_overrides({}, overrides)
    for section, keys in values.items():
        for key, value in keys.items():
            name = f"{section}.{key}"
            if name not in allowed:
                raise InputError(f"{name} cannot be set when sampling, only {', '.join(allowed)}")
            if section == "mesh" and type(value) is not int:
                raise InputError(f"{name}={value!r} must be a whole number")
    model = {key: value or "" for key, value in values.get("model", {}).items()}
    ModelConfig(**model)  # checks the values
    return Deployment(MeshConfig(**values.get("mesh", {})), **model)


def read_prompts(path: str | pathlib.Path) -> list[str]:
    """The lines of a UTF-8 file; an empty line is an empty prompt.

    Raises:
      InputError: naming a file that is missing, unreadable, not UTF-8 or empty.
    """
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"prompt file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"prompt file {path} line {line} is not UTF-8") from None
    if not text:
        raise InputError(f"prompt file {path} is empty: write one prompt a line")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
