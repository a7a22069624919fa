"""Endless batches of packed documents, which resume exactly on any number of hosts.

The documents of all sources, shuffled anew each epoch and mixed by weight, make one endless
sequence. It is dealt to batch_size * data.interleave lanes: in round k each of the B lanes gets one
document of numbers k * B to k * B + B - 1. A lane lays the tokens of its documents end to end and
cuts them into sequences, so it depends on nothing but its own documents, and two integers say where
it stands: the round, and the place in that round's document. Each row of the batch takes a sequence
from each of its lanes in turn.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import grain
import numpy as np

from mixtral_jax.config import Config, InputError
from mixtral_jax.data.corpus import Corpus, hash64, shuffled
from mixtral_jax.data.packing import Batch, document_ids, empty_batch, pack
from mixtral_jax.data.sources import MalformedReport
from mixtral_jax.data.tokenizer import Tokenizer

SHUFFLE, DEAL = 3, 4  # salts
READY = 4  # batches made ahead
MOST_WEIGHT = 10**6  # over the smallest: grain counts in hundredths of that
PATIENCE = 100  # documents without text in a row before asking whether there is any text


class _Batches:
    """An endless iterator of batches that one background thread makes ahead.

    A subclass says how to make the next batch, and where to go on from.
    """

    def __init__(self, rows: Sequence[int], malformed: MalformedReport, lanes: int = 1):
        self.malformed = malformed
        self._state = np.zeros((len(rows), 2 * lanes), np.int64)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ready: collections.deque[Future] = collections.deque()
        self._closed = False

    def _make(self) -> tuple[Batch, np.ndarray]:
        """The next batch, and the state after it; runs in the thread."""
        raise NotImplementedError

    def _seek(self, state: np.ndarray, step: int) -> None:
        """Make batches from this state on, which came after `step` of them."""
        raise NotImplementedError

    @property
    def state(self) -> np.ndarray:
        """int64 [rows, 2 * lanes]: where to go on after the last batch handed out."""
        return self._state.copy()

    def restore(self, state: np.ndarray, step: int) -> None:
        """Go on from a state, before the first batch is asked for.

        Args:
          step: how many batches came before it.
        Raises:
          InputError: if it is not the state of this many rows.
        """
        if self._ready or self._closed:
            raise RuntimeError("restore must come before the first batch")
        if np.shape(state) != self._state.shape:
            raise InputError(
                f"the saved data state has shape {np.shape(state)}, not {self._state.shape}: "
                "resume with the training.batch_size and data.interleave of the run"
            )
        self._state = np.array(state, np.int64)
        self._seek(self._state, step)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RuntimeError("these batches are closed")
        while len(self._ready) < READY:
            self._ready.append(self._thread.submit(self._make))
        try:
            batch, self._state = self._ready.popleft().result()
        except BaseException:
            self.close()
            raise
        return batch

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        self._closed = True
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ready.clear()


class SyntheticBatches(_Batches):
    """Random tokens, one segment a sequence, the same for a given run.seed, row and step.

    The state of a row is the step and 0.
    """

    def __init__(self, config: Config, rows: Sequence[int]):
        super().__init__(rows, MalformedReport())
        self._config = config
        self._rows = list(rows)
        self._step = 0

    def _seek(self, state: np.ndarray, step: int) -> None:
        self._step = step

    def _make(self) -> tuple[Batch, np.ndarray]:
        batch = synthetic_batch(self._config, self._rows, self._step)
        self._step += 1
        return batch, np.array([[self._step, 0]] * len(self._rows), np.int64)


def synthetic_batch(config: Config, rows: Sequence[int], step: int, salt: int = 0) -> Batch:
    """Random tokens for the given rows and step; another salt makes others."""
    length = config.training.sequence_length
    batch = empty_batch(len(rows), length)
    for place, row in enumerate(rows):
        random = np.random.default_rng((config.run.seed % 2**64, salt, row, step))
        ids = random.integers(config.model.vocab_size, size=length + 1)
        pack(batch.rows(place), 0, 1, ids)
    return batch


class TrainBatches(_Batches):
    """The given rows of the training batches of a config.

    A row's state is, for each of its lanes, the round and the place in that round's document of its
    next pair.

    Args:
      rows: which of the training.batch_size rows; on several hosts each reads its own.
      corpus: open_corpus(config).
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        rows: Sequence[int],
        corpus: Corpus,
    ):
        lanes, batch_size = config.data.interleave, config.training.batch_size
        super().__init__(rows, corpus.malformed, lanes)
        corpus.require_text()
        deal, ids = _Deal(config, corpus), _DocumentIds(corpus, tokenizer)
        self._length = config.training.sequence_length
        self._rows = [
            [_Lane(deal, ids, turn * batch_size + int(row)) for turn in range(lanes)]
            for row in rows
        ]
        self._step = 0

    def _seek(self, state: np.ndarray, step: int) -> None:
        self._step = step
        for lanes, places in zip(self._rows, state.tolist(), strict=True):
            for lane, number, offset in zip(lanes, places[::2], places[1::2], strict=True):
                lane.number, lane.offset = number, offset

    def _make(self) -> tuple[Batch, np.ndarray]:
        batch = empty_batch(len(self._rows), self._length)
        for place, lanes in enumerate(self._rows):
            lanes[self._step % len(lanes)].fill(batch.rows(place))
        self._step += 1
        places = [[(lane.number, lane.offset) for lane in lanes] for lanes in self._rows]
        return batch, np.array(places, np.int64).reshape(self._state.shape)


