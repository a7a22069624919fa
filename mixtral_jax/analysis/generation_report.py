"""What prefill and decode take on a TPU slice, from its compiler alone.

The two programs of generation/programs.py for one batch whose prompts are all of one length, priced
as a training step is (compile_report.py): parts of prompts on each device that the batch is split
over, at most --part tokens of each, and a decoding step of all sequences. A part is priced as the
last of its prompt, which attends to the whole cache. Beside the estimate of a
decoding step stands its limit: the time that reading what it must read takes at the chip's memory
bandwidth, namely a device's share of the weights, of the experts those that the batch visits if it
visits them at random, and its share of the cache. Weights and cache may be int8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from mixtral_jax import config_io, sharding
from mixtral_jax.analysis import prices, topology
from mixtral_jax.analysis.compile_report import aligned, check_kernels, estimates
from mixtral_jax.analysis.memory import bytes_of, memory_of
from mixtral_jax.analysis.report_file import check_path, show
from mixtral_jax.config import Config, InputError, ModelConfig
from mixtral_jax.generation.engine import PART
from mixtral_jax.generation.programs import ENDS, Lanes, RowOptions, empty, functions
from mixtral_jax.generation.rows import context_for, lanes_of, length_of
from mixtral_jax.generation.sampling import Parameters
from mixtral_jax.interop import folders, quantizing
from mixtral_jax.kernels import cached_attention
from mixtral_jax.model.cache import places
from mixtral_jax.model.flops import experts_visited
from mixtral_jax.model.mixtral import Mixtral, abstract_state, chosen_kernels
from mixtral_jax.model.unstacked import in_layers, whole_fits


class Batch(NamedTuple):
    """What is generated."""

    sequences: int
    prompt_length: int
    max_new_tokens: int
    part: int = PART
    """Most tokens of a prompt that are run at a time."""
    weights: str | None = None
    """int8, or None: what the config says."""
    cache_dtype: str | None = None
    """int8, or None: what is computed in."""

    @property
    def length(self) -> int:
        """Tokens of the part that prefill runs: a power of two, as the engine has them."""
        return length_of(min(self.prompt_length, self.part))

    def lanes(self, shards: int) -> int:
        """Prompts that a device runs a part of at a time, where all of them come at once."""
        return lanes_of(self.length, self.part, self.sequences // shards)


def read_config(path: str, overrides: Sequence[str]) -> Config:
    """The model and the mesh of a YAML config, whatever it says of training and data.

    `model.grouped_matmul` is that of the overrides: the config's was chosen for training.

    Raises:
      InputError: with one line that names the value and what was expected.
    """
    given = config_io.apply_overrides({}, overrides).get("model", {})
    if "attention" in given:
        raise InputError(
            f"model.attention={given['attention']} does not matter when sampling, which attends to "
            "a cache: leave it out"
        )
    values = config_io.apply_overrides(config_io.read_yaml(path), overrides)
    values = config_io.with_sizes(values, folders.training_sizes)
    devices = config_io.section_from_dict("mesh", values.get("mesh")).size
    training = {"sequence_length": 1, "batch_size": devices}  # that splits over any mesh
    shown = {name: values.get(name) for name in ("model", "mesh")}
    # Of the other sections only the names are looked at.
    config = config_io.from_dict({**dict.fromkeys(values), **shown, "training": training})
    if "grouped_matmul" in given:
        return config
    return dataclasses.replace(config, model=dataclasses.replace(config.model, grouped_matmul=""))


def _served(model: ModelConfig) -> ModelConfig:
    """The model as it is sampled, with the grouped product that was asked for."""
    return dataclasses.replace(model.dropless(), grouped_matmul=model.grouped_matmul)


class Program(NamedTuple):
    """A program and what it takes; compile it with the mesh set."""

    function: Any
    arguments: tuple
    options: dict[str, int]

    def compile(self, mesh, options=None) -> jax.stages.Compiled:
        with jax.set_mesh(mesh):
            lowered = self.function.lower(*self.arguments, **self.options)
            return lowered.compile(compiler_options=options)


def shapes_of(model: ModelConfig, batch: Batch) -> Mixtral:
    """The model with shapes for its parameters, in the type that they are to have."""
    abstract = quantizing.abstract_state if batch.weights else abstract_state
    return nnx.merge(*abstract(model))


def two_programs(
    model: ModelConfig, mesh: jax.sharding.Mesh, batch: Batch, whole: bool
) -> dict[str, Program]:
    """`prefill` and `decode` for a batch on a mesh.

    Args: whole: as for model.unstacked.in_layers.
    """
    graphdef, state = nnx.split(in_layers(shapes_of(model, batch), whole=whole))
    params = sharding.placed_shapes(state, mesh)
    rows, lanes, alive = abstract_inputs(mesh, batch)
    context = context_for(batch.prompt_length + batch.max_new_tokens)
    size = places(min(context, model.max_position_embeddings))
    with jax.set_mesh(mesh):
        shapes = nnx.merge(graphdef, state)
        progress = jax.eval_shape(lambda: empty(shapes, batch.sequences, size, batch.cache_dtype))
    progress = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(
            a.shape, a.dtype, sharding=NamedSharding(mesh, a.sharding.spec)
        ),
        progress,
    )
    made = functions(partial(nnx.merge, graphdef))
    return {
        "prefill": Program(made["extend"], (params, progress, rows, lanes), {}),
        "decode": Program(made["decode"], (params, progress, rows, alive), {}),
    }


def abstract_inputs(
    mesh: jax.sharding.Mesh, batch: Batch
) -> tuple[RowOptions, Lanes, jax.ShapeDtypeStruct]:
    """Shapes of (rows, lanes, alive_B), a row for each sequence."""
    sequences = batch.sequences
    with jax.set_mesh(mesh):
        shards = sharding.batch_shards()

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.on(mesh, "batch"))

    whole, real = (array(dtype, sequences) for dtype in (jnp.int32, jnp.float32))
    parameters = Parameters(real, whole, *[real] * 5)
    wanted = array(bool, sequences)
    ends = array(jnp.int32, sequences, ENDS)
    rows = RowOptions(array(jnp.uint32, sequences), whole, ends, wanted, parameters)
    lanes = shards * batch.lanes(shards)
    tokens, one = array(jnp.int32, lanes, batch.length), array(jnp.int32, lanes)
    return rows, Lanes(tokens, tokens, one, one, one, array(bool, lanes)), wanted


def generation_report(
    config: Config, name: str, batch: Batch, slices: int
) -> dict[str, dict[str, Any]]:
    """The reports of prefill and decode, per chip; `estimated_step_seconds` is of one run of each.

    Raises:
      InputError: for a slice, mesh or batch that cannot be, or if its compiler is not installed.
    """
    target = topology.get_target(name, slices)
    mesh, model = topology.make_mesh(config.mesh, target), _served(config.model)
    _check(config, batch)
    with jax.set_mesh(mesh):
        check_kernels(chosen_kernels(model, batch.sequences, batch.length), target.priced)
    whole = whole_fits(shapes_of(model, batch), mesh, target.limit)
    programs = two_programs(model, mesh, batch, whole)
    report = {"topology": target.name, "chips": target.chips, **batch._asdict()}
    where = "whole along expert" if whole else "split over expert"
    report["outside_experts"] = where if config.mesh.expert > 1 else None
    for kind, program in programs.items():
        found = memory_of(partial(program.compile, mesh), program.arguments, target.limit)
        if found["fits"] and target.priced:
            found.update(_estimates(kind, config, mesh, target, batch, whole))
        report[kind] = found
    read = read_bytes(config, batch, programs["decode"])
    seconds = read / target.chip.hbm_bytes_per_second
    report["decode"] |= {
        "limit_bytes": read,
        "limit_seconds": seconds,
        "limit_tokens_per_second_per_chip": batch.sequences / target.chips / seconds,
    }
    return report


def _estimates(
    kind: str,
    config: Config,
    mesh: jax.sharding.Mesh,
    target: topology.Slice,
    batch: Batch,
    whole: bool,
) -> dict[str, Any]:
    """What a report says of a program's price, or why it has none."""
    try:
        found = estimates(price_of(kind, config, mesh, target, batch, whole), target)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = "to be priced, scores with the whole cache are made at once, which does not fit"
        figures = "estimated_step_seconds", "estimated_tokens_per_second_per_chip"
        return {**dict.fromkeys(figures), "not_estimated": reason}
    tokens, shards = batch.sequences, config.mesh.batch_shards
    if kind == "prefill":
        tokens = shards * batch.lanes(shards) * batch.length
    speed = tokens / target.chips / found["estimated_step_seconds"]
    return {**found, "estimated_tokens_per_second_per_chip": speed}


