"""Decoding with random weights made on the device: time of a step beside that of reading.

    python benchmarks/decode.py [--config benchmarks/peers.yaml] [--batch 1 8 64] [model.key=value]

One JSON line for each batch: after a prompt of 128, 128 new tokens. `seconds` is a step of the
whole batch, after the first, which the prompt's pass makes (`first_token_seconds`); medians. The
limit is reading what a step must read (ours.read_bytes) at the measured bandwidth. One device.
"""

from __future__ import annotations

import statistics

import measure
import ours


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--config", default=str(measure.HERE / "peers.yaml"))
    parser.add_argument("--batch", type=measure.positive, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=measure.positive, default=128)
    parser.add_argument("--new", type=measure.positive, default=128)
    parser.add_argument("--turns", type=measure.positive, default=5)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.new < 2:
        raise measure.InputError("--new 1 leaves no step to time: 2 or more")
    config = ours.load(arguments.config, arguments.overrides).model
    decoding = ours.Decoding(config)
    import jax.numpy as jnp

    from mixtral_jax.model.mixtral import compute_dtype

    rate = measure.read_rate()
    activation = jnp.dtype(compute_dtype(config)).itemsize
    weight = jnp.dtype(config.param_dtype).itemsize
    for batch in arguments.batch:
        asked = (batch, arguments.prompt, arguments.new)
        decoding.answer(*asked)  # compiles
        turns = [decoding.answer(*asked) for _ in range(arguments.turns)]
        first, step = (statistics.median(times) for times in zip(*turns))
        slots = arguments.prompt + arguments.new / 2
        must = ours.read_bytes(config, batch, slots, weight, activation)
        line = {
            "config": arguments.config,
            "overrides": arguments.overrides,
            "parameters": config.num_parameters,
            "batch": batch,
            "prompt": arguments.prompt,
            "new": arguments.new,
            "first_token_seconds": first,
            **measure.limited(step, must / rate),
            "tokens_per_second": batch / step,
            "read_bytes": round(must),
            "read_bytes_per_second": round(rate),
            "peak_bytes": measure.peak_bytes(),
            "turns": arguments.turns,
        }
        measure.show("decode", line)


if __name__ == "__main__":
    measure.run(main)
