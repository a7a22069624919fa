"""What is made: answers, their line of JSON, and the end of an answer at a stop string."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from mixtral_jax.interop.strict_json import finite

FINISH_REASONS = ("stop", "length", "error")


class TokenLogProbability(NamedTuple):
    """A token and how likely it was."""

    token: str
    """As the model spells it."""
    id: int
    logprob: float
    """Natural logarithm of its probability; -inf where it was impossible."""
    top: list[tuple[str, int, float]]
    """Spelling, id and log-probability of the likeliest tokens in its place, best first."""


@dataclass
class Answer:
    """One answer to one request, or why there is none."""

    request_name: str
    """As messages name it: `prompt 3` or `line 3`."""
    id: Any
    """The request's own, or its number."""
    index: int
    """Which of the request's n answers, from 0."""
    prompt: str
    text: str
    """Without the prompt, and without what ended it."""
    tokens: list[int]
    """The ids that were made: those of a stop string too, but no id that ended it."""
    finish_reason: str
    """stop: end of text, a stop string or a stop id; length; error."""
    stop: str | int | None = None
    """The stop string or id that ended it; None at the end of text, and for other reasons."""
    logprobs: list[TokenLogProbability] | None = None
    """One for each token that was made, where the request asks for them."""
    prompt_logprobs: list[TokenLogProbability | None] | None = None
    """One for each token of the prompt; None for the first, before which there is nothing."""
    error: str | None = None
    """Why there is no answer, on one line."""
    prompt_tokens: int = 0
    """Tokens of the prompt, BOS included."""
    cached_tokens: int = 0
    """How many of these had been computed for an earlier request."""

    def __post_init__(self) -> None:
        if self.finish_reason not in FINISH_REASONS:
            known = ", ".join(FINISH_REASONS)
            raise ValueError(f"finish_reason={self.finish_reason!r} is not one of {known}")

    @property
    def perplexity(self) -> float | None:
        """exp(-mean of the prompt's log-probabilities), or None where there are none of them."""
        known = [entry.logprob for entry in self.prompt_logprobs or () if entry is not None]
        if not known:
            return None
        try:
            return math.exp(-sum(known) / len(known))
        except OverflowError:
            return math.inf


# ---- JSON --------------------------------------------------------------------------------------

BREAKS = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What some programs end a line at, or cannot write, and JSON need not escape."""


def to_json(answer: Answer) -> str:
    """An answer as one line of JSON, without the line's end.

    Keys, in this order, absent where None: request_name, id, index, prompt, text, tokens,
    finish_reason, stop, logprobs, prompt_logprobs, perplexity, error, prompt_tokens, cached_tokens.
    A log-probability is {"token", "id", "logprob", "top": [{"token", "id", "logprob"}, ...]}.
    Numbers that JSON has not, such as a log-probability of -inf, are null.
    """
    values = {
        "request_name": answer.request_name,
        "id": answer.id,
        "index": answer.index,
        "prompt": answer.prompt,
        "text": answer.text,
        "tokens": [int(token) for token in answer.tokens],
        "finish_reason": answer.finish_reason,
        "stop": answer.stop,
        "logprobs": _entries(answer.logprobs),
        "prompt_logprobs": _entries(answer.prompt_logprobs),
        "perplexity": answer.perplexity,
        "error": answer.error,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
    }
    given = {key: value for key, value in values.items() if value is not None}
    if "perplexity" in given:
        given["perplexity"] = finite(answer.perplexity)  # null, but there
    line = json.dumps(given, ensure_ascii=False, allow_nan=False)
    return BREAKS.sub(lambda match: f"\\u{ord(match[0]):04x}", line)


def _entries(entries: list[TokenLogProbability | None] | None) -> list[dict | None] | None:
    return None if entries is None else [e and _entry(*e) for e in entries]


def _entry(token: str, id: int, logprob: float, top: list | None = None) -> dict[str, Any]:
    made = {"token": token, "id": int(id), "logprob": finite(float(logprob))}
    return made if top is None else {**made, "top": [_entry(*other) for other in top]}


# ---- stop strings ------------------------------------------------------------------------------


class StopStrings:
    """Ends a text that comes in parts at the first of some stop strings.

    The match that begins first wins, and of those that begin together the longest. Neither it nor
    what follows is ever shown. What is found and shown depends on the whole text alone, not on how
    it is split: so a match is only settled once no other can begin before it, or with it and be
    longer. Of "\\n" and "\\n\\n", "\\n" waits for the next character; a stop string that neither
    begins another nor lies inside its beginning is settled at once.

    Each character takes a constant time for each stop string, however long (Knuth, Morris and
    Pratt, Fast pattern matching in strings, SIAM J. Comput. 6, 1977).
    """

    found: str | None = None
    """The stop string that has ended the text."""

    def __init__(self, stops: Iterable[str]) -> None:
        """Args: the stop strings, none of them empty.

        Raises:
          ValueError: if one is.
        """
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._begun = [0] * len(self._stops)  # characters of each stop that the text ends with
        self._held = ""
        self._best: tuple[int, int, str] | None = None  # start in _held, -length, stop

    def push(self, part: str, ends: bool = True) -> str:
        """Take the next part; return what may be shown now, never what could begin a stop string.

        After the end, which `found` tells, it is nothing.

        Args: ends: whether a stop string that ends in this part counts.
        """
        if self.found is not None:
            return ""
        end = len(self._held)
        self._held += part
        for character in part:
            end += 1
            self._step(character, end, ends)
            if self._best and self._best[0] < end - max(self._begun):
                return self._end()
        return self._show(end - max(self._begun, default=0))

    def flush(self) -> str:
        """End the text: return what was held back. A match that waited is found now."""
        if self.found is None and self._best:
            return self._end()
        return self._show(len(self._held))

    def _step(self, character: str, end: int, ends: bool) -> None:
        """Take one character, which ends at `end` in the text that is held."""
        for i, (stop, borders) in enumerate(self._stops):
            begun = self._begun[i]
            while begun and stop[begun] != character:
                begun = borders[begun]
            begun += stop[begun] == character
            if begun == len(stop):
                if ends:
                    match = (end - begun, -begun, stop)
                    self._best = min(self._best or match, match)
                begun = borders[begun]
            self._begun[i] = begun

    def _show(self, count: int) -> str:
        shown, self._held = self._held[:count], self._held[count:]
        if self._best:
            start, *rest = self._best
            self._best = (start - count, *rest)
        return shown

    def _end(self) -> str:
        start, _, self.found = self._best
        shown, self._held = self._held[:start], ""
        return shown


def _borders(stop: str) -> list[int]:
    """For each length of a beginning of `stop`, how many characters both begin and end it, fewer
    than all."""
    if not stop:
        raise ValueError("a stop string must not be empty")
    borders = [0, 0]
    for character in stop[1:]:
        length = borders[-1]
        while length and stop[length] != character:
            length = borders[length]
        borders.append(length + (stop[length] == character))
    return borders
