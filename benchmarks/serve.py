"""Many requests at once beside one after another: tokens/s of continuous batching.

    python benchmarks/serve.py [--config configs/quickstart.yaml] [--requests 64] [--rows 32]

Requests of mixed lengths (prompts of 8 to 100 tokens, answers of 16 to 128, by a fixed seed, random
weights): all of them given to one engine, and each given when the one before it has ended, to an
engine with one row. The first is on a mesh of two emulated devices, which share the rows and so use
two cores (mesh.data=2), and once more on one device; one row has no use for a second. After a
warm-up that compiles everything, taking turns; medians. One JSON line for each, tokens/s of the
answers; and with the same requests behind a system prompt of --prefix tokens, with and without what
the rows hold used again.
"""

from __future__ import annotations

import statistics
import time

import measure
import ours

from mixtral_jax import sharding


def requests_of(count: int, vocabulary: int, prefix: int = 0, seed: int = 0) -> list:
    """Requests of mixed lengths, behind a prefix that is another for each seed."""
    import numpy as np

    from mixtral_jax.generation.request import Options, Request

    random = np.random.default_rng(0)
    shared = np.random.default_rng(1000 + seed).integers(3, vocabulary, prefix)
    made = []
    for _ in range(count):
        length, new = random.integers(8, 101), int(random.integers(16, 129))
        prompt = np.random.default_rng([seed, len(made)]).integers(3, vocabulary, length)
        tokens = (1, *map(int, shared), *map(int, prompt))
        made.append(Request(tokens, Options(new, temperature=0.0)))
    return made


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    root = measure.HERE.parent
    parser.add_argument("--config", default=str(root / "configs" / "quickstart.yaml"))
    parser.add_argument("--requests", type=measure.positive, default=64)
    parser.add_argument("--rows", type=measure.positive, default=32)
    parser.add_argument("--prefix", type=measure.positive, default=128)
    parser.add_argument("--turns", type=measure.positive, default=3)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    overrides = ["mesh.expert=1", "mesh.data=2", *arguments.overrides]
    whole = ours.load(arguments.config, overrides)
    config = whole.model.dropless()
    sharding.start(whole.mesh)
    import jax

    from mixtral_jax.generation.engine import Engine
    from mixtral_jax.model.mixtral import initialize

    key = jax.random.key(0)
    model = initialize(config, key, sharding.mesh_from_config(whole.mesh))
    small = initialize(config, key, sharding.make_mesh())
    capacity = 101 + 128 + arguments.prefix
    together = Engine(model, rows=arguments.rows, capacity=capacity)
    on_one = Engine(small, rows=arguments.rows, capacity=capacity)
    alone = Engine(small, rows=1, capacity=capacity)
    engines = together, on_one, alone
    for engine in engines:
        engine.warm_up()

    def forget(engine) -> None:
        for row in engine._rows:
            row.written = []

    def all_at_once(asked) -> None:
        together.generate(asked)

    def all_on_one_device(asked) -> None:
        on_one.generate(asked)

    def one_by_one(asked) -> None:
        for request in asked:
            alone.generate([request])

    def without_prefixes(asked) -> None:
        for request in asked:
            forget(alone)
            alone.generate([request])

    works = {
        "all at once": (all_at_once, 0),
        "all at once, one device": (all_on_one_device, 0),
        "one after another": (one_by_one, 0),
        "all at once, shared prefix": (all_at_once, arguments.prefix),
        "one after another, shared prefix": (one_by_one, arguments.prefix),
        "one after another, shared prefix computed each time": (
            without_prefixes,
            arguments.prefix,
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(arguments.turns):
        for name, (work, prefix) in works.items():
            asked = requests_of(arguments.requests, config.vocab_size, prefix, turn)
            for engine in engines:
                forget(engine)
            began = time.perf_counter()
            work(asked)
            times[name].append(time.perf_counter() - began)
    tokens = sum(r.options.max_new_tokens for r in requests_of(arguments.requests, 100))
    for name, found in times.items():
        seconds = statistics.median(found)
        other = times["one after another" + ", shared prefix" * ("prefix" in name)]
        line = {
            **{"name": name, "config": arguments.config, "overrides": arguments.overrides},
            **{"requests": arguments.requests, "rows": arguments.rows, "tokens": tokens},
            **{"seconds": seconds, "tokens_per_second": tokens / seconds},
            "times_one_after_another": statistics.median(other) / seconds,
            "turns": arguments.turns,
        }
        measure.show("serve", line)


if __name__ == "__main__":
    measure.run(main)
