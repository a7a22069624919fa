"""What a SentencePiece model file says of its pieces and of the text before it is cut.

Read from the wire format by hand: sentencepiece does not show all of it, and the message classes it
ships want one particular protobuf. Source: sentencepiece_model.proto.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple


class PieceType(enum.IntEnum):
    """The values of SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelPiece(NamedTuple):
    """One piece of a model; its id is its place in the list."""

    text: str
    score: float
    type: PieceType


class SentencePieceModel(NamedTuple):
    """The fields that decide which ids a text becomes."""

    pieces: list[ModelPiece]
    bpe: bool
    byte_fallback: bool
    whitespace_suffix: bool
    """U+2581 ends a word and does not begin it."""
    character_map: bytes
    """The normalisation, compiled; empty for none."""
    dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool

    def newlines_stand_alone(self) -> bool:
        """Whether no id on one side of a newline depends on what is on its other side.

        So it is where neighbours are merged and no piece reaches over a newline. But unused pieces
        are taken apart as their last occurrence was made, a unigram model rounds sums from the
        start of the text on, and without bytes, unknown characters side by side are one id.
        """
        if not self.bpe or not self.byte_fallback or self.whitespace_suffix:
            return False
        if self.character_map or self.remove_extra_whitespaces:
            return False
        return not any(
            piece.type is PieceType.UNUSED or ("\n" in piece.text and piece.text != "\n")
            for piece in self.pieces
        )


def read_model(model_bytes: bytes) -> SentencePieceModel:
    """The fields of a serialised model, which sentencepiece has accepted.

    Fields that are absent have the defaults of the format.
    """
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(model_bytes):
        if number == 1:
            pieces.append(_piece(value))
        elif number == 2:
            trainer |= dict(_fields(value))
        elif number == 3:
            normalizer |= dict(_fields(value))
    return SentencePieceModel(
        pieces,
        bpe=trainer.get(3, 1) == 2,
        byte_fallback=bool(trainer.get(35, 0)),
        whitespace_suffix=bool(trainer.get(24, 0)),
        character_map=normalizer.get(2, b""),
        dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
    )


def _piece(message: bytes) -> ModelPiece:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return ModelPiece(fields.get(1, b"").decode(), score, PieceType(fields.get(3, 1)))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: an integer for a varint, and otherwise the bytes."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            assert wire == 2, f"wire type {wire} in a model that sentencepiece has read"
            size, place = _varint(message, place)
        yield number, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The integer at a place, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
