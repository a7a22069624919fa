"""Train a Mixtral: python train.py --config configs/NAME.yaml [section.key=value ...]"""

import sys

from mixtral_jax import config_io
from mixtral_jax.command_line import Parser, report
from mixtral_jax.config import InputError, TrainingError
from mixtral_jax.interop import folders


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    try:
        arguments = parser.parse_intermixed_args(argv)
        config = config_io.load(arguments.config, arguments.overrides, folders.training_sizes)
        from mixtral_jax.training import loop  # only now: it loads JAX, and the config is good

        loop.train(config)
    except (InputError, TrainingError) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
