"""What a training step takes on a TPU slice, from its compiler alone: memory, arithmetic, time.

The step that training/loop.py runs is compiled ahead of time for a slice that is not there. How the
figures come about:

- Memory is that of the whole program, as the compiler placed it.
- Time, arithmetic and collectives come from smaller programs (prices.py).
- The compiler prices attention kernels as memory traffic; their arithmetic is added at an assumed
  share of the chip's peak (custom_calls.py).
- Grouped matrix products are priced by their buffers and not by the rows in use. Both figures are
  given; the estimates rest on that for the rows which balanced experts bring.
- The compiler prices collectives as memory traffic too; the time on the links is a model of our own
  (collectives.py). A step is taken to last as long as both together: nothing overlaps.
"""

from __future__ import annotations

from typing import Any

import jax

from mixtral_jax.analysis import topology
from mixtral_jax.analysis.memory import memory_of
from mixtral_jax.analysis.prices import Price, compile_step, price, step_arguments
from mixtral_jax.analysis.report_file import check_path, show
from mixtral_jax.config import Config, InputError
from mixtral_jax.model.flops import training_flops_per_token
from mixtral_jax.training.step import kernels_of_step

ESTIMATES = (
    *("compiled_flops", "compiled_flops_expected_rows", "collectives", "compiler_seconds"),
    *("compiler_seconds_expected_rows", "unpriced", "interconnect_seconds", "arithmetic_seconds"),
    *("memory_seconds", "loop_seconds", "estimated_step_seconds", "estimated_mfu"),
    "estimated_tokens_per_second_per_chip",
)


def compile_report(config: Config, name: str, slices: int) -> dict[str, Any]:
    """The report of a config's training step on TPU slices, per chip and per step.

    Where the program does not fit, `fits` is false, memory is what the compiler says it would need,
    and everything that depends on a compiled program is None; so it is for GPUs.

    Args:
      config: its mesh must have as many devices as the slices.
      name: of a slice, such as v5p:4x4x4, or of GPUs of one host, such as h200:8.
      slices: how many of them.
    Raises:
      InputError: for a slice or a mesh that cannot be, or if its compiler is not installed.
    """
    target = topology.get_target(name, slices)
    mesh = topology.make_mesh(config.mesh, target)
    with jax.set_mesh(mesh):
        kernels = kernels_of_step(config)
    check_kernels(kernels, target.priced)
    training = config.training
    tokens = training.batch_size * training.sequence_length / target.chips
    report = {
        **{"topology": target.name, "chips": target.chips, "kernels": kernels},
        **memory_of(
            lambda: compile_step(config, mesh),
            step_arguments(config, mesh),
            target.limit,
        ),
        "tokens_per_chip": tokens,
        "model_flops": tokens * training_flops_per_token(config.model, training.sequence_length),
        **dict.fromkeys(ESTIMATES),
    }
    if report["fits"] and target.priced:
        report.update(_estimates(price(config, mesh, target), report, target))
    return report


def check_kernels(kernels: dict[str, str], priced: bool) -> None:
    """Refuse, where programs are priced, those whose loops the compiler would count once.

    Raises:
      InputError: for attention by chunks, or experts by blocks.
    """
    for name, loop, instead in (
        ("attention", "chunks", "xla"),
        ("grouped_matmul", "blocks", "ragged_dot"),
    ):
        if priced and kernels[name] == loop:
            raise InputError(
                f"model.{name}={loop} is a loop, of which the TPU's compiler would count one turn: "
                f"with --compile-only leave it empty, or use {instead}"
            )


def _estimates(priced: Price, report: dict[str, Any], target: topology.Slice) -> dict[str, Any]:
    found = estimates(priced, target)
    step, peak = found["estimated_step_seconds"], target.chip.per_chip * target.chip.peak_flops
    return {
        **found,
        "estimated_tokens_per_second_per_chip": report["tokens_per_chip"] / step,
        "estimated_mfu": report["model_flops"] / step / peak,
    }


