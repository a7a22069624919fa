"""What a list of messages means as a conversation, before any version's template is applied.

Messages are dicts as in the APIs of Mistral and OpenAI; further keys are ignored:

    {"role": "system", "content": "Be brief."}
    {"role": "user", "content": "Weather in Oslo?"}
    {"role": "assistant", "content": "It is", "prefix": True}  # the last one, to be gone on from
    {"role": "assistant", "tool_calls": [{"id": "a1B2c3D4e",
        "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]}  # or arguments as JSON
    {"role": "tool", "tool_call_id": "a1B2c3D4e", "name": "weather", "content": "-3"}

Content is text, or a list of {"type": "text", "text": ...}. The rules are those of mistral-common
1.13 for serving its versions v1 to v3.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixtral_jax.config import InputError

JOINT = "\n\n"  # between the texts that become one
FOLLOWERS = {
    None: ("system", "user", "assistant"),
    "system": ("system", "user", "assistant"),
    "user": ("user", "system", "assistant"),
    "assistant": ("assistant", "user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
CALL_ID = re.compile(r"[A-Za-z0-9]{9}")


@dataclass(frozen=True)
class Call:
    """A tool call."""

    name: str
    arguments: Any
    """The JSON value that the arguments spell, or their text where they spell none."""
    id: str | None = None


@dataclass(frozen=True)
class Result:
    """What a tool gave back."""

    content: Any
    """The JSON value that the content spells, or its text where it spells none."""
    name: str | None
    call_id: str | None


@dataclass(frozen=True)
class Turn:
    """Consecutive messages of one role as one, or one tool result."""

    role: str
    """user, assistant or tool."""
    text: str = ""
    calls: tuple[Call, ...] = ()
    result: Result | None = None
    prefix: bool = False
    """The assistant's turn is not at its end."""


@dataclass(frozen=True)
class Conversation:
    """Turns, the first of them the user's, and the text of all system messages."""

    system: str
    turns: tuple[Turn, ...]

    @property
    def last_user(self) -> int:
        """Index of the user's last turn."""
        return max(i for i, turn in enumerate(self.turns) if turn.role == "user")


