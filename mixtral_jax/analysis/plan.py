"""Choose a mesh: python -m mixtral_jax.analysis.plan --model mixtral_8x7b --topology v5p:4x4x4

Searches the meshes, batches, remat policies, exchanges and types of weights that a model may train
with on a TPU slice by a model of its costs, compiles the best few for the slice, and prints them
ranked, each with the command that gives its compile report. docs/planning.md says what the figures
rest on.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
import sys
from typing import Any

from mixtral_jax import command_line, config_io
from mixtral_jax.analysis import chips, cost_model, report_file, search
from mixtral_jax.config import (
    DTYPES,
    PRESETS,
    Config,
    InputError,
    MeshConfig,
    check_choice,
)
from mixtral_jax.interop import folders
from mixtral_jax.kernels import splash

BASE = "configs/planned.yaml"
FREE = ("remat", "exchange", "receive_factor")
"""Keys of the model that are searched where no override says what they are."""
ELSEWHERE = {
    "training.batch_size": "name it as --batch-size",
    "training.gradient_accumulation": "it follows from the batch: name --batch-size",
    "training.sequence_length": "name it as --sequence-length",
    "model.param_dtype": "name it as --param-dtype",
    "model.capacity_factor": "plans bound the buffers by model.receive_factor",
    "model.preset": "name it as --model",
}
"""Keys that no override may have, as the planner chooses them or has a flag for them."""


def make_parser() -> command_line.Parser:
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="NAME", help="a released model: mixtral_8x7b, ...")
    what.add_argument("--config", metavar="FILE", help="a config whose model is to be trained")
    add("--topology", required=True, metavar="SLICE", help="such as v5p:4x4x4 or v6e:16x16")
    add("--slices", type=int, default=1, metavar="N", help="that many slices (default 1)")
    add("--sequence-length", type=int, metavar="L", help="tokens in a sequence")
    add("--batch-size", type=int, metavar="B", help="sequences in a step; default: what is best")
    add("--param-dtype", choices=DTYPES, help="type of the weights; default: both")
    add("--compile", type=int, default=3, metavar="K", help="compile the best K (default 3)")
    add("--top", type=int, default=10, metavar="N", help="how many to print (default 10)")
    add("--report", metavar="FILE", default="", help="all plans, as JSON")
    add("overrides", nargs="*", metavar="section.key=value")
    return parser


def base_config(arguments: argparse.Namespace) -> Config:
    """The config whose mesh, batch and policies are to be chosen."""
    overrides = [text for text in arguments.overrides if not text.startswith("mesh.")]
    if arguments.model is not None:
        check_choice("--model", arguments.model, tuple(PRESETS))
        overrides.insert(0, f"model.preset={arguments.model}")
    if arguments.sequence_length is not None:
        overrides.append(f"training.sequence_length={arguments.sequence_length}")
    if arguments.config is None:
        values = config_io.apply_overrides({"data": {"source": "synthetic"}}, overrides)
        return config_io.from_dict(config_io.with_sizes(values, folders.training_sizes))
    return config_io.load(arguments.config, overrides, folders.training_sizes)


def choices_of(arguments: argparse.Namespace) -> search.Choices:
    """What is searched, and what the flags and overrides have chosen.

    Raises:
      InputError: for an override that a flag stands for, or of what the planner alone decides.
    """
    for text in arguments.overrides:
        if (why := ELSEWHERE.get(text.partition("=")[0])) is not None:
            raise InputError(f"{text}: {why}")
    given = config_io.apply_overrides({}, arguments.overrides)
    model, mesh = (config_io.section_from_dict(n, given.get(n)) for n in ("model", "mesh"))
    return search.Choices(
        (arguments.param_dtype,) if arguments.param_dtype else DTYPES,
        arguments.batch_size,
        {axis: getattr(mesh, axis) for axis in given.get("mesh", {})},
        {key: getattr(model, key) for key in FREE if key in given.get("model", {})},
    )


def slice_of(name: str) -> chips.SliceName:
    """What a slice's name says.

    Raises:
      InputError: as chips.parse_real, or for GPUs.
    """
    try:
        return chips.parse_real(name)
    except InputError:
        from mixtral_jax.analysis import gpus  # only now: it loads JAX

        if gpus.names(name):
            raise InputError(
                f"--topology {name}: plans are for TPU slices; of GPUs, train.py --compile-only "
                "says what a config takes of their memory"
            ) from None
        raise


def command(arguments: argparse.Namespace, base: Config, plan: search.Plan) -> str:
    """The command that compiles a plan."""
    parts = ["python", "train.py", "--config", arguments.config or BASE]
    if arguments.model is not None:
        parts.append(f"model.preset={arguments.model}")
    parts += arguments.overrides
    given = {text.partition("=")[0] for text in arguments.overrides}
    sections = (
        ("model", ("param_dtype", "remat", "exchange", "receive_factor", "capacity_factor")),
        ("mesh", [field.name for field in dataclasses.fields(MeshConfig)]),
        ("training", ("sequence_length", "batch_size", "gradient_accumulation")),
    )
    plain = config_io.from_dict({"data": {"source": "synthetic"}}) if arguments.model else base
    for section, names in sections:
        for name in names:
            value = getattr(getattr(plan.config, section), name)
            known = value == getattr(getattr(plain, section), name)
            if not known and f"{section}.{name}" not in given:
                parts.append(f"{section}.{name}={'null' if value is None else value}")
    parts += ["--compile-only", arguments.topology]
    if arguments.slices > 1:
        parts += ["--slices", str(arguments.slices)]
    return shlex.join(parts)


def describe(plan: search.Plan, command: str) -> dict[str, Any]:
    """A plan for the report."""
    config, found = plan.config, plan.estimate
    model, training = config.model, config.training
    return {
        "mesh": dataclasses.asdict(config.mesh),
        "batch_size": training.batch_size,
        "gradient_accumulation": training.gradient_accumulation,
        "remat": model.remat,
        "exchange": model.exchange or "local",
        "receive_factor": model.receive_factor,
        "param_dtype": model.param_dtype,
        "bytes_per_device": {**found.bytes, "total": found.total_bytes},
        "seconds": found.seconds,
        "estimated_step_seconds": found.step_seconds,
        "estimated_tokens_per_second_per_chip": plan.tokens_per_second,
        "estimated_mfu": plan.mfu,
        "command": command,
        "compiled": None,
    }


def about_attention(base: Config) -> str:
    """A line for a model whose scores attention holds though nobody asked for it, or nothing."""
    if not cost_model.holds_scores(base) or base.model.attention == "xla":
        return ""
    most, lanes, advice = base.model.max_position_embeddings, splash.LANES, []
    for name, size, limit in (
        ("training.sequence_length", base.training.sequence_length, most),
        ("model.head_dim", base.model.head_size, math.inf),
    ):
        if size % lanes:
            near = (size // lanes * lanes, (size // lanes + 1) * lanes)
            good = " or ".join(str(n) for n in near if 0 < n <= limit)
            advice.append(f"{name}={size}" + (f" (but {good})" if good else ""))
    return (
        f"attention is xla, which holds its scores in memory: splash wants multiples of {lanes}, "
        f"not {', '.join(advice)}\n"
    )


def row(number: int, plan: dict[str, Any]) -> list[str]:
    """A plan's line of the table."""
    mesh = " ".join(f"{axis}={n}" for axis, n in plan["mesh"].items() if n > 1) or "1 device"
    batch, steps = plan["batch_size"], plan["gradient_accumulation"]
    factor = plan["receive_factor"]
    return [
        str(number),
        mesh,
        f"{batch}" + (f" in {steps}" if steps > 1 else ""),
        plan["remat"],
        plan["exchange"] + (f" {factor}" if factor else ""),
        plan["param_dtype"],
        f"{plan['bytes_per_device']['total'] / 2**30:.1f}",
        *(f"{plan['seconds'][part]:.3g}" for part in ("arithmetic", "memory", "interconnect")),
        f"{plan['estimated_tokens_per_second_per_chip']:,.0f}",
        f"{plan['estimated_mfu']:.1%}",
        *_compiled_columns(plan["compiled"]),
    ]


