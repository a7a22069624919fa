"""The meshes, batches and policies that a model may train with on a slice, by the cost model."""

from __future__ import annotations

import dataclasses
import itertools
import types
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from mixtral_jax.analysis.chips import SliceName
from mixtral_jax.analysis.cost_model import Estimate, estimate
from mixtral_jax.config import REMAT_POLICIES, Config, InputError, MeshConfig, check_mesh
from mixtral_jax.kernels.exchange import WITHOUT_RAGGED
from mixtral_jax.model.flops import training_flops_per_token

SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 36, 48, 64)
"""For each part that the batch is split into."""
ROOM = 0.95
"""Of a device's memory, what a plan may take by the cost model, whose error it must hold."""
RECEIVE_FACTOR = 1.25
"""Room for rows received that is tried beside that for the worst case."""
ANY_ROUTE = 16
"""Most chips of a slice on which those of WITHOUT_RAGGED have a ragged all-to-all, if asked for."""


class Plan(NamedTuple):
    """A config, and what it takes."""

    config: Config
    estimate: Estimate
    tokens_per_second: float
    """Of one chip."""
    mfu: float

    @property
    def key(self) -> tuple:
        """What plans are compared by: of those with the same, only the best is of interest."""
        model = self.config.model
        return self.config.mesh, model.exchange, model.receive_factor, model.param_dtype


class Choices(NamedTuple):
    """What to search beside the mesh."""

    param_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    batch_size: int | None = None
    """Sequences in a step, made of as many microbatches as it takes; None is free."""
    mesh: Mapping[str, int] = types.MappingProxyType({})
    """Axes that are to have this size."""
    model: Mapping[str, object] = types.MappingProxyType({})
    """Of remat, exchange and receive_factor, those that are to be this."""


def meshes(base: Config, target: SliceName, slices: int, choices: Choices) -> Iterator[MeshConfig]:
    """The meshes over all devices that the model's sizes and the slices split over."""
    devices = target.devices * slices
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    model = dataclasses.replace(base.model, exchange="")  # _exchanges knows which goes where
    for data, fsdp, expert in itertools.product(sizes, repeat=3):
        if devices % (data * fsdp * expert):
            continue
        mesh = MeshConfig(data, fsdp, expert, devices // (data * fsdp * expert))
        if not choices.mesh.items() <= vars(mesh).items():
            continue
        try:
            check_mesh(model, mesh)
        except InputError:
            continue
        if (mesh.data if mesh.data > 1 else mesh.fsdp) % slices == 0:
            yield mesh


def plans(base: Config, target: SliceName, slices: int, choices: Choices) -> list[Plan]:
    """The best plan for each mesh, exchange and type of weights, best first.

    Plans that do not fit are left out.
    """
    best: dict[tuple, Plan] = {}
    for mesh in meshes(base, target, slices, choices):
        for config in _configs(base, mesh, choices, target):
            plan = judge(config, target, slices)
            known = best.get(plan.key)
            if fits(plan, target) and (
                known is None or plan.tokens_per_second > known.tokens_per_second
            ):
                best[plan.key] = plan
    return sorted(best.values(), key=lambda plan: -plan.tokens_per_second)


def why_none(base: Config, target: SliceName, slices: int, choices: Choices) -> str:
    """Why there is no plan for {where}."""
    found = list(meshes(base, target, slices, choices))
    copies = all(mesh.size == mesh.data for mesh in found)  # of what does not fit one device
    if copies and target.devices * slices > 1:
        return "no mesh over the devices of {where} splits the model's sizes: use another slice"
    if not any(_batches(mesh.batch_shards, choices.batch_size) for mesh in found):
        shards = {mesh.batch_shards for mesh in found}
        least = sorted(n for n in shards if not any(n > m and n % m == 0 for m in shards))
        return (
            f"--batch-size {choices.batch_size} does not split over any mesh on {{where}}: use a "
            f"multiple of {' or '.join(map(str, least))}"
        )
    if not any(_exchanges(mesh, choices, target) for mesh in found):
        named, kind = choices.model["exchange"], target.chip.device_kind
        if all(mesh.expert == 1 for mesh in found):
            return "no mesh on {where} has experts to exchange between: leave model.exchange out"
        if named == "ragged":
            return (
                f"the compiler for {kind} refuses model.exchange=ragged on more than {ANY_ROUTE} "
                "chips: leave it out"
            )
        return (
            f"model.exchange={named} cannot reach experts on other devices: use padded or ragged, "
            "or mesh.expert=1"
        )
    return "nothing fits on {where}: use more chips"


def fits(plan: Plan, target: SliceName) -> bool:
    return plan.estimate.total_bytes <= ROOM * target.chip.hbm_bytes


def judge(config: Config, target: SliceName, slices: int) -> Plan:
    """What the cost model says of a config."""
    found, training, chip = estimate(config, target, slices), config.training, target.chip
    chips = target.devices * slices / chip.per_chip
    speed = training.batch_size * training.sequence_length / chips / found.step_seconds
    flops = training_flops_per_token(config.model, training.sequence_length)
    return Plan(config, found, speed, speed * flops / (chip.per_chip * chip.peak_flops))


def _configs(
    base: Config, mesh: MeshConfig, choices: Choices, target: SliceName
) -> Iterator[Config]:
    """The base on a mesh with every policy, exchange of the chip's, type and size of batch."""
    exchanges = _exchanges(mesh, choices, target)
    policies = [name for name in REMAT_POLICIES if name != "none" or base.model.remat == "none"]
    policies = [choices.model["remat"]] if "remat" in choices.model else policies
    for remat, (exchange, factor), dtype in itertools.product(
        policies, exchanges, choices.param_dtypes
    ):
        model = dataclasses.replace(
            base.model,
            remat=remat,
            exchange=exchange,
            receive_factor=factor,
            capacity_factor=None,
            param_dtype=dtype,
        )
        for batch, steps in _batches(mesh.batch_shards, choices.batch_size):
            training = dataclasses.replace(
                base.training, batch_size=batch, gradient_accumulation=steps
            )
            yield dataclasses.replace(base, model=model, mesh=mesh, training=training)


def _exchanges(mesh: MeshConfig, choices: Choices, target: SliceName) -> list[tuple]:
    """(exchange, receive_factor)."""
    named = choices.model.get("exchange")
    if mesh.expert == 1:
        return [("", None)] if named in (None, "", "local") else []
    without = target.chip.device_kind in WITHOUT_RAGGED
    names = ["padded"] + ["ragged"] * (not without)
    if named:
        far = without and target.devices > ANY_ROUTE
        names = [] if named == "local" or (named == "ragged" and far) else [named]
    if "receive_factor" in choices.model:
        return [(name, choices.model["receive_factor"]) for name in names]
    # The worst case in buckets of one size is more than is worth trying.
    return [(name, RECEIVE_FACTOR) for name in names] + [
        (name, None) for name in names if name == "ragged"
    ]


def _batches(shards: int, wanted: int | None) -> list[tuple[int, int]]:
    """(sequences in a step, microbatches)."""
    if wanted is None:
        return [(count * shards, 1) for count in SEQUENCES]
    if wanted % shards:
        return []
    return [(wanted, wanted // shards // n) for n in SEQUENCES if wanted // shards % n == 0]
