"""Decoding with random weights made on the device: time of a step beside that of reading.

    python benchmarks/decode.py [--config benchmarks/peers.yaml] [--batch 1 8 64] [model.key=value]
    python benchmarks/decode.py --weights config int8       # both, taking turns

One JSON line for each batch and kind of weights: after a prompt of 128, 128 new tokens. `seconds`
is a step of the whole batch, after the first, which the prompt's pass makes
(`first_token_seconds`); medians. The limit is reading what a step must read (ours.read_bytes) at
the measured bandwidth; of int8 that counts all weights as int8, and no scales. One device.
"""

from __future__ import annotations

import statistics

import measure
import ours


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--config", default=str(measure.HERE / "peers.yaml"))
    parser.add_argument("--batch", type=measure.positive, nargs="+", default=[1, 8, 64])
    parser.add_argument("--weights", nargs="+", choices=["config", "int8"], default=["config"])
    parser.add_argument("--prompt", type=measure.positive, default=128)
    parser.add_argument("--new", type=measure.positive, default=128)
    parser.add_argument("--turns", type=measure.positive, default=5)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.new < 2:
        raise measure.InputError("--new 1 leaves no step to time: 2 or more")
    config = ours.load(arguments.config, arguments.overrides).model
    decodings = {kind: ours.Decoding(config, kind == "int8") for kind in arguments.weights}
    import jax.numpy as jnp

    from mixtral_jax.model.mixtral import compute_dtype

    rate = measure.read_rate()
    activation = jnp.dtype(compute_dtype(config)).itemsize
    types = {"config": config.param_dtype, "int8": "int8"}
    for batch in arguments.batch:
        asked = (batch, arguments.prompt, arguments.new)
        for decoding in decodings.values():
            decoding.answer(*asked)  # compiles
        turns = {weights: [] for weights in decodings}
        for _ in range(arguments.turns):
            for weights, decoding in decodings.items():
                turns[weights].append(decoding.answer(*asked))
        for weights, times in turns.items():
            first, step = (statistics.median(seconds) for seconds in zip(*times))
            slots = arguments.prompt + arguments.new / 2
            weight = jnp.dtype(types[weights]).itemsize
            must = ours.read_bytes(config, batch, slots, weight, activation)
            line = {
                "config": arguments.config,
                "overrides": arguments.overrides,
                "parameters": config.num_parameters,
                "weights": types[weights],
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
