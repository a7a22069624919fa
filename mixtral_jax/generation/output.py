"""What generate.py prints: answers as text or as lines of JSON, in the order of their prompts.

The first answer that has not ended is shown as it comes, and what the others have made meanwhile
when it is their turn.
"""

from __future__ import annotations

import abc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from mixtral_jax import command_line, hosts
from mixtral_jax.command_line import OutputError
from mixtral_jax.data.tokenizer import StreamDecoder, Tokenizer
from mixtral_jax.generation.answering import Event
from mixtral_jax.generation.results import Answer, to_json

COLOURS = (196, 46, 27, 226, 201, 51, 208, 141, 118, 39, 213, 220, 160, 34, 99, 250)
"""Of the terminal's 256: experts have them in turn."""
TOGETHER = 64
"""Events between which several hosts ask each other whether to stop."""


class Shown(NamedTuple):
    """A prompt, as it is shown."""

    text: str
    answers: int
    """How many come to it; one, that says so, where it is refused."""
    echo: bool


class InOrder(abc.ABC):
    """Prints answers of several prompts one after another, whatever order they are made in."""

    def __init__(self, prompts: Sequence[Shown]):
        self._prompts = prompts
        self._keys = [(n, i) for n, shown in enumerate(prompts) for i in range(shown.answers)]
        self._at = 0  # the key that is being shown
        self._waiting: dict[tuple[int, int], list[Event]] = {}

    def take(self, event: Event) -> None:
        """Show an event, now or when it is its answer's turn."""
        self._waiting.setdefault((event.request, event.index), []).append(event)
        while self._at < len(self._keys) and self._keys[self._at] in self._waiting:
            key = self._keys[self._at]
            for waiting in self._waiting.pop(key):
                self.event(key, waiting)
                if waiting.answer is not None:
                    self._at += 1

    @abc.abstractmethod
    def event(self, key: tuple[int, int], event: Event) -> None:
        """Print an event of the answer whose turn it is."""


class Text(InOrder):
    """One answer: its text alone. Several: `> ` and the prompt, the text, an empty line."""

    def __init__(self, prompts: Sequence[Shown], paint: Callable[[int, Answer], str] | None = None):
        """Args: paint: of a prompt's number and an answer, what is printed in place of its text."""
        super().__init__(prompts)
        self._alone, self._paint = len(self._keys) == 1, paint
        self._begun: tuple[int, int] | None = None

    def event(self, key: tuple[int, int], event: Event) -> None:
        shown, answer = self._prompts[key[0]], event.answer
        if self._begun != key:
            if answer is not None and answer.finish_reason == "error":
                return  # what was wrong is said on standard error
            self._begun = key
            if not self._alone:
                which = f" ({key[1] + 1} of {shown.answers})" if shown.answers > 1 else ""
                write(f"> {shown.text}{which}\n")
            if shown.echo and self._paint is None:
                write(shown.text)
        if self._paint is None:
            write(event.text)
        if answer is None:
            return
        if self._paint is not None:
            write(self._paint(key[0], answer))
        if answer.prompt_logprobs is not None:
            above = self._paint is not None or answer.text or (shown.echo and shown.text)
            write(("\n" if above else "") + _score(answer))
        write("\n" if self._alone else "\n\n")


def _score(answer: Answer) -> str:
    if answer.perplexity is None:
        return "nothing to score, the prompt is BOS alone"
    scored = len(answer.prompt_logprobs) - 1
    return f"perplexity {answer.perplexity:.4f} over {scored} tokens of the prompt"


class Json(InOrder):
    """A line for each answer, with all that is known of it: results.to_json."""

    def event(self, key: tuple[int, int], event: Event) -> None:
        if event.answer is not None:
            if self._prompts[key[0]].echo and event.answer.finish_reason != "error":
                event.answer.text = self._prompts[key[0]].text + event.answer.text
            write(to_json(event.answer) + "\n")


def pieces(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """What each id adds to the text; of a character in several, the last one adds it."""
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(token) for token in tokens]
    parts[-1] += decoder.flush()
    return parts


