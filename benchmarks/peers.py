"""Beside transformers: the same model, batch and work, in one run, taking turns.

    python benchmarks/peers.py train [--steps 7]      # AdamW, load-balancing loss
    python benchmarks/peers.py decode [--batch 8]     # 128 tokens after a prompt of 128
    python benchmarks/peers.py train --config configs/mixtral_h200.yaml --alone \\
        --only mixtral_jax "transformers bfloat16" "dense products"

Each contestant (benchmarks/contestants.py) is a process of its own that waits while the others
work, so that a noisy machine is noisy for all; with --alone each ends before the next one starts,
where memory does not hold all of them. A turn of training is two steps, of which the second is
timed. One JSON line each, medians; the limit is the time of the same floating-point work as plain
dense products in XLA (train), or of reading what a step must read (decode), measured in the same
turns. Wants requirements-parity.txt, and for all contestants of `train` with the default config
about 24 GB. Transformers' weights and optimizer state are of its dtype; ours are float32 on CPU,
and elsewhere as the config says.
"""

from __future__ import annotations

import contestants
import measure
import ours
import turns
from measure import InputError


def show(arguments, config, results: list[turns.Contestant]) -> None:
    seconds = {one.name: one.seconds for one in results}
    limit = next((seconds[name] for name in contestants.LIMITS if name in seconds), None)
    training = config.training
    rows = training.batch_size if arguments.task == "train" else arguments.batch
    tokens = rows * (training.sequence_length if arguments.task == "train" else 1)
    for one in results:
        found = seconds[one.name]
        line = {
            **{"name": one.name, "config": arguments.config, "overrides": arguments.overrides},
            "batch": rows,
            **measure.limited(found, limit),
            "tokens_per_second": tokens / found,
            "times_of_first": found / seconds[results[0].name],
            "peak_bytes": one.peak_bytes,
            "turns": len(one.turns),
        }
        measure.show(f"peers {arguments.task}", line, one.about)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("task", choices=list(contestants.CONTESTANTS))
    parser.add_argument("--config", default=str(measure.HERE / "peers.yaml"))
    parser.add_argument("--steps", type=measure.positive, default=5, help="turns of each")
    parser.add_argument("--batch", type=measure.positive, default=1, help="rows that are decoded")
    parser.add_argument("--only", nargs="+", help="contestants; all by default")
    parser.add_argument("--alone", action="store_true", help="one after another, not in turns")
    parser.add_argument("--contestant", help="(a process of this command's own)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = ours.load(arguments.config, arguments.overrides)  # says what is wrong with it
    available = contestants.CONTESTANTS[arguments.task]
    if arguments.contestant:
        turns.work(available[arguments.contestant](config, arguments.batch))
        return
    if unknown := [name for name in arguments.only or [] if name not in available]:
        raise InputError(f"--only {unknown[0]!r} is not one of {', '.join(available)}")
    names = [name for name in available if name in (arguments.only or available)]
    if any("transformers" in name for name in names):
        for package in ("torch", "transformers"):
            measure.need(
                package, "pip install -r requirements-parity.txt, or leave it out (--only)"
            )
    command = [__file__, arguments.task, "--batch", str(arguments.batch)]
    command += ["--config", arguments.config, *arguments.overrides]
    commands = {name: [*command, "--contestant", name] for name in names}
    show(arguments, config, turns.compete(commands, arguments.steps, arguments.alone))


if __name__ == "__main__":
    measure.run(main)
