"""An answer while it is made: the host's side of one request in the engine."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mixtral_jax.data.tokenizer import StreamDecoder, Tokenizer
from mixtral_jax.generation.request import Options, Request
from mixtral_jax.generation.results import Answer, StopStrings, TokenLogProbability

NOT_FINITE = "a weight is NaN or infinite, or what is computed overflows; check the checkpoint"


class Event(NamedTuple):
    """Something that has been made."""

    request: int
    """Number of the request, from 0 in the order they were given."""
    index: int
    """Which of its n answers."""
    text: str
    """What the answer's text goes on with; a token may make none, or several characters."""
    token: int | None
    """The id that was made; None where the answer ended without one."""
    logprob: TokenLogProbability | None
    """Of the token, where the request asks for it."""
    answer: Answer | None
    """The whole answer, in its last event."""

    @classmethod
    def refused(cls, number: int, request: Request, reason: str) -> Event:
        """The one event of a request that cannot be answered."""
        answer = Answer(f"prompt {number + 1}", number + 1, 0, "", "", [], "error", error=reason)
        answer.prompt_tokens = len(request.tokens)
        return cls(number, 0, "", None, None, answer)


@dataclass(eq=False)
class Task:
    """One answer to one request."""

    number: int
    index: int
    options: Options
    prompt: np.ndarray
    """int32."""
    prompt_text: str
    seed: int
    ends: tuple[int, ...]
    """Ids that end the answer."""
    eos: int | None
    tokenizer: Tokenizer | None
    decoder: StreamDecoder | None
    stops: StopStrings
    row: int = -1
    """The row of the cache that it has, or had."""
    done: int = 0
    """Tokens of the prompt that are in the cache, or on their way."""
    cached: int = 0
    """Tokens of the prompt that were there before."""
    ordered: int = 0
    """Tokens that the devices have been asked to make."""
    behind: tuple[Task, int] | None = None
    """A prompt that is run, and the tokens that it shares with this one, which waits for them."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogProbability] = field(default_factory=list)
    prompt_logprobs: list[TokenLogProbability | None] = field(default_factory=lambda: [None])
    answer: Answer | None = None

    @classmethod
    def begin(
        cls,
        number: int,
        index: int,
        request: Request,
        tokenizer: Tokenizer | None,
        eos: int | None,
    ) -> Task:
        """The n answers of a request differ by their seeds; the first has the request's own."""
        options, tokens = request.options, np.array(request.tokens, np.int32)
        seed = options.seed
        if index:
            seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
        text, decoder = "", None
        if tokenizer is not None:
            decoder, text = StreamDecoder(tokenizer), tokenizer.decode(tokens.tolist())
            if request.goes_on:  # so that an answer keeps the space it begins with
                for token in tokens:
                    if decoder.push(token):  # what comes after the first text does not matter
                        break
                decoder.flush()
        ends = (*(() if eos is None else (eos,)), *options.stop_token_ids)
        return cls(
            *(number, index, options, tokens, text, seed, ends, eos),
            *(tokenizer, decoder, StopStrings(options.stop)),
        )

    @property
    def marks(self) -> bool:
        """Whether it needs a history or a bias on the devices."""
        o = self.options
        penalties = (o.repetition_penalty - 1, o.presence_penalty, o.frequency_penalty)
        return any(penalties) or bool(o.logit_bias)

    @property
    def _may_end(self) -> bool:
        """Whether there are more tokens than must be made, so that a stop text ends the answer."""
        return len(self.tokens) > self.options.min_new_tokens

    def push(self, token: int, found) -> Event:
        """Take a token that was made, with its log-probabilities where they are wanted."""
        if token in self.ends:
            return self.end("stop", None if token == self.eos else token)
        self.tokens.append(token)
        logprob = None
        if found is not None:
            logprob = self._logprob(
                token, found.chosen_B, found.top_ids_BN, found.top_BN, self.options.logprobs
            )
            self.logprobs.append(logprob)
        shown = ""
        if self.decoder is not None:
            shown = self.stops.push(self.decoder.push(token), self._may_end)
            self.text += shown
        if self.stops.found is not None:
            return self.end("stop", self.stops.found, shown, token, logprob)
        if len(self.tokens) == self.options.max_new_tokens:
            return self.end("length", None, shown, token, logprob)
        return Event(self.number, self.index, shown, token, logprob, None)

    def fail(self, what: str) -> Event:
        """The last event, where logits were not finite; what: whose."""
        return self.end("error", None, error=f"the logits of {what} are not finite: {NOT_FINITE}")

    def scored(self, found, start: int, count: int) -> None:
        """Take the log-probabilities of the tokens after those of a part of the prompt."""
        for i in range(count):
            if start + i + 1 < len(self.prompt):
                token = int(self.prompt[start + i + 1])
                arrays = (found.chosen_B[i], found.top_ids_BN[i], found.top_BN[i])
                entry = self._logprob(token, *arrays, self.options.prompt_logprobs)
                self.prompt_logprobs.append(entry)

    def end_scored(self) -> Event:
        """The last event of a prompt that wants no answer."""
        if any(entry is not None and math.isnan(entry.logprob) for entry in self.prompt_logprobs):
            return self.fail("the prompt")
        return self.end("length", None)

    def end(
        self,
        reason: str,
        stop: str | int | None,
        shown: str = "",
        token: int | None = None,
        logprob: TokenLogProbability | None = None,
        error: str | None = None,
    ) -> Event:
        """The last event. What the decoder and the stop strings held back is shown now."""
        if self.decoder is not None and self.stops.found is None:
            rest = self.stops.push(self.decoder.flush(), self._may_end) + self.stops.flush()
            shown += rest
            self.text += rest
            if self.stops.found is not None:
                reason, stop, error = "stop", self.stops.found, None
        options = self.options
        self.answer = Answer(
            f"prompt {self.number + 1}",
            self.number + 1,
            self.index,
            self.prompt_text,
            self.text,
            self.tokens,
            reason,
            stop,
            self.logprobs if options.logprobs is not None else None,
            self.prompt_logprobs if options.prompt_logprobs is not None else None,
            error,
            prompt_tokens=len(self.prompt),
            cached_tokens=self.cached,
        )
        return Event(self.number, self.index, shown, token, logprob, self.answer)

    def _logprob(self, token: int, chosen, top_ids, top, count: int) -> TokenLogProbability:
        best = [
            (self._text_of(int(i)), int(i), float(p))
            for i, p in zip(top_ids[:count], top[:count], strict=True)
        ]
        return TokenLogProbability(self._text_of(token), token, float(chosen), best)

    def _text_of(self, token: int) -> str:
        return "" if self.tokenizer is None else self.tokenizer.piece(token)
