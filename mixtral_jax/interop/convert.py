"""Convert a checkpoint: python -m mixtral_jax.interop.convert SOURCE TARGET --to FORM

SOURCE is a folder in any form that generate.py takes; TARGET is a new folder. Between Hugging
Face's and Mistral's forms, tensors go one at a time; to and from orbax the whole model is in the
host's memory, at times twice. Nothing changes but names, order and, if --dtype says so, the type;
orbax holds float16 as float32, with the same values.

With --upcycle N, SOURCE is a dense Mistral, and TARGET a Mixtral with N copies of its feed-forward
network in each layer and a fresh router.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from typing import NoReturn

from mixtral_jax.command_line import Parser, report
from mixtral_jax.config import InputError, MeshConfig
from mixtral_jax.files import check_free
from mixtral_jax.interop.folders import Kind, recognise
from mixtral_jax.interop.strict_json import quote

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
DTYPES = {"bf16": "bfloat16", "f32": "float32"}


def size(text: str) -> int:
    """Bytes of a text such as 5GB or 500MiB.

    Raises:
      InputError: if it is none, or less than 1.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([A-Za-z]*)", text.strip())
    unit = UNITS.get((match[2] or "B").upper(), 0) if match else 0
    if not 1 <= unit * float(match[1] if match else 0) < 2**63:
        raise InputError(f"--max-shard-size {quote(text)} must look like 5GB or 500MiB")
    return int(float(match[1]) * unit)


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run folder, or a folder of released weights")
    add("target", metavar="TARGET", help="a folder that does not exist yet")
    forms = [kind.value for kind in Kind]
    add("--to", required=True, choices=forms, help="orbax is this project's own form")
    add("--dtype", choices=list(DTYPES), help="type of the weights; as they are by default")
    help = "of huggingface's files (default 5GB)"
    add("--max-shard-size", metavar="SIZE", help=help)
    add("--upcycle", type=int, metavar="N", help="make a Mixtral of N experts from a dense model")
    add("--experts-per-token", type=int, metavar="K", help="with --upcycle (default 2)")
    add("--seed", type=int, metavar="S", help="of the router, with --upcycle (default 0)")
    return parser


def check_flags(arguments: argparse.Namespace) -> None:
    """Fill in the defaults of flags, and refuse those that would change nothing."""
    sparse, sharded = arguments.upcycle is not None, Kind(arguments.to) is Kind.HUGGING_FACE
    for flag, default, used, needed in (
        ("experts_per_token", 2, sparse, "--upcycle N"),
        ("seed", 0, sparse, "--upcycle N"),
        ("max_shard_size", "5GB", sharded, "--to huggingface"),
    ):
        value = getattr(arguments, flag)
        if value is None:
            setattr(arguments, flag, default)
        elif not used:
            raise InputError(f"--{flag.replace('_', '-')} {quote(value)} needs {needed}")


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    old = signal.signal(signal.SIGTERM, _stop)  # so that what is half written is removed
    try:
        return _main(argv)
    finally:
        signal.signal(signal.SIGTERM, old)


def _main(argv: list[str] | None) -> int:
    try:
        arguments = make_parser().parse_args(argv)
        check_flags(arguments)
        limit = size(arguments.max_shard_size)
        recognise(arguments.source)
        check_free(arguments.target)
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from mixtral_jax import sharding  # only now: it loads JAX
        from mixtral_jax.interop import conversion

        sharding.start(MeshConfig())
        upcycling = None
        if arguments.upcycle is not None:
            upcycling = conversion.Upcycling(
                arguments.upcycle, arguments.experts_per_token, arguments.seed
            )
        conversion.convert(
            arguments.source,
            arguments.target,
            Kind(arguments.to),
            dtype=arguments.dtype and DTYPES[arguments.dtype],
            max_shard_size=limit,
            upcycling=upcycling,
        )
    except InputError as error:
        return report(error)
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # of a name that the terminal cannot show
    sys.exit(main())
