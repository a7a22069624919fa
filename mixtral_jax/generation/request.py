"""What to generate: the requests and the command line, with every check that needs no JAX."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixtral_jax import config_io
from mixtral_jax.checks import nearest
from mixtral_jax.config import InputError, MeshConfig
from mixtral_jax.interop.strict_json import is_unicode, quote

SEEDS = 2**32
LARGEST = 2**31 - 1
"""Lengths, counts and token ids fit in 32 bits."""
MOST_BIASES = 300
MOST_STOPS = 16

_LENGTH = f"be at least 1, or 0 with prompt_logprobs (scoring), and at most {LARGEST}"

WHOLE: dict[str, tuple[int, int, str]] = {
    "max_new_tokens": (0, LARGEST, _LENGTH),
    "min_new_tokens": (0, LARGEST, "lie in 0..max_new_tokens"),
    "top_k": (0, LARGEST, f"lie in 0..{LARGEST}; 0 is all tokens"),
    "n": (1, 128, "lie in 1..128"),
    "seed": (0, SEEDS - 1, f"lie in 0..{SEEDS - 1}"),
    "logprobs": (0, 20, "lie in 0..20"),
    "prompt_logprobs": (0, 20, "lie in 0..20"),
}
NUMBERS: dict[str, tuple[float, float, str]] = {
    "temperature": (0, 1e6, "lie in 0..1e6; 0 is greedy"),
    "top_p": (0, 1, "be above 0 and at most 1 (all tokens)"),
    "min_p": (0, 1, "lie in 0..1; 0 is all tokens"),
    "repetition_penalty": (1e-6, 1e6, "be above 0, in 1e-6..1e6; 1 is none"),
    "presence_penalty": (-2, 2, "lie in -2..2"),
    "frequency_penalty": (-2, 2, "lie in -2..2"),
}


@dataclass(frozen=True)
class Options:
    """How one request is sampled, how far, and what is told of it."""

    max_new_tokens: int = 128
    """Most tokens to make; the end-of-text token, which is not one of them, may come before."""
    min_new_tokens: int = 0
    """Tokens to make before anything but max_new_tokens may end an answer."""
    temperature: float = 0.8
    """What the logits are divided by; 0 is greedy."""
    top_k: int = 0
    """How many of the most likely tokens to choose from; 0 is all."""
    top_p: float = 1.0
    """Choose from the fewest tokens whose probabilities reach this; 1 is all."""
    min_p: float = 0.0
    """Choose from the tokens at least this many times as likely as the likeliest; 0 is all."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0, and multiplies those below, of tokens in prompt and answer."""
    presence_penalty: float = 0.0
    """What is taken from the logit of every token that the answer holds."""
    frequency_penalty: float = 0.0
    """What is taken from the logit of a token for each time that the answer holds it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids, each with what is added to its logit, -100..100."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end an answer and are not part of it, as the end-of-text token does."""
    n: int = 1
    """How many answers to make to each prompt."""
    seed: int = 0
    """The request's random stream: the same seed gives the same answer in any batch."""
    logprobs: int | None = None
    """Tell the natural log-probability of each token made, and of that many of the likeliest."""
    prompt_logprobs: int | None = None
    """The same for the prompt's own tokens."""
    echo: bool = False
    """Whether the prompt is shown in front of the answer."""

    def __post_init__(self) -> None:
        for name, (low, high, wanted) in WHOLE.items():
            value = getattr(self, name)
            if value is not None or not name.endswith("logprobs"):
                _check(name, value, _is_whole(value), "be a whole number")
                _check(name, value, low <= value <= high, wanted)
        for name, (low, high, wanted) in NUMBERS.items():
            value = getattr(self, name)
            _check(name, value, _is_number(value), "be a number")
            _check(name, value, low <= value <= high, wanted)
        _check("top_p", self.top_p, self.top_p > 0, NUMBERS["top_p"][-1])
        most = self.max_new_tokens
        scoring = self.prompt_logprobs is not None
        _check("max_new_tokens", most, most > 0 or scoring, _LENGTH)
        least = self.min_new_tokens
        _check("min_new_tokens", least, least <= most, f"be at most max_new_tokens={most}")
        _check("echo", self.echo, isinstance(self.echo, bool), "be true or false")
        _check_biases(self.logit_bias)
        _check_stops(self.stop)
        _check_stop_ids(self.stop_token_ids)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], default: Options) -> Options:
        """Options from JSON: the keys are the fields', and those left out are the default's.

        Lists are tuples; logit_bias is an object, {"123": -5}; stop may be one text.

        Raises:
          InputError: for an unknown key, naming what is near it; or an impossible value.
        """
        refuse_unknown(values, [f.name for f in dataclasses.fields(cls)], "option")
        given = dict(values)
        for name in "stop", "stop_token_ids":
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        if isinstance(given.get("stop"), str):
            given["stop"] = (given["stop"],)
        if "logit_bias" in given:
            given["logit_bias"] = _biases(given["logit_bias"])
        return dataclasses.replace(default, **given)


