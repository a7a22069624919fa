"""Which documents a run trains on, and which it holds out.

Every choice of documents is made by hashing their numbers, or where they are, so that it is the
same on every host, machine and version of every library.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mixtral_jax.config import Config, InputError
from mixtral_jax.data.sources import Documents, MalformedReport, open_sources

HOLD_OUT, SPREAD = 1, 2  # salts, so that the choices do not follow one another


def hash64(numbers_N: np.ndarray, *salts: int) -> np.ndarray:
    """A uint64 hash of each number, another one for other salts.

    Source: SplitMix64, the output function of Steele, Lea and Flood (OOPSLA 2014), once for the
    numbers and once for each salt.
    """
    z_N = _split_mix(np.asarray(numbers_N).astype(np.uint64))
    for salt in salts:
        z_N = _split_mix(z_N ^ np.uint64(salt % 2**64))
    return z_N


def _split_mix(x_N: np.ndarray) -> np.ndarray:
    z_N = x_N + np.uint64(0x9E3779B97F4A7C15)
    z_N = (z_N ^ (z_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z_N = (z_N ^ (z_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z_N ^ (z_N >> np.uint64(31))


def shuffled(numbers_N: np.ndarray, *salts: int) -> np.ndarray:
    """The numbers in the order of their hashes."""
    return numbers_N[np.argsort(hash64(numbers_N, *salts), kind="stable")]


def _hashes(documents: Documents) -> np.ndarray:
    """A uint64 hash of each document's file and place in it: other files change none of them."""
    names_N, numbers_N = documents.places()
    return hash64(hash64(numbers_N) ^ names_N)


def _spread(documents: Documents, numbers_N: np.ndarray) -> np.ndarray:
    """The numbers of some documents in an order that other files do not change."""
    hashes_N = hash64(_hashes(documents)[numbers_N], SPREAD)
    return numbers_N[np.argsort(hashes_N, kind="stable")]


@dataclass(frozen=True)
class Subset:
    """Some of the documents, a random-access source: subset[i] is documents[numbers_N[i]]."""

    documents: Documents
    numbers_N: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers_N)

    def __getitem__(self, index: int) -> str | None:
        return self.documents[int(self.numbers_N[index])]


@dataclass(frozen=True)
class Corpus:
    """The documents of a config, split."""

    documents: Documents
    """Those of data.train."""
    train: tuple[Subset, ...]
    """Which of them are trained on, one subset a source."""
    globs: tuple[str, ...]
    """What errors call the sources."""
    weights: tuple[float, ...]
    """How often to draw from each source, relative to the others."""
    held_out: Subset
    """What is never trained on, in a spread-out order; maybe nothing."""
    malformed: MalformedReport
    files: dict[str, str]
    """What was found for data.train and data.validation, in words that change with the files."""

    def training_texts(self) -> Iterator[str]:
        """Every readable document that is trained on, once, in a spread-out order."""
        numbers_N = np.concatenate([subset.numbers_N for subset in self.train])
        for number in _spread(self.documents, numbers_N):
            if text := self.documents[int(number)]:
                yield text

    def require_text(self) -> None:
        """Check that there is anything to train on in every source.

        Raises:
          InputError: if all training documents of a source are empty or malformed.
        """
        for glob, subset in zip(self.globs, self.train, strict=True):
            if not any(subset):
                raise InputError(
                    f"data.train: none of the {len(subset)} documents of {glob} holds text; "
                    f"{self.malformed}"
                )


def open_corpus(config: Config) -> Corpus:
    """Index the files of data.train and data.validation.

    Without data.validation, a document of data.train is held out if the hash of its file's name,
    below the fixed folder of the glob, and of its place in the file, as a fraction of 2**64, is
    below data.validation_fraction: files that come or go change nothing for the others. Files that
    data.validation names are not trained on, and a file that several globs name belongs to the
    first of them.

    Raises:
      InputError: if there is nothing to train on or a file cannot be indexed.
    """
    data = config.data
    if data.source != "files":
        raise InputError(f"data.source={data.source} has no text: set data.source=files")
    if not data.train:
        raise InputError("data.train is empty: name your files, such as data.train=texts/**/*.txt")
    if weights := {source.weight for source in data.validation} - {1.0}:
        raise InputError(f"data.validation: weight={weights.pop()} does nothing: leave it out")
    malformed = MalformedReport(fatal=data.malformed == "error")
    taken: set[str] = set()
    files = {}
    if data.validation:
        validation, _ = open_sources("data.validation", data.validation, malformed, taken)
        files["data.validation"] = validation.fingerprint()
    documents, sizes = open_sources("data.train", data.train, malformed, taken)
    files["data.train"] = documents.fingerprint()
    numbers_N = np.arange(len(documents))
    if data.validation:
        out_N = np.zeros(len(documents), bool)
        held_out = Subset(validation, _spread(validation, np.arange(len(validation))))
    else:
        out_N = hash64(_hashes(documents), HOLD_OUT) / 2.0**64 < data.validation_fraction
        held_out = Subset(documents, _spread(documents, numbers_N[out_N]))
    train = []
    for source, end, size in zip(data.train, np.cumsum(sizes), sizes, strict=True):
        mine = slice(end - size, end)
        train.append(Subset(documents, numbers_N[mine][~out_N[mine]]))
        if not len(train[-1]):
            raise InputError(
                f"data.train: all {size} documents of {source.files} are held out by data."
                f"validation_fraction={data.validation_fraction}: name data.validation instead"
            )
    globs = tuple(source.files for source in data.train)
    weights = tuple(source.weight for source in data.train)
    return Corpus(documents, tuple(train), globs, weights, held_out, malformed, files)


def check_source(config: Config) -> None:
    """Check that a run reads the text it names; random tokens in its place look the same.

    Raises:
      InputError: if data.source is not files and other keys name some.
    """
    data = config.data
    named = [f"data.{key}" for key in ("train", "validation", "tokenizer") if getattr(data, key)]
    if named and data.source != "files":
        raise InputError(
            f"data.source={data.source} makes random tokens, and {' and '.join(named)} would go "
            f"unread: set data.source=files, or leave {' and '.join(named)} empty"
        )
