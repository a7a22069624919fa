"""The files and the tokenizer of a run, which stay what they were at its start."""

from __future__ import annotations

import contextlib
import hashlib
import pathlib
from collections.abc import Callable

from mixtral_jax.config import Config, InputError
from mixtral_jax.data.corpus import Corpus, open_corpus
from mixtral_jax.data.tokenizer import Tokenizer, load_tokenizer
from mixtral_jax.interop import folders, own


def open_texts(
    config: Config, checkpoint: pathlib.Path | None, say: Callable[[str], None]
) -> tuple[Corpus, Tokenizer]:
    """Index the files and load the tokenizer.

    Args:
      checkpoint: the one that the run goes on from, as its place in the data does.
      say: is told where data.tokenizer=train makes none.
    Raises:
      InputError: if they cannot be read, or naming which of them has changed.
    """
    folder, before = config.run.dir, None
    if checkpoint is not None:
        with contextlib.suppress(InputError):  # restoring it says which one is whole
            before = own.load_extras(checkpoint)
    corpus = open_corpus(config)
    for key, found in corpus.files.items():
        was = ((before and before.files) or {}).get(key, found)
        if found != was:
            raise InputError(
                f"{key} was {was} and is {found}: go on with the files of the run, or start "
                f"another run.dir with model.checkpoint={folder}"
            )
    # Without a checkpoint the run begins anew, and a tokenizer in its folder is of the files then.
    kept = checkpoint and folders.find_tokenizer(pathlib.Path(folder))
    tokenizer = _load_tokenizer(config, kept, corpus, say)
    if before is not None and before.tokenizer is not None:
        if tokenizer.model_bytes != before.tokenizer.model_bytes:
            raise InputError(f"the tokenizer of {folder} has changed: go on with the run's own")
        tokenizer = before.tokenizer  # it knows its version
    return corpus, tokenizer


def fingerprints(corpus: Corpus, tokenizer: Tokenizer) -> tuple[dict[str, str], str]:
    """What `hosts.same` compares of both, and what to do where they differ."""
    made = hashlib.sha256(tokenizer.model_bytes).hexdigest()[:12]
    told = {f"the files of {key}": found for key, found in corpus.files.items()}
    return {**told, "the tokenizer": made}, "every host must see the same files"


def _load_tokenizer(
    config: Config, kept: pathlib.Path | None, corpus: Corpus, say: Callable[[str], None]
) -> Tokenizer:
    """The one that data.tokenizer names; for train and for no name that of model.checkpoint.

    Raises:
      InputError: if there is none, or the one named has other pieces than that of model.checkpoint.
    """
    name, checkpoint = config.data.tokenizer, config.model.checkpoint
    if kept is not None and not name:
        return Tokenizer.from_file(kept)
    if kept is not None or not checkpoint:
        return load_tokenizer(config, kept, corpus)
    theirs = folders.load_tokenizer(checkpoint, config.model.vocab_size)
    if theirs is None and not name:
        raise InputError(
            f"model.checkpoint={checkpoint} has no tokenizer.model: name one as data.tokenizer"
        )
    if theirs is not None and name in ("", "train"):
        if name:
            say(f"data.tokenizer=train: that of {checkpoint}, which its embedding was trained with")
        return theirs
    tokenizer = load_tokenizer(config, None, corpus)
    if theirs is not None and tokenizer.pieces != theirs.pieces:
        raise InputError(
            f"data.tokenizer={name} has other pieces than the tokenizer of model.checkpoint="
            f"{checkpoint}, which its embedding was trained with: leave data.tokenizer empty"
        )
    return tokenizer