def _compiled_columns(report: dict[str, Any] | None) -> list[str]:
    if report is None:
        return ["", "", ""]
    total = f"{report['bytes_per_device']['total'] / 2**30:.1f}"
    if not report["fits"]:
        return [total, "does not fit", ""]
    speed = f"{report['estimated_tokens_per_second_per_chip']:,.0f}"
    return [total, speed, f"{report['estimated_mfu']:.1%}"]


HEADS = (
    *("", "mesh", "batch", "remat", "exchange", "weights", "GiB", "arithmetic s", "memory s"),
    *("links s", "tokens/s a chip", "MFU", "compiled: GiB", "tokens/s a chip", "MFU"),
)


def table(plans: list[dict[str, Any]]) -> str:
    """Plans as lines to read, and their commands."""
    rows = [list(HEADS), *(row(n + 1, plan) for n, plan in enumerate(plans))]
    if all(plan["compiled"] is None for plan in plans):
        rows = [cells[:-3] for cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(cells, widths)).rstrip() for cells in rows]
    commands = [f"{n + 1}. {plan['command']}" for n, plan in enumerate(plans)]
    return "\n".join([*lines, "", *commands])


def compile_best(plans: list[search.Plan], shown: list[dict], arguments) -> None:
    """Add the compile report of the best K plans, and rank those by it."""
    from mixtral_jax.analysis.compile_report import compile_report  # only now: it wants libtpu

    count = min(arguments.compile, len(plans))
    for number, (plan, described) in enumerate(zip(plans[:count], shown[:count])):
        print(f"compiling {number + 1} of {count}, which takes minutes", file=sys.stderr)
        try:
            found = compile_report(plan.config, arguments.topology, arguments.slices)
        except InputError as error:  # the other plans stand
            print(f"plan {number + 1} is not compiled: {error}", file=sys.stderr)
        else:
            described["compiled"] = found

    def rank(described):
        report = described["compiled"]
        known = report is not None and report["fits"]
        return -report["estimated_tokens_per_second_per_chip"] if known else math.inf

    shown[:count] = sorted(shown[:count], key=rank)


