"""A long prompt among short answers: whether it stalls them, and what memory it takes.

    python benchmarks/long_prompt.py [--prompt 32000] [--part 256] [--others 4]

Random weights. While --others short requests are answered, one of --prompt tokens comes in; its
parts are run between their steps. One JSON line: `seconds` from its first part to its first token;
of the others the median and the longest time between two tokens of one, and the same without the
long prompt; the most memory in use, and what scores of the whole prompt at once would have taken.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import measure
import ours

from mixtral_jax import sharding
from mixtral_jax.config import InputError, MeshConfig


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    default = measure.HERE.parent / "configs" / "quickstart.yaml"
    parser.add_argument("--config", default=str(default))
    parser.add_argument("--prompt", type=measure.positive, default=32000)
    parser.add_argument("--part", type=measure.positive, default=256)
    parser.add_argument("--others", type=measure.positive, default=4)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    prompt, others = arguments.prompt, arguments.others
    if prompt < 2 * arguments.part:
        raise InputError(
            f"--prompt {prompt} must be at least twice --part {arguments.part}, so that the others "
            "have steps between its parts"
        )
    config = ours.load(arguments.config, arguments.overrides).model.dropless()
    config = dataclasses.replace(config, max_position_embeddings=prompt + 1)
    sharding.start(MeshConfig())
    import jax

    from mixtral_jax.generation.engine import Engine
    from mixtral_jax.generation.request import Options, Request
    from mixtral_jax.model.cache import bytes_of_row, places
    from mixtral_jax.model.mixtral import compute_dtype, initialize

    model = initialize(config, jax.random.key(0), sharding.make_mesh())
    engine = Engine(model, rows=others + 1, part=arguments.part)
    engine.warm_up()
    row = bytes_of_row(config, places(engine.context), compute_dtype(config))
    parts = -(-prompt // arguments.part)
    new = min(parts + 50, prompt - 7)  # the others' answers, which outlast the prompt
    short = [Request((1, 2 + i, 3, 4), Options(new, temperature=0.0)) for i in range(others)]
    long = Request(tuple(1 + i % 50 for i in range(prompt)), Options(1, temperature=0.0))
    _, alone = gaps(engine, short, others)
    seconds, among = gaps(engine, [*short, long], others)
    line = {
        "config": arguments.config,
        "overrides": arguments.overrides,
        **{"prompt": prompt, "part": arguments.part, "others": others},
        "seconds": seconds,
        "prompt_tokens_per_second": prompt / seconds,
        "median_gap_seconds": statistics.median(among),
        "longest_gap_seconds": max(among),
        "median_gap_alone_seconds": statistics.median(alone),
        "longest_gap_alone_seconds": max(alone),
        "cache_bytes": engine.rows * row,
        "peak_bytes": measure.peak_bytes(),
        "scores_bytes": 4 * config.num_attention_heads * prompt**2,
    }
    measure.show("long_prompt", line)


def gaps(engine, requests, others: int) -> tuple[float, list[float]]:
    """(seconds to the end, times between two tokens of one of the first others).

    The end is the first token of the long one, where there is one.
    """
    last: dict[int, float] = {}
    found, began = [], time.perf_counter()
    for event in engine.run(requests):
        now = time.perf_counter()
        if event.request >= others:
            break
        if event.request in last:
            found.append(now - last[event.request])
        last[event.request] = now
    return time.perf_counter() - began, found


if __name__ == "__main__":
    measure.run(main)
