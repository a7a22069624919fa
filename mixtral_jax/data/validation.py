"""Held-out documents, whole, in a fixed set of batches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixtral_jax.config import Config, InputError
from mixtral_jax.data.batches import synthetic_batch
from mixtral_jax.data.corpus import Corpus
from mixtral_jax.data.packing import Batch, document_ids, empty_batch, pack
from mixtral_jax.data.tokenizer import Tokenizer

MISSES = 64  # documents in a row that do not fit before no more are tried


class ValidationSet(NamedTuple):
    """What is scored: bits per byte = total loss of all targets / ln 2 / len(text)."""

    batches: list[Batch]
    """Each of training.batch_size rows; padding, if any, ends the last of them."""
    text: bytes
    """The documents that were packed, joined: UTF-8, byte for byte."""
    documents: int
    """How many they are."""
    left_out: int
    """Held-out documents for which there was no room."""


def validation_set(
    config: Config, tokenizer: Tokenizer | None, corpus: Corpus | None
) -> ValidationSet:
    """Whole held-out documents, packed into at most training.validation_batches batches.

    Documents are taken in the order of Corpus.held_out, those without room passed over. For
    data.source=synthetic: random tokens and no text; it needs no tokenizer and no corpus.

    Args:
      corpus: open_corpus(config).
    Raises:
      InputError: if nothing is held out or nothing fits.
    """
    if config.data.source == "synthetic":
        return _synthetic(config)
    if not len(corpus.held_out):
        documents = sum(map(len, corpus.train))
        some = f"{documents} documents" if documents > 1 else "one document"
        more = "raise it, " if max(map(len, corpus.train)) > 1 else ""
        raise InputError(
            f"data.validation_fraction={config.data.validation_fraction} of {some} holds none "
            f"out: {more}name data.validation, or set training.validate_every=0"
        )
    training = config.training
    rows = training.validation_batches * training.batch_size
    texts, packs, left_out = _choose(corpus, tokenizer, rows * training.sequence_length)
    if not texts:
        raise InputError(
            f"none of {len(corpus.held_out)} held-out documents fits training.validation_batches="
            f"{training.validation_batches} batches of {training.batch_size} x "
            f"{training.sequence_length} tokens: raise training.validation_batches"
        )
    whole = empty_batch(rows, training.sequence_length)
    starts = range(0, _lay(whole, packs), training.batch_size)
    batches = [whole.rows(slice(start, start + training.batch_size)) for start in starts]
    return ValidationSet(batches, "".join(texts).encode(), len(texts), left_out)


def _choose(
    corpus: Corpus, tokenizer: Tokenizer, room: int
) -> tuple[list[str], list[np.ndarray], int]:
    """Documents whose pairs fit into `room` together, their ids, and how many do not fit."""
    texts, packs = [], []
    unreadable = misses = 0
    for text in corpus.held_out:
        if not text:
            unreadable += 1
            continue
        ids = document_ids(tokenizer, text)
        if len(ids) - 1 <= room:
            room -= len(ids) - 1
            texts.append(text)
            packs.append(ids)
            misses = 0
        else:
            misses += 1
        if texts and misses == MISSES:
            break
    return texts, packs, len(corpus.held_out) - len(texts) - unreadable


def _lay(whole: Batch, packs: list[np.ndarray]) -> int:
    """Lay documents end to end over the rows of a batch; return how many rows they take."""
    row = start = segment = 0
    for ids in packs:
        while len(ids) > 1:
            if start == whole.tokens_BL.shape[1]:
                row, start, segment = row + 1, 0, 0
            segment += 1
            count = pack(whole.rows(row), start, segment, ids)
            start, ids = start + count, ids[count:]
    return row + 1


def _synthetic(config: Config) -> ValidationSet:
    training = config.training
    rows = range(training.batch_size)
    batches = [
        synthetic_batch(config, rows, step, salt=1) for step in range(training.validation_batches)
    ]
    return ValidationSet(batches, b"", len(batches) * len(rows), 0)
