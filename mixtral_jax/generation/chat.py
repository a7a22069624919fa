"""What generate.py --chat does without a prompt: a conversation."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import jax

from mixtral_jax.command_line import interruptions
from mixtral_jax.config import InputError
from mixtral_jax.data.chat import encode_chat
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.generation import command, output
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.prompts import message, opening
from mixtral_jax.generation.request import (
    Deployment,
    Options,
    Request,
    Serving,
    check_length,
    check_request,
)

NEW, SYSTEM, QUOTES = "/new", "/system", '"""'
HELP = (
    f"one message a line, or several lines between {QUOTES}; {NEW} begins anew, {SYSTEM} TEXT too, "
    "and tells the model that first; Ctrl-C stops an answer, Ctrl-D ends"
)


def run(
    checkpoint: str | pathlib.Path,
    system: str,
    options: Options,
    deployment: Deployment,
    serving: Serving,
) -> None:
    """Converse, on standard input and output; see `converse`.

    Starts JAX for the deployment's mesh, so call it once per process.

    Raises:
      InputError: for what a user can mend.
    """
    if sys.stdin is None:
        raise InputError("standard input, where messages come from, is closed: give --prompt")
    deployed = command.deploy(checkpoint, deployment)
    tokenizer = deployed.tokenizer
    if jax.process_count() > 1:
        raise InputError(
            f"a conversation has one terminal and this is one of {jax.process_count()} processes: "
            "give --prompt or --prompt-file too"
        )
    context = deployed.context(serving)
    # Where no message could be answered, that is said before the weights are read.
    ids = encode_chat(tokenizer, [*opening(system), message("user", "")])
    shortest = Request(tuple(ids), options, goes_on=False)
    check_request(shortest, deployed.config.vocab_size, context, "the conversation")
    engine = deployed.start(dataclasses.replace(serving, rows=1, context=context))
    chat = Chat(engine, tokenizer, system, options, context)
    converse(chat, sys.stdin.buffer, terminal=sys.stdin.isatty())


class Chat:
    """A conversation with a model.

    Every turn is encoded anew from the messages before it; what the engine's cache has of them is
    not computed again.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, system: str, options: Options, context: int
    ):
        self._engine = engine
        self._tokenizer = tokenizer
        self._system = system
        self._options = options
        self._context = context
        self.forget()

    def forget(self, system: str | None = None) -> None:
        """Begin anew, with the system prompt alone, or with a new one."""
        self._system = self._system if system is None else system
        self.messages: list[dict[str, Any]] = opening(self._system)

    def reply(self, text: str, show: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        """Answer a message of the user's; both go into the history, as far as the answer came.

        An empty answer leaves none there: the user's next message is then joined to this one.

        Args:
          show: takes the parts of the answer, as they come.
          stopped: asked after each token whether to stop there.
        Raises:
          InputError: if the conversation would not fit in the context, or the answer fails; the
            history stays as it was.
        """
        before = self.messages
        messages = [*self.messages, message("user", text)]
        events = self._engine.stream(self._request(messages))
        self.messages = messages
        answer = ""
        with contextlib.closing(events):
            for event in events:
                show(event.text)
                answer += event.text
                if event.answer is not None and event.answer.error is not None:
                    self.messages = before
                    show("\n" if answer else "")
                    raise InputError(event.answer.error)
                if stopped():
                    break
        if answer:
            messages.append(message("assistant", answer))
        return answer

    def _request(self, messages: list[dict[str, Any]]) -> Request:
        ids = encode_chat(self._tokenizer, messages)
        request = Request(tuple(ids), self._options, goes_on=False)
        goes_on = len(messages) > len(opening(self._system)) + 1
        fix = f"begin anew with {NEW}" if goes_on else None
        check_length(request, self._context, "the conversation", fix)
        return request


def converse(chat: Chat, stream: BinaryIO, terminal: bool) -> None:
    """Answer the messages of a stream on standard output, each as it is read, up to its end.

    A message is a line, or all lines between two of three quotation marks; a blank one is passed
    over; NEW and SYSTEM begin anew. What cannot be answered, such as a message that the context has
    no room for, is said in one line. On a terminal the conversation then goes on without it; from a
    file or a pipe, that ends the program.

    Raises:
      InputError: for such a message, if not from a terminal.
    """
    if terminal:
        output.say_aside(HELP)
    lines = enumerate(_lines(stream, terminal), 1)
    for number, line in lines:
        try:
            text = _decode(line, number)
            if text.lstrip().startswith(QUOTES):
                _answer(chat, _quoted(text, number, lines))
            else:
                _take(chat, text)
        except InputError as error:
            if not terminal:
                raise
            output.say_aside(f"not answered: {error}")


def _quoted(first: str, number: int, lines: Iterator[tuple[int, bytes]]) -> str:
    """A message of several lines, up to the closing quotation marks or the end."""
    _, text = first.split(QUOTES, 1)
    parts, wrong = [], None
    while QUOTES not in text:
        parts.append(text)
        try:
            number, line = next(lines)
        except StopIteration:
            raise InputError(f"line {number}: the message has no closing {QUOTES}") from None
        try:
            text = _decode(line, number)
        except InputError as error:  # the rest of the message is still to be passed over
            text, wrong = "", error
    if wrong is not None:
        raise wrong
    last, after = text.split(QUOTES, 1)
    if after.strip():
        raise InputError(f"line {number}: text follows the closing {QUOTES}")
    parts.append(last)
    return "\n".join(parts).strip("\n")


def _take(chat: Chat, text: str) -> None:
    """Do what a line says: a command's word and what follows it, or a message."""
    word, *rest = text.split(maxsplit=1) or [""]
    if word == NEW and not rest:
        chat.forget()
        output.say_aside("a new conversation")
    elif word == SYSTEM:
        system = "".join(rest).strip()
        chat.forget(system)
        output.say_aside(
            f"a new conversation, {'with a new' if system else 'without a'} system prompt"
        )
    else:
        _answer(chat, text)


def _answer(chat: Chat, text: str) -> None:
    """Answer a message, if it is not blank."""
    if not text.strip():
        return
    with interruptions() as stopped:
        answer = chat.reply(text, output.write, stopped.is_set)
    output.write("\n")
    if not answer:
        output.say_aside("the answer is empty: the next message is joined to this one")


def _lines(stream: BinaryIO, terminal: bool) -> Iterator[bytes]:
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = stream.readline()
        if not line:
            if terminal:
                output.say_aside("")
            return
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def _decode(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise InputError(f"line {number} of standard input is not UTF-8") from None
