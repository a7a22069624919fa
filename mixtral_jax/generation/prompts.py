"""What is asked: prompts from a file of lines, or requests from one of JSON objects.

A `.jsonl` file has one request a line, a text to go on from or a conversation, with any of the
fields of `Options` to override the command's own for that line alone:

    {"prompt": "Once upon a time", "max_new_tokens": 20, "stop": "\\n"}
    {"id": "a", "messages": [{"role": "user", "content": "Hello"}], "logit_bias": {"123": -5}}
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError
from mixtral_jax.data.conversation import read_conversation, read_tools
from mixtral_jax.generation.request import Options, refuse_unknown
from mixtral_jax.interop.strict_json import is_unicode, parse_object, quote

STANDARD_INPUT = "-"
ASKING = ("prompt", "messages", "tools", "id")
KEYS = [*ASKING, *(f.name for f in dataclasses.fields(Options))]
EXAMPLE = '{"prompt": "Once"}'
LONGEST_LINE = 2**24
"""Bytes of a request: more than any context holds."""
LONGEST_ERROR = 400
"""Characters of what is said of a line, beyond its name."""


class Asked(NamedTuple):
    """A request as it was written: a text, or messages, or neither where there is an error."""

    name: str
    """How messages name it: `prompt 3`, or `line 3` of a .jsonl file."""
    text: str | None
    """What to go on from; may be empty."""
    messages: list[dict] | None
    """A conversation that `read_conversation` takes."""
    options: Options
    error: str | None
    """What is wrong with the line and how to mend it, on one line; its options are the default."""
    id: Any
    """The line's own, a text or a whole number, else the number in its name."""
    tools: Sequence[dict] = ()
    """Those of a conversation, which `read_tools` takes."""


def read(path: str | pathlib.Path, default: Options, jsonl: bool = False) -> list[Asked]:
    """What a file asks: `read_jsonl` or `read_text`, as `is_jsonl` says.

    Args:
      path: the file; `-` is standard input.
      default: the options of prompts that say nothing else.
      jsonl: whether it is one of JSON objects, whatever its name.

    Raises:
      InputError: as those two.
    """
    if is_jsonl(path, jsonl):
        return read_jsonl(path, default)
    texts = enumerate(read_text(path), 1)
    return [Asked(f"prompt {n}", text, None, default, None, n) for n, text in texts]


def is_jsonl(path: str | pathlib.Path, jsonl: bool) -> bool:
    """Whether a file is one of JSON objects: its name ends in .jsonl, or `jsonl` says so."""
    return jsonl or str(path).lower().endswith(".jsonl")


def read_text(path: str | pathlib.Path) -> list[str]:
    """The lines of a UTF-8 file; an empty line is an empty prompt. `-` is standard input.

    Raises:
      InputError: naming a file that is missing, unreadable, not UTF-8 or empty.
    """
    try:
        text = _read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise InputError(f"{_source(path)} line {line} is not UTF-8") from None
    if not text:
        raise InputError(f"{_source(path)} is empty: write one prompt a line")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def read_jsonl(path: str | pathlib.Path, default: Options) -> list[Asked]:
    """The requests of a file of JSON objects, one a line; blank lines are skipped, but count.

    A line that is none has its `error` set, and the others stand.

    Args:
      path: the file; `-` is standard input.
      default: the options where a line has none.

    Raises:
      InputError: naming a file that is missing, unreadable, or has nothing but blank lines.
    """
    lines = _read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    where = name_of(path)
    asked = [_read_line(line, n, where, default) for n, line in enumerate(lines, 1) if line.strip()]
    if not asked:
        raise InputError(f"{_source(path)} is empty: write one object a line, such as {EXAMPLE}")
    return asked


def told(asked: Sequence[Asked]) -> dict[str, str]:
    """What several hosts compare of it: the first one's options by name, and a hash of all."""
    first = asked[0].options
    rest = [one._replace(options=None if one.options == first else one.options) for one in asked]
    digest = hashlib.sha256(repr(rest).encode(errors="backslashreplace")).hexdigest()[:12]
    return {**{name: str(value) for name, value in vars(first).items()}, "the prompts": digest}


