"""Speed of a training step, and where its time goes.

    python benchmarks/train.py --config configs/quickstart.yaml [--steps 20] [section.key=value ...]

Trains on random tokens. Prints JSON lines: one with seconds to initialise and to compile, median
and quartiles of the step, tokens/s, and MFU, which is the limit's share: the time of the model's
FLOPs at the measured rate of a large dense product. Then one with each named scope's share of the
time (route, exchange, experts, combine, attention, head, optimizer, other), from a profile of a few
more steps (--profile 0 for none). Shares are of the time that the operations of all devices took
together, without waiting for each other. On emulated devices, which share the machine's cores, it
includes waiting for a core.
On GPU what stands in a CUDA graph and is a library's kernel or one of Pallas counts as unattributed
(--operations names them).
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import tempfile

import measure
import ours

UNATTRIBUTED = "unattributed"
SCOPES = ("route", "exchange", "experts", "combine", "attention", "head", "optimizer", UNATTRIBUTED)
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
    kernels = {re.sub(r"[.-]", "_", name): name for name in names} | {name: name for name in names}
    for file in trace.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            on_gpu = plane.name.startswith("/device:GPU")
            for event in (event for line in plane.lines for event in line.events):
                name = kernel_of(event, kernels) if on_gpu else event.name
                if (name in names or on_gpu) and not name.startswith(CONTAINERS):
                    spent[name, names.get(name, UNATTRIBUTED)] += event.duration_ns
    return spent


def kernel_of(event, kernels: dict[str, str]) -> str:
    """The instruction that a GPU's kernel is of, if its event tells, or else the kernel's name.

    Args:
      kernels: instructions by their names, and by those of the kernels that XLA makes for them. An
        event names the instruction outside of CUDA graphs alone.
    """
    told = (kernels[v] for k, v in event.stats if k == "hlo_op" and v in kernels)
    return next(told, kernels.get(event.name, event.name))


def show_shares(arguments: argparse.Namespace, spent: collections.Counter[tuple[str, str]]) -> None:
    """Each scope's share of the operations' time, and the operations that take most."""
    scopes, total = collections.Counter(), sum(spent.values()) or 1
    for (_, op_name), duration in spent.items():
        scopes[scope_of(op_name)] += duration
    line = {"config": arguments.config, "overrides": arguments.overrides}
    shares = {f"of_time_{name}": duration / total for name, duration in scopes.most_common()}
    measure.show("train scopes", {**line, **shares})
    for (name, op_name), duration in spent.most_common(arguments.operations):
        found = {"operation": name, "of_time": duration / total, "in": op_name}
        measure.show("train operations", {**line, **found})


def profile(training: ours.Training, steps: int) -> collections.Counter[tuple[str, str]]:
    """operation_times of a few steps."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                training.step()
        return operation_times(pathlib.Path(folder), training.compiled.as_text())


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--steps", type=measure.positive, default=20)
    parser.add_argument("--profile", type=int, default=3, help="steps to profile")
    parser.add_argument("--operations", type=int, default=0, help="print the longest ones too")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    config = ours.load(arguments.config, arguments.overrides)
    training = ours.Training(config)
    for _ in range(2):
        training.step()
    times = [measure.seconds(training.step) for _ in range(arguments.steps)]
    line = {
        "config": arguments.config,
        "overrides": arguments.overrides,
        **figures(config, training, times),
        "turns": arguments.steps,
    }
    measure.show("train", line)
    if arguments.profile:
        spent = profile(training, arguments.profile)
        show_shares(arguments, spent)


def figures(config, training: ours.Training, times: list[float]) -> dict:
    """Of a step whose times these are."""
    import numpy as np

    from mixtral_jax.model.flops import training_flops_per_token
    from mixtral_jax.model.mixtral import compute_dtype

    low, median, high = map(float, np.percentile(times, [25, 50, 75]))
    tokens = config.training.batch_size * config.training.sequence_length
    flops = tokens * training_flops_per_token(config.model, config.training.sequence_length)
    dtype = str(compute_dtype(config.model))
    rate = measure.product_rate(dtype)
    devices = 1 if training.mesh.devices.flat[0].platform == "cpu" else training.mesh.size
    return {
        "parameters": config.model.num_parameters,
        "active_parameters": config.model.num_active_parameters,
        "devices": training.mesh.size,
        "dtype": dtype,
        "kernels": training.kernels,
        "initialise_seconds": training.initialise_seconds,
        "compile_seconds": training.compile_seconds,
        **measure.limited(median, flops / rate / devices),  # emulated devices share one machine
        "seconds_quartiles": [low, high],
        "tokens_per_second": tokens / median,
        "product_teraflops_per_second": rate / 1e12,
        "peak_bytes": measure.peak_bytes(),
    }


if __name__ == "__main__":
    measure.run(main)
