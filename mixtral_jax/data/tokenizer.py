"""Text to token ids and back, and making a tokenizer from text. SentencePiece inside."""

from __future__ import annotations

import codecs
import functools
import io
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from mixtral_jax.config import Config, InputError
from mixtral_jax.data.corpus import Corpus
from mixtral_jax.data.released import released_file
from mixtral_jax.data.sentencepiece_model import read_model
from mixtral_jax.files import naming, whole_file

SAMPLE_BYTES = 10_000_000
SAMPLE_BYTES_A_PIECE = 1000
PART_CHARACTERS = 10_000  # SentencePiece takes more time and memory a character for long texts
LONG_CHARACTERS = 10 * PART_CHARACTERS
LINE_CHARACTERS = 1000  # SentencePiece silently drops lines above 4192 bytes


class Tokenizer:
    """A SentencePiece model with the BOS and EOS that training and sampling put around text."""

    version: str | None
    """Which of Mistral's instruct templates it is for: v1, v2, v3, or None for a later one.

    v1, the template of plain text, is for every model without the control piece [INST], ours
    included. The pieces of v2 and v3 say less: what mistral-common has as v2 was released with
    weights as v3, in a file `tokenizer.model`, so it is v2 only where the file's name ends in .v2.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, name: str = ""):
        """Args: a loaded model, and the name of its file, whose ending may tell the version."""
        self._processor = processor
        self.vocab_size: int = processor.vocab_size()
        self.bos_id: int = processor.bos_id()
        self.eos_id: int = processor.eos_id()
        if not self._is_control("[INST]"):
            self.version = "v1"
        elif self._is_control("[SYSTEM_PROMPT]"):
            self.version = None
        else:
            self.version = "v2" if name.endswith(".v2") else "v3"

    @classmethod
    def from_bytes(cls, model_bytes: bytes, name: str = "the tokenizer") -> Tokenizer:
        """The tokenizer of a serialised SentencePiece model, which errors call `name`.

        A name that ends in .v2 makes its version v2 where its pieces allow v2 and v3.

        Raises:
          InputError: if it is none, or has no BOS or EOS.
        """
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError:
            raise InputError(
                f"{name} is not a SentencePiece model ({len(model_bytes)} bytes): name a "
                "tokenizer.model, or write data.tokenizer=train"
            ) from None
        if processor.bos_id() < 0 or processor.eos_id() < 0:
            raise InputError(f"{name} has no BOS or no EOS: train it with bos_id=1, eos_id=2")
        return cls(processor, name)

    @classmethod
    def from_name_or_file(cls, name: str | os.PathLike) -> Tokenizer:
        """The tokenizer that a user names: mistral-v1, mistral-v2, mistral-v3, or a file.

        Raises:
          InputError: as from_file; or saying how to get the released tokenizers.
        """
        return cls.from_file(released_file(os.fspath(name)) or name)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> Tokenizer:
        """The tokenizer in a SentencePiece model file.

        Raises:
          InputError: naming a file that is missing, unreadable or something else.
        """
        try:
            model_bytes = pathlib.Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"tokenizer {path} cannot be read: {error.strerror}") from None
        return cls.from_bytes(model_bytes, f"tokenizer {path}")

    @property
    def model_bytes(self) -> bytes:
        """The serialised model, from which from_bytes makes an equal tokenizer."""
        return self._processor.serialized_model_proto()

    @property
    def pieces(self) -> list[str]:
        """What each id stands for, as the model spells it."""
        return self._processor.id_to_piece(list(range(self.vocab_size)))

    @property
    def file_name(self) -> str:
        """A name for its file from which from_file knows its version again."""
        return "tokenizer.model.v2" if self.version == "v2" else "tokenizer.model"

    def save(self, path: str | os.PathLike) -> None:
        """Write a file for from_file: whole or not at all.

        Raises:
          InputError: if it cannot be written.
        """
        with naming(f"tokenizer {path}"):
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as unfinished:
                unfinished.write_bytes(self.model_bytes)

    def control_id(self, piece: str) -> int:
        """Id of a control piece, such as "[INST]", which no text becomes.

        Raises:
          ValueError: if the model has none of this name.
        """
        if not self._is_control(piece):
            raise ValueError(f"{piece!r} is no control piece of a {self.version} tokenizer")
        return self._processor.piece_to_id(piece)

    def _is_control(self, piece: str) -> bool:
        return self._processor.is_control(self._processor.piece_to_id(piece))

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS. No text becomes a control id: "</s>" is four letters.

        decode(encode(text)) == text where the model normalises nothing, as Mistral's and those of
        train_tokenizer, except that U+2581, which spells a space inside pieces, comes back as one.

        Raises:
          InputError: if the text holds half a surrogate pair.
        """
        return [*itertools.chain.from_iterable(self.encode_parts(text))]

    def encode_parts(self, text: str) -> Iterator[list[int]]:
        """The ids of encode(text), a part of a long text at a time.

        Raises:
          InputError: as encode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"text is not Unicode at character {error.start}") from None
        if len(text) <= LONG_CHARACTERS or not self._newlines_stand_alone:
            yield self._processor.encode(text)
            return
        newline = self._processor.encode("\n")  # with the space before it that begins a text
        first, *others = _parts(text)
        yield self._processor.encode(first)
        for part in others:
            yield self._processor.encode(f"\n{part}")[len(newline) :]

    @functools.cached_property
    def _newlines_stand_alone(self) -> bool:
        return read_model(self.model_bytes).newlines_stand_alone()

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control ids are nothing, and bytes that are no character are U+FFFD each."""
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token: int) -> str:
        """How the model spells an id: a space is one, a byte <0x0A>, a control piece its name."""
        return self._processor.id_to_piece(int(token)).replace("\u2581", " ")

    def byte(self, token: int) -> bytes:
        """The byte that a byte-fallback id stands for, and b"" for other ids."""
        if not self._processor.is_byte(int(token)):
            return b""
        return bytes([int(self._processor.id_to_piece(int(token))[1:-1], 16)])