def train_batches(
    config: Config,
    tokenizer: Tokenizer | None,
    rows: Sequence[int],
    corpus: Corpus | None,
) -> TrainBatches | SyntheticBatches:
    """The batches that data.source asks for; synthetic ones need no tokenizer and no corpus."""
    if config.data.source == "synthetic":
        return SyntheticBatches(config, rows)
    return TrainBatches(config, tokenizer, rows, corpus)


class Shuffle(grain.MapDataset):
    """The parent's elements in another order each epoch.

    In place of grain's own shuffle, which tries some 65536 / n places to find one of n elements:
    18 ms for each when n is 2, 1 ms when n is 50.
    """

    def __init__(self, parent: grain.MapDataset, seed: int, source: int):
        super().__init__(parent)
        self._salts = (SHUFFLE, seed, source)
        # Lanes drift apart, so with few documents they are in many epochs at once.
        self._order = functools.lru_cache(4 + 2**18 // len(parent))(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return shuffled(np.arange(len(self)), *self._salts, epoch)

    def __len__(self) -> int:
        return len(self.parents[0])

    def __getitem__(self, index: int) -> np.int64:
        epoch, place = divmod(index, len(self))
        return self.parents[0][int(self._order(epoch)[place])]


class _Deal:
    """The endless sequence of documents, by number, dealt to the lanes."""

    def __init__(self, config: Config, corpus: Corpus):
        self._seed = config.run.seed
        self.lanes = config.training.batch_size * config.data.interleave
        shuffles = [
            grain.MapDataset.source(subset.numbers_N).pipe(Shuffle, self._seed, number).repeat()
            for number, subset in enumerate(corpus.train)
        ]
        least, most = min(corpus.weights), max(corpus.weights)
        if most > MOST_WEIGHT * least:
            raise InputError(
                f"data.train: weight={most} is more than {MOST_WEIGHT:,} times weight={least}: "
                "bring them nearer together"
            )
        self._sequence = grain.MapDataset.mix(shuffles, corpus.weights)
        shares = [weight / sum(corpus.weights) for weight in corpus.weights]
        self.crowded = {
            int(number)
            for subset, share in zip(corpus.train, shares, strict=True)
            if len(subset) < math.ceil(self.lanes * share)
            for number in subset.numbers_N
        }
        """The documents of sources that deal one to several lanes in the first round. A lane that
        begins with one of them starts inside it, each at another part: else equal lanes would stay
        equal."""

    def document(self, number: int, lane: int) -> int:
        """Which document a lane gets in round `number`.

        Each round begins at another lane: else two sources of one weight would alternate over the
        lanes, and a lane would only ever see one of them.
        """
        turn = int(hash64(np.array([number]), DEAL, self._seed)[0] % np.uint64(self.lanes))
        return int(self._sequence[number * self.lanes + (lane + turn) % self.lanes])


class _DocumentIds:
    """The ids of documents, by number: one array for all the lanes that have the document open."""

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer):
        self.corpus, self._tokenizer = corpus, tokenizer
        self._open: weakref.WeakValueDictionary[int, np.ndarray] = weakref.WeakValueDictionary()

    def read(self, number: int) -> np.ndarray | None:
        """None if it holds no text."""
        ids = self._open.get(number)
        if ids is None and (text := self.corpus.documents[number]):
            ids = self._open[number] = document_ids(self._tokenizer, text)
        return ids


class _Lane:
    """One lane: its documents laid end to end and cut into sequences."""

    def __init__(self, deal: _Deal, documents: _DocumentIds, lane: int):
        self._deal, self._documents, self._lane = deal, documents, lane
        self._ids: np.ndarray | None = None
        self.number = 0
        self.offset = 0

    def fill(self, row: Batch) -> None:
        """Fill the arrays [L] of one row."""
        start = segment = 0
        while start < len(row.tokens_BL):
            if self._ids is None:
                self._ids = self._read()
            segment += 1
            count = pack(row, start, segment, self._ids[self.offset :])
            start, self.offset = start + count, self.offset + count
            if self.offset == len(self._ids) - 1:
                self.number, self.offset, self._ids = self.number + 1, 0, None

    def _read(self) -> np.ndarray:
        """The ids of this round's document, or of the next one that has text."""
        first = self.number == self.offset == 0
        for tries in itertools.count(1):
            document = self._deal.document(self.number, self._lane)
            if (ids := self._documents.read(document)) is not None:
                break
            if self.offset:
                raise self._changed()
            if tries == PATIENCE:
                self._documents.corpus.require_text()
            self.number += 1
        pairs = len(ids) - 1
        if self.offset >= pairs:
            raise self._changed()
        if first and document in self._deal.crowded:
            self.offset = pairs * self._lane // self._deal.lanes
        return ids

    def _changed(self) -> InputError:
        return InputError(
            f"lane {self._lane} stood at token {self.offset} of its document {self.number}, which "
            "is shorter now: resume with the files and the tokenizer of the run"
        )
