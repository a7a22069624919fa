"""Conversations as token ids, in the templates of Mistral's tokenizers v1, v2 and v3.

With C a control id, and every quoted text encoded by itself:

    v1      BOS  "[INST] system\\n\\nuser [/INST]"  "answer" EOS  "[INST] user [/INST]"
    v2, v3  BOS  C[INST] "user" C[/INST]  "answer" EOS  C[AVAILABLE_TOOLS] "tools"
            C[/AVAILABLE_TOOLS]  C[INST] "system\\n\\nuser" C[/INST]  C[TOOL_CALLS] "calls" EOS
            C[TOOL_RESULTS] "result" C[/TOOL_RESULTS]

The system prompt stands in the first turn of the user's in v1; it and the tools stand in the last
one otherwise. v2 forgets the calls and results before that turn, and gives calls no ids.

Source: mistral-common 1.13, the same token for token; what it says holds where the template in a
released tokenizer_config.json says something else.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mixtral_jax.config import InputError
from mixtral_jax.data.conversation import (
    JOINT,
    Call,
    Conversation,
    Turn,
    check_call_id,
    read_conversation,
    read_tools,
    to_json,
)
from mixtral_jax.data.tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Ids, BOS included, after which the assistant's answer comes, in the tokenizer's template.

    Args:
      messages: dicts, as in `mixtral_jax.data.conversation`.
      tools: dicts, as for its `read_tools`.
    Raises:
      InputError: in one line, for a conversation that makes no sense or that the template of the
        tokenizer's version cannot hold.
    """
    if tokenizer.version is None:
        raise InputError("the tokenizer's chat template is later than v3, the last one known")
    conversation = read_conversation(messages)
    if tokenizer.version == "v1":
        return _encode_v1(tokenizer, conversation, bool(tools))
    return _Controls(tokenizer, conversation, read_tools(tools)).encode()


def _encode_v1(tokenizer: Tokenizer, conversation: Conversation, tools: bool) -> list[int]:
    if tools or any(turn.calls or turn.result for turn in conversation.turns):
        raise InputError("a v1 tokenizer has no template for tools and their calls")
    ids = [tokenizer.bos_id]
    for index, turn in enumerate(conversation.turns):
        if turn.role == "user":
            system = conversation.system if index == 0 else ""
            ids += tokenizer.encode(f"[INST] {_under(system, turn.text)} [/INST]")
        else:
            ids += _answered(tokenizer, tokenizer.encode(turn.text), turn)
    return ids


class _Controls:
    """One conversation in the template of v2 or v3."""

    def __init__(self, tokenizer: Tokenizer, conversation: Conversation, tools: list[dict]):
        self._tokenizer = tokenizer
        self._conversation = conversation
        self._tools = tools
        self._v2 = tokenizer.version == "v2"
        if self._v2:
            _check_single_results(conversation)

    def encode(self) -> list[int]:
        ids = [self._tokenizer.bos_id]
        last_user = self._conversation.last_user
        for index, turn in enumerate(self._conversation.turns):
            if turn.role == "user":
                ids += self._user(turn, index == last_user)
            elif self._v2 and index < last_user and (turn.calls or turn.result):
                continue
            elif turn.role == "assistant":
                ids += self._assistant(turn)
            else:
                ids += self._result(turn)
        return ids

    def _between(self, name: str, text: str) -> list[int]:
        control = self._tokenizer.control_id
        return [control(f"[{name}]"), *self._tokenizer.encode(text), control(f"[/{name}]")]

    def _user(self, turn: Turn, last: bool) -> list[int]:
        tools = []
        if last and self._tools:
            tools = self._between("AVAILABLE_TOOLS", to_json(self._tools, "the tools"))
        system = self._conversation.system if last else ""
        return tools + self._between("INST", _under(system, turn.text))

    def _assistant(self, turn: Turn) -> list[int]:
        if not turn.calls:
            return _answered(self._tokenizer, self._tokenizer.encode(turn.text.rstrip(" ")), turn)
        text = to_json([self._call(call) for call in turn.calls], "the tool calls")
        calls = [self._tokenizer.control_id("[TOOL_CALLS]"), *self._tokenizer.encode(text)]
        return _answered(self._tokenizer, calls, turn)

    def _call(self, call: Call) -> dict[str, Any]:
        shown = {"name": call.name, "arguments": call.arguments}
        if not self._v2:
            check_call_id(call.id)
            shown["id"] = call.id
        return shown

    def _result(self, turn: Turn) -> list[int]:
        result = turn.result
        assert result is not None
        if self._v2:
            shown: Any = [{"name": result.name, "content": result.content}]
        else:
            check_call_id(result.call_id)
            shown = {"content": result.content, "call_id": result.call_id}
        return self._between("TOOL_RESULTS", to_json(shown, "a tool result"))


def _under(system: str, text: str) -> str:
    return f"{system}{JOINT}{text}" if system else text


def _answered(tokenizer: Tokenizer, ids: list[int], turn: Turn) -> list[int]:
    return ids if turn.prefix else [*ids, tokenizer.eos_id]


def _check_single_results(conversation: Conversation) -> None:
    """v2 was made for one result: where results are shown, one call at a time has one."""
    for before, turn in itertools.pairwise(conversation.turns[conversation.last_user :]):
        if before.role == turn.role == "tool":
            raise InputError("a v2 tokenizer has no template for several tool results in a row")