def name_of(path: str | pathlib.Path) -> str:
    """A file of lines, as messages name it in front of a line's own name."""
    return "standard input" if str(path) == STANDARD_INPUT else one_line(path)


def _source(path: str | pathlib.Path) -> str:
    return name_of(path) if str(path) == STANDARD_INPUT else f"prompt file {name_of(path)}"


def _read_bytes(path: str | pathlib.Path) -> bytes:
    try:
        if str(path) == STANDARD_INPUT:
            if sys.stdin is None:  # closed before Python began
                raise ValueError("it is closed")
            return sys.stdin.buffer.read()
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{_source(path)} cannot be read: {error.strerror}") from None
    except ValueError as error:  # a null byte in the name, or standard input is closed
        raise InputError(f"{_source(path)} cannot be read: {error}") from None


def _read_line(line: bytes, number: int, where: str, default: Options) -> Asked:
    name, own_id = f"line {number}", number
    try:
        values = _parse(line)
        own_id = _own_id(values, number)
        refuse_unknown(values, KEYS, "key of a request")
        text, messages, tools = _asked(values)
        values = {k: v for k, v in values.items() if k not in ASKING}
        options = Options.from_dict(values, default)
    except InputError as error:
        said = str(error)
        if len(said) > LONGEST_ERROR:
            half = LONGEST_ERROR // 2
            said = f"{said[:half]} ... {said[-half:]}"
        return Asked(name, None, None, default, f"{where} {name}: {said}", own_id)
    return Asked(name, text, messages, options, None, own_id, tools)


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > LONGEST_LINE:
        raise InputError(f"this line has {len(line)} bytes: use at most {LONGEST_LINE}")
    try:
        return parse_object(line, "this line")
    except InputError as error:
        fix = f"write an object in UTF-8 with each key once, such as {EXAMPLE}"
        raise InputError(f"{error}; {fix}") from None


def _own_id(values: dict[str, Any], number: int) -> str | int:
    """The line's own id; null is none."""
    own = values.get("id")
    if own is None:
        return number
    if type(own) is not int and not (isinstance(own, str) and is_unicode(own)):
        raise InputError(f"id={quote(own)} must be text or a whole number")
    return own


def _asked(values: dict[str, Any]) -> tuple[str | None, list[dict] | None, Sequence[dict]]:
    """The text or the messages, whichever there is, and tools, all checked; null is none."""
    text, messages, tools = (values.get(key) for key in ("prompt", "messages", "tools"))
    if text is None and messages is None:
        raise InputError(f"there is no prompt and no messages: write one, such as {EXAMPLE}")
    if text is not None and messages is not None:
        raise InputError("there are both prompt and messages: leave one out")
    if text is not None:
        if not isinstance(text, str):
            raise InputError(f"prompt={quote(text)} must be text")
    elif not isinstance(messages, list):
        wanted = 'must be a list, such as [{"role": "user", "content": "Hello"}]'
        raise InputError(f"messages={quote(messages)} {wanted}")
    if tools is not None and not isinstance(tools, list):
        wanted = 'must be a list, such as [{"type": "function", "function": {"name": "weather"}}]'
        raise InputError(f"tools={quote(tools)} {wanted}")
    if tools and messages is None:
        raise InputError("tools belong to messages, and there is a prompt: leave one out")
    for part in _texts([text, messages, tools]):
        if not is_unicode(part):
            raise InputError(f"{quote(part)} holds half a surrogate pair: write whole characters")
    if messages is not None:
        try:
            read_conversation(messages)
            read_tools(tools or ())
        except RecursionError:
            raise InputError("messages are nested too deeply: content is text") from None
    return text, messages, tools or ()


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included, however deep it nests."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value


def message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def opening(system: str) -> list[dict[str, Any]]:
    """The messages that a conversation begins with."""
    return [message("system", system)] if system else []
