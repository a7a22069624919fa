"""Train a Mixtral: python train.py --config configs/NAME.yaml [section.key=value ...]

With --compile-only v5p:4x4x4 nothing is trained: the step is compiled for that TPU slice, which
need not be there, and a report says what it takes in memory and time; with --slices N, for
several such slices. With --compile-only h200:8 for the GPUs of a host, of memory alone.
"""

import sys

try:
    from mixtral_jax import config_io
except ModuleNotFoundError as error:  # this Python is not that of the environment
    sys.exit(f"error: {error}")
from mixtral_jax.command_line import OutputError, Parser, report, unwritten, with_huge_pages
from mixtral_jax.config import InputError, TrainingError
from mixtral_jax.interop import folders


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--compile-only", metavar="SLICE", help="compile for it, and stop")
    parser.add_argument("--slices", metavar="N", type=int, default=1, help="that many of them")
    parser.add_argument("--report", metavar="FILE", default="", help="its report, as JSON")
    try:
        arguments = parser.parse_intermixed_args(argv)
        for name, value in (("report", arguments.report), ("slices", arguments.slices)):
            if value != parser.get_default(name) and arguments.compile_only is None:
                raise InputError(f"--{name} {value} needs --compile-only SLICE")
        config = config_io.load(arguments.config, arguments.overrides, folders.training_sizes)
        if arguments.compile_only is not None:
            from mixtral_jax.analysis import compile_report

            name, path, slices = arguments.compile_only, arguments.report, arguments.slices
            try:
                return compile_report.run(config, name, path, slices)
            except (OutputError, BrokenPipeError) as error:
                return unwritten(error)
        from mixtral_jax.training import loop  # only now: it loads JAX, and the config is good

        loop.train(config)
    except (InputError, TrainingError) as error:
        return report(error)
    except KeyboardInterrupt:  # while starting, or a second time
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    with_huge_pages()
    sys.exit(main())