def _parts(text: str) -> Iterator[str]:
    """A text cut after newlines, where it has any, into parts of PART_CHARACTERS or more."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PART_CHARACTERS - 1) + 1 or len(text)
        yield text[start:end]
        start = end


class StreamDecoder:
    """Decodes ids one at a time: the parts from push and flush join to tokenizer.decode(ids)."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._before: list[int] = []  # the first ids, up to some text: then spaces are kept
        self._waiting: list[int] = []  # bytes of a character that is not whole yet

    def push(self, token: int) -> str:
        """Take one more id; return the text that is certain now, never part of a character."""
        self._waiting.append(int(token))
        tail = b"".join(self._tokenizer.byte(i) for i in self._waiting[-3:])
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(tail)  # keeps back the bytes at the end that begin a character
        begun = len(decoder.getstate()[0]) if self._tokenizer.byte(token) else 0
        return self._take(len(self._waiting) - begun)

    def flush(self) -> str:
        """End the text: return what waits for bytes that will not come, as U+FFFD."""
        return self._take(len(self._waiting))

    def _take(self, count: int) -> str:
        ids, self._waiting = self._waiting[:count], self._waiting[count:]
        before = self._tokenizer.decode(self._before)
        text = self._tokenizer.decode(self._before + ids)[len(before) :]
        if not before:  # EOS, which is no text, keeps bytes on its sides from joining
            self._before += [*ids, self._tokenizer.eos_id]
        return text


# ---- making one --------------------------------------------------------------------------------


def sample_bytes(vocab_size: int) -> int:
    """Bytes of text to make a tokenizer from.

    Five times as many take five times as long, and make its tokens of the Python library's sources
    0.7% longer.
    """
    return min(SAMPLE_BYTES, SAMPLE_BYTES_A_PIECE * vocab_size)


def sample(documents: Iterable[str], size: int) -> Iterator[str]:
    """The first documents, up to `size` bytes of UTF-8 in all; the last is cut to fit."""
    for text in documents:
        encoded = text.encode()
        yield text if len(encoded) <= size else encoded[:size].decode(errors="ignore")
        size -= len(encoded)
        if size <= 0:
            return


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A BPE tokenizer of vocab_size pieces, made from a sample of the documents.

    Like Mistral's: ids unk 0, bos 1, eos 2, then 256 bytes for what no piece spells; digits stand
    alone; nothing is normalised. The same documents make the same tokenizer.

    Raises:
      InputError: if the documents are too few for vocab_size, or vocab_size is too small for them.
    """
    model = io.BytesIO()
    texts = sample(documents, sample_bytes(vocab_size))
    lines = list(_lines(texts))  # here, so that errors in reading keep their type
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=8,  # it is written into the model, so no machine may choose its own
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(vocab_size, str(error)) from None
    return Tokenizer.from_bytes(model.getvalue())


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines short enough for SentencePiece, which also drops those with U+2585, its unknown."""
    for text in documents:
        for line in text.replace("\u2585", "\n").splitlines():
            for start in range(0, len(line), LINE_CHARACTERS):
                yield line[start : start + LINE_CHARACTERS]


def _training_error(vocab_size: int, reason: str) -> InputError:
    name = f"model.vocab_size={vocab_size}"
    if most := re.search(r"too high.* <= (\d+)", reason):
        return InputError(f"{name} is more than the text supports: set at most {most[1]}")
    if least := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        return InputError(
            f"{name} is too few for the characters of the text: set {least[1]} or more"
        )
    if "sentences_.empty()" in reason:
        return InputError("data.train holds no text to train a tokenizer on")
    return InputError(f"{name}: SentencePiece cannot train: {' '.join(reason.split())}")


# ---- the tokenizer of a run --------------------------------------------------------------------


def load_tokenizer(config: Config, cached: str | os.PathLike | None, corpus: Corpus) -> Tokenizer:
    """The tokenizer that data.tokenizer names.

    For data.tokenizer=train that is the file `cached` if it exists, and otherwise a new one made
    from the training documents; writing it to `cached` is left to the caller.

    Args:
      corpus: open_corpus(config).
    Raises:
      InputError: if there is none, or model.vocab_size is not its number of pieces.
    """
    wanted = config.model.vocab_size
    name = config.data.tokenizer
    if not name:
        raise InputError("data.tokenizer is empty: name a tokenizer.model, or write train")
    if name == "train" and (cached is None or not os.path.exists(cached)):
        return train_tokenizer(corpus.training_texts(), wanted)
    path = cached if name == "train" else name
    tokenizer = Tokenizer.from_name_or_file(path)
    if tokenizer.vocab_size != wanted:
        raise InputError(
            f"tokenizer {path} has {tokenizer.vocab_size} pieces and model.vocab_size={wanted}: "
            f"set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer
