"""From a command to its first result: train.py to its first step, generate.py to its first token.

    python benchmarks/startup.py [--config configs/quickstart.yaml] [section.key=value ...]

Each command runs twice: with nothing compiled before, and again with what the first run kept on
disk, in folders of their own. One JSON line each: the seconds that the command itself reports, and
its parts.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import tempfile

import measure

ROOT = pathlib.Path(__file__).resolve().parents[1]


def parts_of(output: str) -> dict[str, float]:
    """Seconds to the first result, and of each part, from what a command printed.

    Raises:
      ValueError: if it has no such line.
    """
    found = re.search(r"first (?:step|token|answer) ([\d.]+) s after the start: (.*)", output)
    if not found:
        raise ValueError(f"the command does not say when it was ready:\n{output}")
    parts = dict(part.rsplit(" ", 2)[:2] for part in found[2].split(", "))
    named = {f"{name.replace(' ', '_')}_seconds": float(s) for name, s in parts.items()}
    return {"seconds": float(found[1]), **named}


def run(command: list[str], cache: pathlib.Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout)
    return parts_of(done.stdout)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    from mixtral_jax import sharding
    from mixtral_jax.config import MeshConfig

    sharding.start(MeshConfig())  # this process says only what machine this is
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path(folder)

        def train(number: int) -> list[str]:
            short = ["training.steps=3", "training.log_every=1", f"run.dir={here}/run{number}"]
            return ["train.py", "--config", arguments.config, *arguments.overrides, *short]

        model = ["--checkpoint", str(here / "run0"), "--max-new-tokens", "4"]
        generate = ["generate.py", *model, "--prompt", "def"]
        for name, commands in (("train", [train(0), train(1)]), ("generate", [generate] * 2)):
            for compiled, command in zip(("nothing", "before"), commands, strict=True):
                line = {"command": name, "config": arguments.config, "compiled": compiled}
                measure.show("startup", {**line, **run(command, here / f"cache_{name}")})


if __name__ == "__main__":
    measure.run(main)