def estimates(priced: Price, target: topology.Slice) -> dict[str, Any]:
    """What a report says of a program's price, per chip."""
    devices, chip = target.chip.per_chip, target.chip
    flops = priced.compiled.flops + priced.unpriced.flops
    expected_flops = flops - priced.surplus.flops
    expected_seconds = priced.compiled.seconds - priced.surplus.seconds
    others = priced.loop_seconds + priced.unpriced.seconds + priced.interconnect_seconds
    moved = priced.compiled.bytes - priced.surplus.bytes
    return {
        "compiled_flops": devices * flops,
        "compiled_flops_expected_rows": devices * expected_flops,
        "collectives": {
            kind: {"count": found["count"], "bytes": devices * found["bytes"]}
            for kind, found in priced.collectives.items()
        },
        "compiler_seconds": priced.compiled.seconds,
        "compiler_seconds_expected_rows": expected_seconds,
        "unpriced": {
            "flops": devices * priced.unpriced.flops,
            "seconds": priced.unpriced.seconds,
        },
        "interconnect_seconds": priced.interconnect_seconds,
        "arithmetic_seconds": expected_flops / chip.peak_flops,
        "memory_seconds": moved / chip.hbm_bytes_per_second,
        "loop_seconds": priced.loop_seconds,
        "estimated_step_seconds": expected_seconds + others,
    }


# ---- output ------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """A report as lines to read."""
    memory, gib = report["bytes_per_device"], 2**30
    rows = [
        ("compiled for", f"{report['topology']}, {report['chips']} chips"),
        ("figures", "memory of a device, all else per chip and step"),
        ("kernels", ", ".join(f"{part} {body}" for part, body in report["kernels"].items())),
        ("fits", "yes" if report["fits"] else "NO"),
        *((f"memory, {name}", f"{memory[name] / gib:,.2f} GiB") for name in memory),
        ("tokens", f"{report['tokens_per_chip']:,.0f}"),
        ("model FLOPs", f"{report['model_flops'] / 1e12:,.4g} T"),
    ]
    if report["compiler_seconds"] is not None:
        rows += _estimate_rows(report)
    return aligned(rows)


def aligned(rows: list[tuple[str, str]]) -> str:
    """Names and values as lines."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _estimate_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    unpriced = report["unpriced"]

    def flops(name):
        value = report[name]
        return f"{value / 1e12:,.4g} T, {value / report['model_flops']:.2f} times the model's"

    def seconds(name):
        return f"{report[name]:,.4g} s"

    return [
        ("compiled FLOPs", flops("compiled_flops")),
        ("  of the rows in use", flops("compiled_flops_expected_rows")),
        *(
            (name, f"{found['count']:,.0f} times, {found['bytes'] / 1e9:,.4g} GB sent")
            for name, found in report["collectives"].items()
        ),
        ("arithmetic at peak", seconds("arithmetic_seconds")),
        ("memory traffic at peak", seconds("memory_seconds")),
        ("compiler's estimate", seconds("compiler_seconds")),
        ("  of the rows in use", seconds("compiler_seconds_expected_rows")),
        ("loop over layers", seconds("loop_seconds")),
        (
            "attention, our model",
            f"{unpriced['seconds']:,.4g} s, {unpriced['flops'] / 1e12:,.4g} T",
        ),
        ("interconnect, our model", seconds("interconnect_seconds")),
        ("estimated step", f"{seconds('estimated_step_seconds')}, the last four: no overlap"),
        ("estimated tokens/s", f"{report['estimated_tokens_per_second_per_chip']:,.0f}"),
        ("estimated MFU", f"{report['estimated_mfu']:.1%}"),
    ]


def run(config: Config, name: str, path: str, slices: int) -> int:
    """Print the report of a config's step on a slice, and write it to a JSON file if one is named.

    Returns:
      The exit code: 0, or 1 if the program does not fit.
    Raises:
      InputError: as compile_report, or if the file cannot be written.
    """
    check_path(path)
    report = compile_report(config, name, slices)
    show(report, path, table(report))
    return 0 if report["fits"] else 1
