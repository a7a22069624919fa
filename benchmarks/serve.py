"""Many requests at once beside one after another: tokens/s of continuous batching.

    python benchmarks/serve.py [--config configs/quickstart.yaml] [--requests 64] [--rows 64]

Requests of mixed lengths (prompts of 8 to 100 tokens after BOS, answers of 16 to 128), greedy, with
random weights: all given to one engine of --rows rows; and each given when the one before it has
ended, to an engine of one row. Then the same requests behind a system prompt of --prefix tokens;
one after another with what the row holds of it used again, and with all of it computed each time.
The context of an engine is what its requests need. All on one device; overrides such as
mesh.data=2 are for all at once alone.

After a warm-up that compiles everything, all take turns, with other tokens in each and nothing held
from the turn before. One JSON line for each: the tokens of its answers, the median seconds, and
`times_one_after_another`: how many times as fast it is as one after another with the same prompts,
the median of the ratios within each turn.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import measure
import numpy as np
import ours

from mixtral_jax import sharding
from mixtral_jax.config import Config, ModelConfig
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.request import Options, Request, Serving, check_request
from mixtral_jax.generation.results import Answer
from mixtral_jax.generation.rows import context_for
from mixtral_jax.model.mixtral import initialize


class Contestant(NamedTuple):
    engine: Engine
    prefix: int
    """Tokens of the system prompt."""
    answer: Callable[[Engine, list[Request]], list[list[Answer]]]
    baseline: str
    """The name of the one that it is compared with."""


def requests_of(count: int, vocabulary: int, prefix: int = 0, seed: int = 0) -> list[Request]:
    """Requests behind one prefix: of the same lengths for each seed, with other tokens."""
    random = np.random.default_rng(0)
    shared = np.random.default_rng(1000 + seed).integers(3, vocabulary, prefix)
    made = []
    for number in range(count):
        length, new = random.integers(8, 101), int(random.integers(16, 129))
        prompt = np.random.default_rng([seed, number]).integers(3, vocabulary, length)
        tokens = (1, *map(int, shared), *map(int, prompt))
        made.append(Request(tokens, Options(new, temperature=0.0)))
    return made


def context_of(asked: list[Request], config: ModelConfig) -> int:
    """Of the engine that answers these requests.

    Raises:
      InputError: if the longest goes beyond the model's context.
    """

    def tokens(request: Request) -> int:
        return len(request.tokens) + request.options.max_new_tokens

    longest = max(asked, key=tokens)
    most = config.max_position_embeddings
    check_request(longest, config.vocab_size, most, "the longest request")
    return context_for(tokens(longest))


# ---- ways to answer ----------------------------------------------------------------------------


def all_at_once(engine: Engine, asked: list[Request]) -> list[list[Answer]]:
    return engine.generate(asked)


def one_by_one(engine: Engine, asked: list[Request]) -> list[list[Answer]]:
    return [engine.generate([request])[0] for request in asked]


def each_anew(engine: Engine, asked: list[Request]) -> list[list[Answer]]:
    answers = []
    for request in asked:
        engine.forget()
        answers += engine.generate([request])
    return answers


# ---- turns -------------------------------------------------------------------------------------


def contestants(config: Config, arguments: argparse.Namespace) -> dict[str, Contestant]:
    """All that take part, in the order of their turns, warmed up."""
    sizes = config.model.dropless()
    prefixes = {"": 0, ", shared prefix": arguments.prefix}
    contexts = {
        behind: context_of(requests_of(arguments.requests, sizes.vocab_size, prefix), sizes)
        for behind, prefix in prefixes.items()
    }
    sharding.start(config.mesh)
    mesh, key = sharding.mesh_from_config(config.mesh), jax.random.key(0)
    model = initialize(sizes, key, mesh)
    on_one = model if mesh.size == 1 else initialize(sizes, key, sharding.make_mesh())
    made = {}
    for behind, prefix in prefixes.items():
        needs = {"context": contexts[behind], "part": arguments.part}
        together = Engine(model, rows=arguments.rows, **needs)
        alone = Engine(on_one, rows=1, **needs)
        for engine in together, alone:
            engine.warm_up()
        baseline = f"one after another{behind}"
        made[f"all at once{behind}"] = Contestant(together, prefix, all_at_once, baseline)
        made[baseline] = Contestant(alone, prefix, one_by_one, baseline)
    made[f"{baseline} computed each time"] = made[baseline]._replace(answer=each_anew)
    return made


def turn_of(one: Contestant, asked: list[Request]) -> tuple[float, int]:
    """(its seconds, the tokens of all answers)."""
    one.engine.forget()
    began = time.perf_counter()
    answers = one.answer(one.engine, asked)
    seconds = time.perf_counter() - began
    return seconds, sum(len(answer.tokens) for (answer,) in answers)


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    root = measure.HERE.parent
    parser.add_argument("--config", default=str(root / "configs" / "quickstart.yaml"))
    parser.add_argument("--requests", type=measure.positive, default=64)
    parser.add_argument("--rows", type=measure.positive, default=64)
    parser.add_argument("--prefix", type=measure.positive, default=128)
    parser.add_argument("--part", type=measure.positive, default=Serving.part)
    parser.add_argument("--turns", type=measure.positive, default=5)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = ours.load(arguments.config, ["mesh.expert=1", *arguments.overrides])
    all_of_them = contestants(config, arguments)
    times: dict[str, list[float]] = {name: [] for name in all_of_them}
    tokens: dict[str, int] = {}  # the same in every turn
    for turn in range(arguments.turns):
        for name, one in all_of_them.items():
            asked = requests_of(arguments.requests, config.model.vocab_size, one.prefix, turn)
            seconds, tokens[name] = turn_of(one, asked)
            times[name].append(seconds)
    for name, one in all_of_them.items():
        seconds = statistics.median(times[name])
        ratios = (other / own for other, own in zip(times[one.baseline], times[name]))
        line = {
            "name": name,
            "config": arguments.config,
            "overrides": arguments.overrides,
            "requests": arguments.requests,
            "rows": one.engine.rows,
            "tokens": tokens[name],
            "seconds": seconds,
            "tokens_per_second": tokens[name] / seconds,
            "times_one_after_another": statistics.median(ratios),
            "turns": arguments.turns,
        }
        measure.show("serve", line)


if __name__ == "__main__":
    measure.run(main)