def run(arguments: argparse.Namespace) -> int:
    """Search, compile, print. The exit code is 1 if nothing fits."""
    for name in ("slices", "batch_size", "top"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if arguments.compile < 0:
        raise InputError(f"--compile {arguments.compile} must be at least 0")
    report_file.check_path(arguments.report)
    choices, base = choices_of(arguments), base_config(arguments)
    target = slice_of(arguments.topology)
    plans = search.plans(base, target, arguments.slices, choices)
    if not plans:
        where = f"{arguments.slices} x {arguments.topology}"
        why = search.why_none(base, target, arguments.slices, choices).format(where=where)
        command_line.write(f"{why}\n{about_attention(base)}")
        return 1
    shown = [describe(plan, command(arguments, base, plan)) for plan in plans]
    if arguments.compile:
        compile_best(plans, shown, arguments)
    text = f"{about_attention(base)}{table(shown[: arguments.top])}"
    report_file.show(shown, arguments.report, text)
    return 0


def main(argv: list[str] | None = None) -> int:
    try:
        return run(make_parser().parse_intermixed_args(argv))
    except InputError as error:
        return command_line.report(error)
    except (command_line.OutputError, BrokenPipeError) as error:
        return command_line.unwritten(error)


if __name__ == "__main__":
    sys.exit(main())
