"""What a training step takes on a TPU slice, from its compiler alone: memory, arithmetic, time.

The step that training/loop.py runs is compiled ahead of time for a slice that is not there. How the
figures come about:

- Memory is that of the whole program, as the compiler placed it.
- Time, arithmetic and collectives come from two more programs, with one and with two layers, as the
  compiler counts the body of a loop once however often it runs. What the second layer adds is
  multiplied. Microbatches are counted likewise: as many steps of one microbatch, which counts the
  optimizer with each of them.
- The compiler prices collectives as memory traffic; the time on the links is a model of our own
  (collectives.py). A step is taken to last as long as both together: nothing overlaps.
- Grouped matrix products are priced by their buffers, which are sized for the worst case where
  experts are on several devices and nothing is dropped, and not by the rows in use.
- Scatters are kept off the SparseCore in those two programs: the compiler has no price for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections import Counter
from typing import Any, NamedTuple

import jax

from mixtral_jax.analysis import topology
from mixtral_jax.analysis.collectives import read_collectives
from mixtral_jax.config import Config, InputError
from mixtral_jax.model.flops import training_flops_per_token
from mixtral_jax.training.placement import Placement
from mixtral_jax.training.step import abstract_train_state, kernels_of_step, make_train_step

# Of the programs that are priced. An asynchronous ragged-all-to-all cannot be printed as text.
PRICED_WITH = {
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
    "xla_tpu_enable_async_ragged_all_to_all": "false",
}


class Price(NamedTuple):
    """What one device does in a program."""

    flops: float
    compiler_seconds: float
    interconnect_seconds: float
    collectives: dict[str, dict[str, float]]
    """By kind: how many, and the bytes that a device sends."""

    def plus(self, other: Price, times: float = 1.0) -> Price:
        """self + times * other."""
        kinds = sorted(self.collectives.keys() | other.collectives.keys())
        nothing = {"count": 0, "bytes": 0}
        return Price(
            *(a + times * b for a, b in zip(self[:3], other[:3])),
            {
                kind: {
                    key: self.collectives.get(kind, nothing)[key]
                    + times * other.collectives.get(kind, nothing)[key]
                    for key in nothing
                }
                for kind in kinds
            },
        )


NOTHING = Price(0.0, 0.0, 0.0, {})


def compile_report(config: Config, name: str) -> dict[str, Any]:
    """The report of a config's training step on a slice, per chip and per step.

    Where the program does not fit, `fits` is false, memory is what the compiler says it would need,
    and everything that depends on a compiled program is None.

    Args:
      config: its mesh must have as many devices as the slice has chips.
      name: of the slice, such as v5p:4x4x4.
    Raises:
      InputError: for a slice or a mesh that cannot be, or if libtpu is not installed.
    """
    target = topology.get_slice(name)
    mesh = topology.make_mesh(config.mesh, target)
    with jax.set_mesh(mesh):
        kernels_of_step(config)
    training = config.training
    tokens = training.batch_size * training.sequence_length / mesh.size
    report = {
        **{"topology": name, "chips": mesh.size},
        **_memory(config, mesh, target),
        "tokens_per_chip": tokens,
        "model_flops": tokens * training_flops_per_token(config.model, training.sequence_length),
        **dict.fromkeys(("compiled_flops", "collectives", "compiler_seconds")),
        **dict.fromkeys(("interconnect_seconds", "estimated_step_seconds")),
        **dict.fromkeys(("estimated_tokens_per_second_per_chip", "estimated_mfu")),
    }
    if report["fits"]:
        report.update(_estimates(price(config, mesh, target), report, target))
    return report


def _estimates(priced: Price, report: dict[str, Any], target: topology.Slice) -> dict[str, Any]:
    seconds = priced.compiler_seconds + priced.interconnect_seconds
    return {
        "compiled_flops": priced.flops,
        "collectives": priced.collectives,
        "compiler_seconds": priced.compiler_seconds,
        "interconnect_seconds": priced.interconnect_seconds,
        "estimated_step_seconds": seconds,
        "estimated_tokens_per_second_per_chip": report["tokens_per_chip"] / seconds,
        "estimated_mfu": report["model_flops"] / seconds / target.peak_flops,
    }


def compile_step(
    config: Config, mesh: jax.sharding.Mesh, options: dict[str, str] | None = None
) -> jax.stages.Compiled:
    """The training step, compiled for the devices of a mesh, with options for the compiler."""
    abstract, batch = abstract_train_state(config, mesh), Placement(config, mesh).abstract()
    step = jax.jit(make_train_step(config), donate_argnums=0)
    with jax.set_mesh(mesh):
        return step.lower(abstract, batch).compile(compiler_options=options)


# ---- memory ------------------------------------------------------------------------------------


def _memory(config: Config, mesh: jax.sharding.Mesh, target: topology.Slice) -> dict[str, Any]:
    """`fits`, and `bytes_per_device` of the whole program."""
    limit = int(target.chip.hbm_bytes)
    try:
        memory = compile_step(config, mesh).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        held = _argument_bytes(config, mesh)
        wanted = needed_bytes(str(error))
        # Of temporaries alone, or of the whole program: the compiler says one or the other.
        temporaries = wanted if "temporaries" in str(error) else max(wanted - held, 0)
        parts = {"arguments": held, "temporaries": temporaries, "output": 0}
        return {
            "fits": False,
            "bytes_per_device": {**parts, "total": sum(parts.values()), "limit": limit},
        }
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    }
    return {
        "fits": True,
        "bytes_per_device": {**parts, "total": sum(parts.values()), "limit": limit},
    }


def needed_bytes(message: str) -> int:
    """What a program needs, from the compiler's complaint that it does not fit; 0 if it is mute."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    if not found:
        return 0
    return round(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1 if found[2] else 0))


