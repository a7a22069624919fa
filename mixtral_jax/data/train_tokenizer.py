"""Train a tokenizer on the training documents of a config.

python -m mixtral_jax.data.train_tokenizer --config configs/X.yaml --output tokenizer.model
"""

from __future__ import annotations

import logging
import pathlib
import sys
from collections.abc import Sequence

from mixtral_jax import config_io
from mixtral_jax.command_line import Parser, one_line, report
from mixtral_jax.config import Config, InputError
from mixtral_jax.data.corpus import open_corpus
from mixtral_jax.data.tokenizer import sample, sample_bytes, train_tokenizer


def run(config: Config, output: pathlib.Path, overwrite: bool = False) -> None:
    """Train on the documents that are not held out, write `output`, print what was done.

    Raises:
      InputError: if output exists and may not be overwritten, or the data does not do.
    """
    name = one_line(output)
    try:
        if output.is_dir() or (output.exists() and not overwrite):
            fix = "" if output.is_dir() else " or add --overwrite"
            raise InputError(f"{name} exists: name another --output{fix}")
    except OSError as error:  # a name too long
        raise InputError(f"{name} cannot be written: {error.strerror}") from None
    corpus = open_corpus(config)
    texts = list(sample(corpus.training_texts(), sample_bytes(config.model.vocab_size)))
    tokenizer = train_tokenizer(texts, config.model.vocab_size)
    tokenizer.save(output)
    total = sum(map(len, corpus.train))
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(tokenizer.encode(text)) for text in texts)
    print(f"trained on {len(texts)} of {total} documents ({size} bytes): {name}")
    print(f"{tokenizer.vocab_size} pieces, {size / tokens:.3f} bytes per token")
    if corpus.malformed.count:
        print(f"skipped {corpus.malformed}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        options = parser.parse_intermixed_args(arguments)
        config = config_io.load(options.config, options.overrides)
        run(config, options.output, options.overwrite)
    except InputError as error:
        return report(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