def refuse_unknown(keys: Iterable[str], known: Sequence[str], what: str) -> None:
    """Refuse keys that are not known.

    Raises:
      InputError: naming the first that is not, what it ought to be, and the closest known one, or
        all where none is near.
    """
    for key in keys:
        if key not in known:
            raise InputError(f"{quote(key)} is no {what}{nearest(key, known)}")


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check(name: str, value: object, good: bool, wanted: str) -> None:
    if not good:
        raise InputError(f"{name}={quote(value)} must {wanted}")


def _check_tuple(name: str, values: object, most: int, what: str) -> None:
    _check(name, values, isinstance(values, tuple), f"be a tuple (in JSON a list) of {what}")
    if len(values) > most:
        raise InputError(f"{name}={len(values)} {what} must be at most {most}")


def _check_token(name: str, token: object) -> None:
    good = _is_whole(token) and 0 <= token <= LARGEST
    _check(name, token, good, f"be a token id, in 0..{LARGEST}")


def _check_biases(pairs: object) -> None:
    _check_tuple("logit_bias", pairs, MOST_BIASES, "pairs of a token id and a number")
    seen = set()
    for pair in pairs:
        good = isinstance(pair, tuple) and len(pair) == 2
        _check("logit_bias", pair, good, "be a pair of a token id and a number")
        token, added = pair
        _check_token("logit_bias", token)
        good = _is_number(added) and -100 <= added <= 100
        _check("logit_bias", added, good, f"be a number in -100..100, for token {token}")
        _check("logit_bias", token, token not in seen, "name a token once, not twice")
        seen.add(token)


def _check_stops(texts: object) -> None:
    _check_tuple("stop", texts, MOST_STOPS, "texts")
    for text in texts:
        _check("stop", text, isinstance(text, str) and text != "", "be text that is not empty")
        _check("stop", text, is_unicode(text), "be Unicode, without half a surrogate pair")


def _check_stop_ids(tokens: object) -> None:
    _check_tuple("stop_token_ids", tokens, MOST_STOPS, "token ids")
    for token in tokens:
        _check_token("stop_token_ids", token)


def _biases(given: object) -> tuple[tuple[int, Any], ...]:
    """The pairs of a JSON object of biases; their values are still to be checked."""
    good = isinstance(given, Mapping)
    _check("logit_bias", given, good, 'be an object of token ids, such as {"123": -5}')
    pairs = []
    for key, added in given.items():
        text = key if isinstance(key, str) else quote(key)
        good = text.isascii() and text.isdigit() and len(text) <= 10
        _check("logit_bias", key, good, 'have token ids as its keys, such as {"123": -5}')
        pairs.append((int(text), added))
    return tuple(pairs)


@dataclass(frozen=True)
class Request:
    """A prompt to go on from."""

    tokens: Sequence[int]
    """The prompt's ids, with the begin-of-text token in front; a tuple, a list, or an array."""
    options: Options = field(default_factory=Options)
    goes_on: bool = True
    """Whether the answer's text goes on from the prompt's, or begins anew, as in a chat."""


