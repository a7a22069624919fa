"""Speed of a training step, and where its time goes.

    python benchmarks/training.py --config configs/quickstart.yaml [--steps 20] [key=value ...]

Trains on synthetic tokens. Prints JSON lines: one with seconds to initialise and to compile, median
and quartiles of the step, tokens/s; then one with each named scope's share of the time (route,
exchange, experts, combine, attention, head, optimizer, other), from a profile of a few more steps.
Shares are of the time that the operations of all devices took together, without waiting for each
other. On emulated devices, which share the machine's cores, it includes waiting for a core.
"""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from mixtral_jax import config_io, sharding

SCOPES = ("route", "exchange", "experts", "combine", "attention", "head", "optimizer")
CONTAINERS = ("while", "call", "conditional")  # their bodies' operations are events too


def scope_of(op_name: str) -> str:
    """The innermost of our named scopes in an operation's name, inside a transform or not."""
    words = re.findall(r"\w+", op_name)
    return next((word for word in reversed(words) if word in SCOPES), "other")


def operation_times(trace: pathlib.Path, hlo: str) -> collections.Counter[tuple[str, str]]:
    """Nanoseconds of each (instruction, its full name) of a compiled program in a trace folder."""
    import jax

    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    names, spent = dict(pattern.findall(hlo)), collections.Counter()
    for file in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for event in (event for line in plane.lines for event in line.events):
                if event.name in names and not event.name.startswith(CONTAINERS):
                    spent[event.name, names[event.name]] += event.duration_ns
    return spent


def print_shares(spent: collections.Counter[tuple[str, str]], operations: int) -> None:
    """Each scope's share of the operations' time, and the operations that take most."""
    scopes, total = collections.Counter(), sum(spent.values()) or 1
    for (_, op_name), duration in spent.items():
        scopes[scope_of(op_name)] += duration
    shares = {name: round(duration / total, 4) for name, duration in scopes.most_common()}
    print(json.dumps({"benchmark": "training scopes", **shares}))
    for (name, op_name), duration in spent.most_common(operations):
        print(json.dumps({"operation": name, "share": round(duration / total, 4), "in": op_name}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--operations", type=int, default=0, help="print the longest ones too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    overrides = ["data.source=synthetic", *arguments.overrides]
    config = config_io.load(arguments.config, overrides)
    sharding.start(config.mesh)

    import jax
    import numpy as np

    from mixtral_jax.data.batches import synthetic_batch
    from mixtral_jax.training import step as steps
    from mixtral_jax.training.placement import Placement

    mesh = sharding.mesh_from_config(config.mesh)
    with jax.set_mesh(mesh):
        began = time.perf_counter()
        state = jax.block_until_ready(steps.initial_state(config, mesh))
        initialised = time.perf_counter()
        placement = Placement(config, mesh)
        step = jax.jit(steps.make_train_step(config), donate_argnums=0)
        step = step.lower(state, placement.abstract()).compile()
        compiled = time.perf_counter()
        batch = placement(synthetic_batch(config, placement.rows, 0))
        times = []
        for _ in range(arguments.steps + 2):
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(3):
                    state, metrics = step(state, batch)
                    jax.block_until_ready(metrics)
            spent = operation_times(pathlib.Path(folder), step.as_text())
    low, median, high = np.percentile(times[2:], [25, 50, 75])
    tokens = config.training.batch_size * config.training.sequence_length
    speed = {
        "benchmark": "training",
        "config": arguments.config,
        "overrides": arguments.overrides,
        "device": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
        "parameters": config.model.num_parameters,
        "initialise_seconds": round(initialised - began, 2),
        "compile_seconds": round(compiled - initialised, 2),
        "step_seconds": round(float(median), 4),
        "step_seconds_quartiles": [round(float(low), 4), round(float(high), 4)],
        "tokens_per_second": round(tokens / float(median), 1),
    }
    print(json.dumps(speed))
    print_shares(spent, arguments.operations)


if __name__ == "__main__":
    main()
