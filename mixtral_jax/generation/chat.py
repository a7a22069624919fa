"""What generate.py --chat does: prompts as messages of a user's, and whole conversations."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import jax

from mixtral_jax.config import InputError
from mixtral_jax.data.chat import encode_chat
from mixtral_jax.data.tokenizer import StreamDecoder, Tokenizer
from mixtral_jax.generation import command
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.request import Deployment, Options, Request

NEW = "/new"
HELP = f"one message a line; {NEW} begins anew, Ctrl-C stops an answer, Ctrl-D ends"


def run(
    checkpoint: str | pathlib.Path,
    prompts: Sequence[str] | None,
    system: str,
    options: Options,
    deployment: Deployment,
) -> None:
    """Answer prompts, each as the one message of a user's; or, if None, converse.

    A conversation is read from standard input; see `converse`. Starts JAX for the deployment's
    mesh, so call it once per process.

    Raises:
      InputError: for what a user can mend.
    """
    deployed = command.deploy(checkpoint, deployment)
    tokenizer = deployed.tokenizer
    if prompts is not None:
        chats = [[*opening(system), message("user", prompt)] for prompt in prompts]
        requests = [Request(tuple(encode_chat(tokenizer, chat)), options) for chat in chats]
        command.answer(deployed, prompts, requests, [StreamDecoder(tokenizer) for _ in prompts])
        return
    if jax.process_count() > 1:
        raise InputError(
            f"a conversation has one terminal and this is one of {jax.process_count()} processes: "
            "give --prompt or --prompt-file too"
        )
    encode_chat(tokenizer, [*opening(system), message("user", "")])  # before the weights are read
    context = deployed.config.max_position_embeddings
    chat = Chat(deployed.start(), tokenizer, system, options, context)
    converse(chat, sys.stdin.buffer, terminal=sys.stdin.isatty())


def message(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


def opening(system: str) -> list[dict[str, Any]]:
    """The messages that a conversation begins with."""
    return [message("system", system)] if system else []


class Chat:
    """A conversation with a model. Every turn is encoded anew from the messages before it."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, system: str, options: Options, context: int
    ):
        self._engine = engine
        self._tokenizer = tokenizer
        self._system = system
        self._options = options
        self._context = context
        self.forget()

    def forget(self) -> None:
        """Begin anew, with the system prompt alone."""
        self.messages: list[dict[str, Any]] = opening(self._system)

    def reply(self, text: str, show: Callable[[str], None], stopped: Callable[[], bool]) -> str:
        """Answer a message of the user's; both go into the history, as far as the answer came.

        An empty answer leaves none there: the user's next message is then joined to this one.

        Args:
          show: takes the parts of the answer, as they come.
          stopped: asked after each token whether to stop there.
        Raises:
          InputError: if the conversation would not fit in the context; the history stays as it was.
        """
        messages = [*self.messages, message("user", text)]
        steps = self._engine.stream([self._request(messages)])
        self.messages = messages
        decoder = StreamDecoder(self._tokenizer)
        answer = ""
        for made in steps:
            part = "".join(decoder.push(token) for token in made.values())
            show(part)
            answer += part
            if stopped():
                break
        show(end := decoder.flush())
        if answer + end:
            messages.append(message("assistant", answer + end))
        return answer + end

    def _request(self, messages: list[dict[str, Any]]) -> Request:
        ids = encode_chat(self._tokenizer, messages)
        most = self._options.max_new_tokens
        if len(ids) + most > self._context:
            room = self._context - len(ids)
            fix = f"use max_new_tokens={room} or less" if room > 0 else "shorten it"
            if len(messages) > len(opening(self._system)) + 1:
                fix = f"begin anew with {NEW}"
            raise InputError(
                f"the conversation has {len(ids)} tokens and with max_new_tokens={most} goes "
                f"beyond the model's context of {self._context}: {fix}"
            )
        return Request(tuple(ids), self._options)


def converse(chat: Chat, stream: BinaryIO, terminal: bool) -> None:
    """Answer the lines of a stream on standard output, each as it is read, up to the stream's end.

    A line is a message of the user's; a blank one is passed over; NEW begins anew. What cannot be
    answered, such as a message that the context has no room for, is said in one line. On a terminal
    the conversation then goes on without it; from a file or a pipe, that ends the program.

    Raises:
      InputError: for such a message, if not from a terminal.
    """
    if terminal:
        command.say(HELP)
    for number, line in enumerate(_lines(stream, terminal), 1):
        try:
            text = _decode(line, number)
            if text.strip() == NEW:
                chat.forget()
                command.say("a new conversation")
            elif text.strip():
                _answer(chat, text)
        except InputError as error:
            if not terminal:
                raise
            command.say(f"not answered: {error}")


def _answer(chat: Chat, text: str) -> None:
    with interruptions() as stopped:
        answer = chat.reply(text, command.write, stopped.is_set)
    command.write("\n")
    if not answer:
        command.say("the answer is empty: the next message is joined to this one")


def _lines(stream: BinaryIO, terminal: bool) -> Iterator[bytes]:
    while True:
        if terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = stream.readline()
        if not line:
            if terminal:
                command.say("")
            return
        yield line.removesuffix(b"\n").removesuffix(b"\r")


def _decode(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise InputError(f"line {number} of standard input is not UTF-8") from None


@contextlib.contextmanager
def interruptions() -> Iterator[threading.Event]:
    """Ctrl-C sets the event that this gives, where it would end the program; the second one does.

    An exception would come anywhere, in the middle of JAX's own work too.
    """
    event = threading.Event()

    def note(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