def price_of(
    kind: str,
    config: Config,
    mesh: jax.sharding.Mesh,
    target: topology.Slice,
    batch: Batch,
    whole: bool,
) -> prices.Price:
    """The price of one run of `prefill` or of `decode`."""
    model = _served(config.model)
    tokens = batch.sequences // config.mesh.batch_shards
    if kind == "prefill":
        tokens = batch.lanes(config.mesh.batch_shards) * batch.length
    share = prices.share_in_use(model, mesh, tokens)
    visited = visited_share(config, batch) if kind == "decode" else None

    def of_layers(layers: int) -> prices.Price:
        few = dataclasses.replace(model, num_hidden_layers=layers, scan_layers=False)
        with cached_attention.whole():
            compiled = two_programs(few, mesh, batch, whole)[kind].compile(mesh, prices.PRICED_WITH)
        return prices.price_of(compiled, mesh, target, share, visited)

    return prices.extrapolate(of_layers, model.num_hidden_layers)


def _check(config: Config, batch: Batch) -> None:
    for name in ("sequences", "prompt_length", "max_new_tokens"):
        if (value := getattr(batch, name)) < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if batch.sequences % config.mesh.batch_shards:
        raise InputError(
            f"--sequences {batch.sequences} do not split over mesh.data * mesh.fsdp * mesh.expert "
            f"= {config.mesh.batch_shards}"
        )
    context = config.model.max_position_embeddings
    if batch.prompt_length + batch.max_new_tokens > context:
        raise InputError(
            f"--prompt-length {batch.prompt_length} and --max-new-tokens {batch.max_new_tokens} "
            f"go beyond model.max_position_embeddings={context}"
        )


