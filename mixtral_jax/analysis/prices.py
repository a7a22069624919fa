"""The price of a training step: arithmetic, time and collectives, from compiled programs.

The compiler counts the body of a loop once however often it runs, so a step is priced by programs
with one and with two layers and no loop over them, and what the second layer adds is multiplied.
What a loop copies into stacks of all layers and out of them is priced apart, by two programs that
have one. Microbatches are counted likewise: as many steps of one microbatch, which counts the
optimizer with each of them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax

from mixtral_jax.analysis import topology
from mixtral_jax.analysis.collectives import read_collectives
from mixtral_jax.analysis.custom_calls import Cost, missing_seconds, read_calls, surplus, unpriced
from mixtral_jax.config import Config, ModelConfig
from mixtral_jax.data.packing import Batch
from mixtral_jax.model.moe import exchange_of
from mixtral_jax.training.placement import Placement
from mixtral_jax.training.step import TrainState, abstract_train_state, make_train_step

# Of the programs that are priced. The compiler has no price for what the SparseCore does, nor for
# an array fetched in slices. An asynchronous ragged-all-to-all cannot be printed as text.
PRICED_WITH = {
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
    "xla_tpu_sliced_prefetch_max_slices": "0",
    "xla_tpu_enable_async_ragged_all_to_all": "false",
}


class Price(NamedTuple):
    """What one device does in a program."""

    compiled: Cost
    """By the compiler: arithmetic, memory traffic and its estimate of the time."""
    surplus: Cost
    """Of that, what stands for rows of the experts' buffers that are not in use, and for experts
    that no row visits."""
    unpriced: Cost
    """What the compiler prices as nothing."""
    interconnect_seconds: float
    collectives: dict[str, dict[str, float]]
    """By kind: how many, and the bytes that a device sends."""
    loop_seconds: float = 0.0
    """What a loop over layers copies, by the compiler's estimate; in nothing above."""

    def plus(self, other: Price, times: float) -> Price:
        """self + times * other."""
        kinds = sorted(self.collectives.keys() | other.collectives.keys())
        nothing = {"count": 0, "bytes": 0}
        costs = (
            Cost(*(a + times * b for a, b in zip(mine, others)))
            for mine, others in zip(self[:3], other[:3])
        )
        return Price(
            *costs,
            self.interconnect_seconds + times * other.interconnect_seconds,
            {
                kind: {
                    key: self.collectives.get(kind, nothing)[key]
                    + times * other.collectives.get(kind, nothing)[key]
                    for key in nothing
                }
                for kind in kinds
            },
            self.loop_seconds + times * other.loop_seconds,
        )


FREE = Cost(0.0, 0.0, 0.0)
NOTHING = Price(FREE, FREE, FREE, 0.0, {})


def price(config: Config, mesh: jax.sharding.Mesh, target: topology.Slice) -> Price:
    """What one device does in a step: layers and microbatches counted as often as they run."""
    layers = config.model.num_hidden_layers
    of_layers = functools.cache(functools.partial(price_of_layers, config, mesh, target))
    once = extrapolate(of_layers, layers)
    if config.model.scan_layers and layers > 1:
        # A loop's body counts once, so programs with loops differ by what is done outside of them.
        two, three = (of_layers(some, looped=True).compiled.seconds for some in (2, 3))
        copies = two - (three - two) - of_layers(1).compiled.seconds
        once = once._replace(loop_seconds=layers * max(0.0, copies))
    return NOTHING.plus(once, config.training.gradient_accumulation)


def extrapolate(price_of_some: Callable[[int], Price], layers: int) -> Price:
    """The price of that many layers, from those of one and of two."""
    one = price_of_some(1)
    if layers == 1:
        return one
    return one.plus(price_of_some(2).plus(one, -1), layers - 1)


def price_of_layers(
    config: Config,
    mesh: jax.sharding.Mesh,
    target: topology.Slice,
    layers: int,
    looped: bool = False,
) -> Price:
    """What one device does for one microbatch of a model with that many layers; of those in a loop
    the compiler counts one."""
    training = dataclasses.replace(
        config.training,
        batch_size=config.training.batch_size // config.training.gradient_accumulation,
        gradient_accumulation=1,
    )
    model = dataclasses.replace(config.model, num_hidden_layers=layers, scan_layers=looped)
    config = dataclasses.replace(config, model=model, training=training)
    return price_of(
        compile_step(config, mesh, PRICED_WITH), mesh, target, rows_in_use(config, mesh)
    )


def price_of(
    compiled: jax.stages.Compiled,
    mesh: jax.sharding.Mesh,
    target: topology.Slice,
    share: float,
    visited: float | None = None,
) -> Price:
    """What one device does in a program.

    Args:
      compiled: with PRICED_WITH.
      share: of the rows of the experts' buffers, those in use.
      visited: as for custom_calls.surplus.
    """
    costs, text = compiled.cost_analysis(), compiled.as_text()
    found, calls = read_collectives(text, mesh.size), read_calls(text)
    counts, sent = Counter(), Counter()
    for one in found:
        counts[one.kind] += 1
        sent[one.kind] += one.sent_bytes
    seconds = costs["optimal_seconds"] + missing_seconds(text)
    return Price(
        Cost(costs["flops"], costs["bytes accessed"], seconds),
        surplus(calls, share, target.chip, visited),
        unpriced(calls, target.chip.peak_flops),
        sum(one.seconds(target, mesh.devices.flat) for one in found),
        {kind: {"count": counts[kind], "bytes": sent[kind]} for kind in counts},
    )


def rows_in_use(config: Config, mesh: jax.sharding.Mesh) -> float:
    """The share of the experts' buffers that balanced experts fill in training."""
    training = config.training
    rows = training.batch_size // training.gradient_accumulation // config.mesh.batch_shards
    return share_in_use(config.model, mesh, rows * training.sequence_length)


def share_in_use(model: ModelConfig, mesh: jax.sharding.Mesh, tokens: int) -> float:
    """The same, where each device has that many tokens."""
    with jax.set_mesh(mesh):
        buffer = exchange_of(model, tokens).receive_rows
    balanced = tokens * model.num_experts_per_tok * min(1.0, model.capacity_factor or 1.0)
    return min(1.0, balanced / buffer)


def compile_step(
    config: Config, mesh: jax.sharding.Mesh, options: dict[str, str] | None = None
) -> jax.stages.Compiled:
    """The training step, compiled for the devices of a mesh, with options for the compiler."""
    arguments = step_arguments(config, mesh)  # with no mesh set: they are made on this machine
    step = jax.jit(make_train_step(config), donate_argnums=0)
    with jax.set_mesh(mesh):
        return step.lower(*arguments).compile(compiler_options=options)


def step_arguments(config: Config, mesh: jax.sharding.Mesh) -> tuple[TrainState, Batch]:
    """Shapes, types and shardings of what a training step takes."""
    return abstract_train_state(config, mesh), Placement(config, mesh).abstract()