def check_request(request: Request, vocabulary: int, context: int, name: str) -> None:
    """Refuse a request that a model with this vocabulary and context cannot answer.

    Args:
      request: what is asked.
      vocabulary: how many token ids there are.
      context: most tokens of prompt and answer together.
      name: how errors name the request, such as `prompt 3`.

    Raises:
      InputError: beginning with the name; of a prompt that is too long, with its length and the
        context's.
    """
    options = request.options
    if not len(request.tokens):
        raise InputError(f"{name} has no tokens: begin it with the BOS id")
    tokens = {
        "token": request.tokens,
        "the logit_bias of token": [token for token, _ in options.logit_bias],
        "stop_token_ids: token": options.stop_token_ids,
    }
    for what, ids in tokens.items():
        if _are_ids(ids, vocabulary):
            continue
        for token in ids:
            if not _is_whole(token):
                raise InputError(f"{name}: {what} {quote(token)} is not a whole number")
            if not 0 <= token < vocabulary:
                raise InputError(f"{name}: {what} {token} is not in 0..{vocabulary - 1}")
    check_length(request, context, name)


def _are_ids(tokens: Sequence[int], vocabulary: int) -> bool:
    """Whether all are ids, without a look at each: a prompt may have many."""
    kinds = set(map(type, tokens))
    whole = all(issubclass(kind, numbers.Integral) and kind is not bool for kind in kinds)
    return bool(kinds) and whole and min(tokens) >= 0 and max(tokens) < vocabulary


def check_length(request: Request, context: int, name: str, fix: str | None = None) -> None:
    """Refuse a request that may go beyond the context.

    Args:
      request: what is asked.
      context: most tokens of prompt and answer together.
      name: how the error names the request.
      fix: what the error advises; None is a shorter answer or prompt.

    Raises:
      InputError: beginning with the name, with the prompt's length and the context's.
    """
    length, wanted = len(request.tokens), request.options.max_new_tokens
    if length + wanted > context:
        room = context - length
        usual = f"use max_new_tokens={room} or less" if room > 0 else "shorten it"
        raise InputError(
            f"{name} has {length} tokens, BOS included, and with "
            f"max_new_tokens={wanted} goes beyond the context of {context}: {fix or usual}"
        )


@dataclass(frozen=True)
class Serving:
    """How an engine serves: what its memory and its compiled programs depend on."""

    rows: int | None = None
    """Most answers in progress at a time; None is the requests', up to what the engine likes."""
    context: int | None = None
    """Most tokens of a prompt and its answer; None is what the requests need."""
    part: int = 256
    """Most tokens of a prompt that are run between two decoding steps; a power of two."""
    cache_dtype: str | None = None
    """int8 halves the cache of bfloat16; None is what is computed in."""
    weights: str | None = None
    """int8 halves the matrices of bfloat16, while they are read; None is the checkpoint's type."""

    def __post_init__(self) -> None:
        for name in ("rows", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value} must be at least 1")
        if self.part < 16 or self.part & (self.part - 1):
            raise InputError(f"part={self.part} must be a power of two, 16 or more")
        for name in ("cache_dtype", "weights"):
            value = getattr(self, name)
            if value not in (None, "int8"):
                raise InputError(f"{name}={value!r} must be int8, or left out")


@dataclass(frozen=True)
class Deployment:
    """Where and how a checkpoint's model computes; the training run's own choices do not matter."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    """One device, whatever the checkpoint was trained on."""
    exchange: str = ""
    """Empty is the platform's best."""
    compute_dtype: str | None = None
    """Empty is the platform's best; None is the checkpoint's."""
    grouped_matmul: str = ""
    """Empty is the platform's best; not on CPU, where each expert's matrices lie apart."""


def deployment_from_overrides(overrides: Sequence[str]) -> Deployment:
    """Read `section.key=value` texts.

    Raises:
      InputError: for any key that sampling has no use for, naming those it has; or a wrong type.
    """
    axes = [f.name for f in dataclasses.fields(MeshConfig)]
    model_keys = ["exchange", "compute_dtype", "grouped_matmul"]
    allowed = [*(f"mesh.{axis}" for axis in axes), *(f"model.{key}" for key in model_keys)]
    values: dict[str, dict[str, Any]] = config_io.apply_overrides({}, overrides)
    for section, keys in values.items():
        for key in keys:
            name = f"{section}.{key}"
            if name not in allowed:
                raise InputError(f"{name} cannot be set when sampling, only {', '.join(allowed)}")
    mesh, model = (
        config_io.section_from_dict(name, values.get(name)) for name in ("mesh", "model")
    )
    return Deployment(mesh, **{key: getattr(model, key) for key in values.get("model", {})})
