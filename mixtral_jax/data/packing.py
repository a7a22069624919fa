"""What a batch is, and how documents are laid into its rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixtral_jax.data.tokenizer import Tokenizer


class Batch(NamedTuple):
    """int32 arrays [B, L]: every position's token, and the token to predict there."""

    tokens_BL: np.ndarray
    targets_BL: np.ndarray
    segments_BL: np.ndarray
    """Documents in a sequence, counted from 1; 0 is padding. Attention stays inside a segment."""
    positions_BL: np.ndarray
    """Places within a segment, from 0."""

    def rows(self, which: int | slice) -> Batch:
        """Views of some rows, or with shape [L] of one."""
        return Batch(*(array_BL[which] for array_BL in self))


def empty_batch(rows: int, length: int) -> Batch:
    """A batch of nothing but padding."""
    return Batch(*(np.zeros((rows, length), np.int32) for _ in Batch._fields))


def document_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """BOS, the text, EOS. n + 1 ids hold n pairs: each but the last predicts the next."""
    parts = (np.array(part, np.int32) for part in tokenizer.encode_parts(text))
    return np.concatenate([[tokenizer.bos_id], *parts, [tokenizer.eos_id]], dtype=np.int32)


def pack(row: Batch, start: int, segment: int, ids: np.ndarray) -> int:
    """Lay as many pairs of `ids` as fit into a row, from position `start` on.

    Args:
      row: arrays [L], such as batch.rows(0); they are written to.
      segment: what to number them.
    Returns:
      How many pairs were laid; ids[that:] holds the rest.
    """
    count = min(len(ids) - 1, len(row.tokens_BL) - start)
    span = slice(start, start + count)
    row.tokens_BL[span] = ids[:count]
    row.targets_BL[span] = ids[1 : count + 1]
    row.segments_BL[span] = segment
    row.positions_BL[span] = np.arange(count)
    return count
