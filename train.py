"""Train a Mixtral: python train.py --config configs/NAME.yaml [section.key=value ...]"""

import argparse
import sys

from mixtral_jax import config_io
from mixtral_jax.config import InputError, TrainingError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML file, such as those in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args(argv)
    try:
        config = config_io.load(arguments.config, arguments.overrides)
        from mixtral_jax.training import loop  # only now: it loads JAX, and the config is good

        loop.train(config)
    except (InputError, TrainingError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
