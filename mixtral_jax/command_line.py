"""What the commands share: mistakes are reported in one line."""

from __future__ import annotations

import argparse
import sys

from mixtral_jax.config import InputError, TrainingError


class Parser(argparse.ArgumentParser):
    """Shows the module's docstring as help, and raises mistakes like every other bad input."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def report(error: InputError | TrainingError) -> int:
    """Say what is wrong, on standard error; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1