def _argument_bytes(config: Config, mesh: jax.sharding.Mesh) -> int:
    """Bytes on one device of the state and of a batch."""
    trees = abstract_train_state(config, mesh), Placement(config, mesh).abstract()
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(trees)
    )


# ---- price -------------------------------------------------------------------------------------


def price(config: Config, mesh: jax.sharding.Mesh, target: topology.Slice) -> Price:
    """What one device does in a step: layers and microbatches counted as often as they run."""
    layers, steps = config.model.num_hidden_layers, config.training.gradient_accumulation
    one = price_of_layers(config, mesh, target, 1)
    if layers == 1:
        return NOTHING.plus(one, steps)
    added = price_of_layers(config, mesh, target, 2).plus(one, -1)
    return NOTHING.plus(one.plus(added, layers - 1), steps)


def price_of_layers(
    config: Config, mesh: jax.sharding.Mesh, target: topology.Slice, layers: int
) -> Price:
    """What one device does for one microbatch of a model with that many layers, none in a loop."""
    training = dataclasses.replace(
        config.training,
        batch_size=config.training.batch_size // config.training.gradient_accumulation,
        gradient_accumulation=1,
    )
    model = dataclasses.replace(config.model, num_hidden_layers=layers, scan_layers=False)
    config = dataclasses.replace(config, model=model, training=training)
    compiled = compile_step(config, mesh, PRICED_WITH)
    costs = compiled.cost_analysis()
    found = read_collectives(compiled.as_text(), mesh.size)
    counts, sent = Counter(), Counter()
    for one in found:
        counts[one.kind] += 1
        sent[one.kind] += one.sent_bytes
    return Price(
        flops=costs["flops"],
        compiler_seconds=costs["optimal_seconds"],
        interconnect_seconds=sum(one.seconds(target, mesh.devices.flat) for one in found),
        collectives={kind: {"count": counts[kind], "bytes": sent[kind]} for kind in counts},
    )


# ---- output ------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """A report as lines to read."""
    memory, gib = report["bytes_per_device"], 2**30
    rows = [
        ("slice", f"{report['topology']}, {report['chips']} chips; all below per chip and step"),
        ("fits", "yes" if report["fits"] else "NO"),
        *((f"memory, {name}", f"{memory[name] / gib:,.2f} GiB") for name in memory),
        ("tokens", f"{report['tokens_per_chip']:,.0f}"),
        ("model FLOPs", f"{report['model_flops'] / 1e12:,.4g} T"),
    ]
    if report["fits"]:
        ratio = report["compiled_flops"] / report["model_flops"]
        compiled = f"{report['compiled_flops'] / 1e12:,.4g} T, {ratio:.2f} times the model's"
        rows.append(("compiled FLOPs", compiled))
        rows += [
            (name, f"{found['count']:,.0f} times, {found['bytes'] / 1e9:,.4g} GB sent")
            for name, found in report["collectives"].items()
        ]
        rows += [
            ("compiler's estimate", f"{report['compiler_seconds']:,.4g} s"),
            ("interconnect, our model", f"{report['interconnect_seconds']:,.4g} s"),
            ("estimated step", f"{report['estimated_step_seconds']:,.4g} s, if nothing overlaps"),
            ("estimated tokens/s", f"{report['estimated_tokens_per_second_per_chip']:,.0f}"),
            ("estimated MFU", f"{report['estimated_mfu']:.1%}"),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def run(config: Config, name: str, path: str = "") -> int:
    """Print the report of a config's step on a slice, and write it to a JSON file if one is named.

    Returns:
      The exit code: 0, or 1 if the program does not fit.
    Raises:
      InputError: as compile_report, or if there is no folder for the file.
    """
    if path and not pathlib.Path(path).absolute().parent.is_dir():  # now, not minutes later
        raise InputError(f"--report {path}: there is no folder {pathlib.Path(path).parent}")
    report = compile_report(config, name)
    if path:
        pathlib.Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    return 0 if report["fits"] else 1