def visited_share(config: Config, batch: Batch) -> float:
    """Of the experts, those that a decoding step visits, if it visits them at random."""
    model, mesh = config.model, config.mesh
    # A copy of the experts serves the sequences of its own devices.
    visited = experts_visited(model, batch.sequences / (mesh.data * mesh.fsdp))
    return visited / model.num_local_experts


def read_bytes(config: Config, batch: Batch, decode: Program) -> float:
    """What one device must read for a decoding step, of weights and of its cache."""
    params, progress = decode.arguments[:2]
    share = visited_share(config, batch)
    read = bytes_of(progress.cache)
    for path, param in nnx.to_flat_state(params):
        if path[0] != "embedding_VD":  # of which it reads a few rows
            of_experts = param.get_metadata("logical_axes")[0] == "experts"
            read += bytes_of(param) * (share if of_experts else 1)
    return read


# ---- output ------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """A report as lines to read."""
    gib = 2**30
    rows = [
        ("compiled for", f"{report['topology']}, {report['chips']} chips"),
        ("figures", "memory of a device, all else per chip"),
        (
            "batch",
            f"{report['sequences']} prompts of {report['prompt_length']} tokens in parts of "
            f"{report['part']}, {report['max_new_tokens']} new ones each",
        ),
    ]
    told = {"weights": "weights", "outside the experts": "outside_experts", "cache": "cache_dtype"}
    rows += [(name, report[key]) for name, key in told.items() if report[key]]
    for kind in ("prefill", "decode"):
        found = report[kind]
        memory = found["bytes_per_device"]
        fits = "fits" if found["fits"] else "does NOT fit"
        rows.append(
            (kind, f"{memory['total'] / gib:,.2f} of {memory['limit'] / gib:,.2f} GiB: {fits}")
        )
        if "not_estimated" in found:
            rows.append(("  no estimates", found["not_estimated"]))
        elif "estimated_step_seconds" in found:
            rows += _estimate_rows(found, "of the last part" if kind == "prefill" else "")
    limit = report["decode"]
    rows += [
        ("  limit: reading", f"{limit['limit_bytes'] / 1e9:,.4g} GB"),
        ("  limit: step", f"{limit['limit_seconds']:,.4g} s"),
        ("  limit: tokens/s", f"{limit['limit_tokens_per_second_per_chip']:,.4g}"),
    ]
    return aligned(rows)


def _estimate_rows(found: dict[str, Any], of_what: str) -> list[tuple[str, str]]:
    names = {
        "arithmetic at peak": "arithmetic_seconds",
        "memory traffic at peak": "memory_seconds",
        "interconnect, our model": "interconnect_seconds",
        "compiler's estimate": "compiler_seconds",
        "  of the rows in use": "compiler_seconds_expected_rows",
        "step, if nothing overlaps": "estimated_step_seconds",
    }
    rows = [(f"  {name}", f"{found[key]:,.4g} s") for name, key in names.items()]
    speed = f"{found['estimated_tokens_per_second_per_chip']:,.4g}"
    return [*rows, ("  tokens/s", f"{speed} {of_what}".rstrip())]


def run(config: Config, name: str, batch: Batch, path: str, slices: int) -> int:
    """Print the report of generation on a slice, and write it to a JSON file if one is named.

    Returns:
      The exit code: 0, or 1 if prefill or decode does not fit.
    Raises:
      InputError: as generation_report, or if the file cannot be written.
    """
    check_path(path)
    report = generation_report(config, name, batch, slices)
    show(report, path, table(report))
    return 0 if report["prefill"]["fits"] and report["decode"]["fits"] else 1