def cut(texts: Sequence[str], length: int) -> list[str]:
    """Pieces of a text, up to so many characters."""
    parts = []
    for piece in texts:
        parts.append(piece[:length])
        length -= len(parts[-1])
    return parts


def painted(texts: Sequence[str], experts: Sequence[int]) -> str:
    """Pieces of a text, each on the colour of its expert: the paper's figure 8."""
    parts = []
    for piece, expert in zip(texts, experts, strict=True):
        colour = COLOURS[expert % len(COLOURS)]
        # A colour that crosses the end of a line would fill the rest of it.
        lines = [
            f"\x1b[30;48;5;{colour}m{line}\x1b[0m" if line else "" for line in piece.split("\n")
        ]
        parts.append("\n".join(lines))
    return "".join(parts)


def legend(experts: int) -> str:
    """One line that says which colour is whose."""
    return " ".join(painted([f" {expert} "], [expert]) for expert in range(experts))


class Rates:
    """How fast answers come; on a terminal, told on one line of standard error as they do."""

    def __init__(self, answers: int, first: Callable[[], None], live: bool):
        """Args: first: called at the first token; live: whether to tell as they come."""
        self._answers, self._first, self._live = answers, first, live
        self._began, self._begun, self._told = time.perf_counter(), None, 0.0
        self._decoding: float | None = None
        self._seen: set[tuple[int, int]] = set()
        self.tokens = self.ended = self._after = 0

    def take(self, event: Event) -> None:
        now = time.perf_counter()
        if self._begun is None:
            self._begun = now
            self._first()
        if event.token is not None:
            key = event.request, event.index
            if self._decoding is not None:
                self._after += 1
            elif key in self._seen:  # its second: what decoding needs has been compiled
                self._decoding = now
            self._seen.add(key)
        self.tokens += event.token is not None
        self.ended += event.answer is not None
        if self._live and now - self._told > 0.5:
            self._told = now
            self._tell(f"{self.ended} of {self._answers} answers, {self.tokens} tokens")

    def report(self, prompt_tokens: int, cached: int) -> str:
        """One line: the time to the first token, and tokens/s from the first that is decoded on."""
        if self._live:
            self._tell("")
        first = (self._begun or time.perf_counter()) - self._began
        again = f" ({cached} of them there already)" if cached else ""
        line = f"{prompt_tokens} prompt tokens{again}; first {self.made} after {first:.2f} s"
        seconds = time.perf_counter() - (self._decoding or 0)
        rate = f"; {self._after / seconds:.1f} tokens/s" if self._after else ""
        return f"{line}, with compiling; {self.tokens} tokens made{rate}"

    @property
    def made(self) -> str:
        """What there is a first one of: a token, or an answer where none is made, as in scoring."""
        return "token" if self.tokens else "answer"

    def _tell(self, line: str) -> None:
        if jax.process_index() == 0:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


class Stop:
    """Ends what goes from event to event: on several hosts on all of them after the same one."""

    def __init__(self, told: threading.Event):
        self._told, self._events = told, 0
        self._error: Exception | None = None

    def __enter__(self) -> Stop:
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None and self._error is not None:
            raise self._error

    def soon(self, call: Callable[..., None], *arguments: Any) -> None:
        """Print; what cannot be printed on the first of several hosts is raised with the others."""
        try:
            if self._error is None:
                call(*arguments)
        except (BrokenPipeError, OutputError) as error:
            if jax.process_count() == 1:
                raise
            self._error = error

    def after_event(self) -> None:
        """Raises: KeyboardInterrupt: if a host was told to stop; there, what cannot be printed."""
        self._events += 1
        if jax.process_count() > 1 and self._events % TOGETHER:
            return
        if hosts.on_any_host(self._told.is_set() or self._error is not None):
            raise self._error or KeyboardInterrupt


def write(text: str) -> None:
    """Print on the first host's standard output, at once.

    Raises:
      BrokenPipeError, OutputError: as command_line.write.
    """
    if jax.process_index() == 0:
        command_line.write(text)


def say_aside(text: str) -> None:
    """Print a line on the first host's standard error."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