def read_conversation(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Check messages and join those that belong together.

    Neighbours of one role are one turn, their texts a blank line apart, except for tool results. A
    system message parts its neighbours. A conversation that the user does not begin is given an
    empty turn of the user's in front.

    Raises:
      InputError: naming the message, counted from 1, that cannot be where or what it is.
    """
    if not messages:
        raise InputError("the conversation has no message: begin it with one of the user's")
    _check_order(messages)
    _check_results(messages)
    _check_end(messages)
    systems = ((m, _text(m, n)) for n, m in enumerate(messages, 1) if m["role"] == "system")
    system = [text for message, text in systems if message["content"]]  # a list of "" counts
    turns = []
    for role, group in itertools.groupby(enumerate(messages, 1), lambda item: item[1]["role"]):
        numbered = list(group)
        if role == "tool":
            turns += [Turn("tool", result=_result(m, n)) for n, m in numbered]
        elif role != "system":
            parts = [_turn(m, n) for n, m in numbered]
            turns.append(_joined(parts, numbered[-1][0]))
    if not turns or turns[0].role != "user":
        turns.insert(0, Turn("user"))
    return Conversation(JOINT.join(system), tuple(turns))


def read_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools, with the keys that a template shows in their order.

    Args:
      tools: each {"type": "function", "function": {"name": ..., "description": ..., "parameters":
        a JSON schema}}; further keys are ignored.
    Raises:
      InputError: naming the tool, counted from 1, and what is wrong in it.
    """
    read = []
    for number, tool in enumerate(tools, 1):
        where = f"tool {number}"
        function = _mapping(tool, where).get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
            raise InputError(f"{where} must be {{'type': 'function', 'function': {{'name': ...}}}}")
        parameters = function.get("parameters") or {}
        description = function.get("description") or ""
        if not isinstance(description, str):
            raise InputError(f"{where}: description={description!r} must be text")
        shown = {"name": _function_name(function.get("name"), where), "description": description}
        shown["parameters"] = dict(_mapping(parameters, f"{where}: parameters"))
        read.append({"type": "function", "function": shown})
    return read


# ---- checks over the whole ---------------------------------------------------------------------


def _check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    before = None
    for number, message in enumerate(messages, 1):
        role = _mapping(message, f"message {number}").get("role")
        if role not in ("system", "user", "assistant", "tool"):
            raise InputError(
                f"message {number}: role={role!r} is not one of system, user, assistant, tool"
            )
        if role not in FOLLOWERS[before]:
            place = f"after {before}" if before else "at the beginning"
            raise InputError(
                f"message {number}: {role} cannot come {place}, only {', '.join(FOLLOWERS[before])}"
            )
        if message.get("prefix") and (role != "assistant" or number != len(messages)):
            raise InputError(
                f"message {number}: prefix belongs to a last message of the assistant's"
            )
        before = role


def _check_results(messages: Sequence[Mapping[str, Any]]) -> None:
    """Every tool call needs a result before the assistant speaks again, and before the end."""
    missing = 0
    for number, message in enumerate([*messages, {"role": "assistant"}], 1):
        if message["role"] == "tool":
            missing -= 1
        elif message["role"] == "assistant":
            if missing:
                fault = f"{missing} tool calls without" if missing > 0 else f"{-missing} too many"
                raise InputError(f"{fault} tool results before message {number}")
            missing = len(_calls(message, number))
            if missing and number == 1:
                raise InputError("message 1: tool calls cannot begin a conversation")


def _check_end(messages: Sequence[Mapping[str, Any]]) -> None:
    last, count = messages[-1], len(messages)
    if last["role"] == "assistant" and (count == 1 or not last.get("prefix")):
        fix = "put one of the user's before it" if last.get("prefix") else "or set its prefix"
        raise InputError(
            f"message {count}, the last, is the assistant's: end with one of the user's, {fix}"
        )


# ---- single messages ---------------------------------------------------------------------------


def _turn(message: Mapping[str, Any], number: int) -> Turn:
    text, role = _text(message, number), message["role"]
    if role == "user":
        return Turn("user", text)
    made = tuple(_call(call, f"message {number}") for call in _calls(message, number))
    if bool(text) == bool(made):
        raise InputError(f"message {number}: the assistant's needs either content or tool_calls")
    return Turn("assistant", text, made, prefix=bool(message.get("prefix")))


def _calls(message: Mapping[str, Any], number: int) -> Sequence[Any]:
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise InputError(f"message {number}: tool_calls={calls!r} must be a list")
    return calls


def _joined(parts: list[Turn], number: int) -> Turn:
    """Neighbours of one role as one turn; `number` is the last one's."""
    text = JOINT.join(part.text for part in parts if part.text)
    calls = tuple(call for part in parts for call in part.calls)
    if text and calls:
        raise InputError(
            f"message {number}: tool calls cannot follow the assistant's own text directly"
        )
    return dataclasses.replace(parts[-1], text=text, calls=calls)


def _text(message: Mapping[str, Any], number: int) -> str:
    content = message.get("content")
    if content is None and message["role"] == "assistant":
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) and not isinstance(content, bytes) else [None]
    texts = []
    for part in parts:
        is_text = isinstance(part, Mapping) and part.get("type") == "text"
        text = part.get("text") if is_text else None
        if not isinstance(text, str):
            raise InputError(
                f"message {number}: content={content!r} must be text, or a list of "
                "{'type': 'text', 'text': ...}"
            )
        texts.append(text)
    return JOINT.join(filter(None, texts))


def _call(call: Any, where: str) -> Call:
    function = _mapping(call, f"{where}: a tool call").get("function")
    function = _mapping(function, f"{where}: the function of a tool call")
    name = _function_name(function.get("name"), where)
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = to_json(dict(arguments), where)
    if not isinstance(arguments, str | None):
        raise InputError(f"{where}: arguments={arguments!r} must be JSON text or a dict")
    call_id = call.get("id")
    if not isinstance(call_id, str | None):
        raise InputError(f"{where}: id={call_id!r} of a tool call must be text")
    return Call(name, _json_or_text(arguments or ""), call_id)


def _result(message: Mapping[str, Any], number: int) -> Result:
    name, call_id = message.get("name"), message.get("tool_call_id")
    if name is not None:
        _function_name(name, f"message {number}")
    if not isinstance(call_id, str | None):
        raise InputError(f"message {number}: tool_call_id={call_id!r} must be text")
    return Result(_json_or_text(_text(message, number)), name, call_id)


def check_call_id(call_id: str | None) -> None:
    """Refuse what v3 cannot show as the id of a call.

    Raises:
      InputError: saying what an id looks like.
    """
    if call_id is None or not CALL_ID.fullmatch(call_id):
        raise InputError(f"tool call id {call_id!r} must be 9 letters or digits for a v3 tokenizer")


def to_json(value: Any, where: str) -> str:
    """JSON as the templates write it: a blank after each comma and colon, no escaped letters.

    Raises:
      InputError: if it is nothing that JSON can hold.
    """
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be written as JSON: {error}") from None


def _json_or_text(text: str) -> Any:
    """The value that JSON text spells; no text is {}, and text that is not JSON is itself."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _function_name(name: Any, where: str) -> str:
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise InputError(
            f"{where}: function name {name!r} must be 1 to 64 letters, digits, underscores, dashes"
        )
    return name


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a dict, not {value!r}")
    return value
