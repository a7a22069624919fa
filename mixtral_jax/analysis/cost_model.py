"""A training step's memory and time on a TPU slice by arithmetic alone: for searching.

Everything is of one device. What can be counted is counted: shapes, what each remat policy keeps,
which products it recomputes, what each collective sends. What cannot, the memory that a layer works
in and the traffic of what lies between the matrix products, are multiples of the arrays involved,
fitted to compile reports of Mixtral 8x7B on v5p:4x4x4 and v6e:16x16: PASSES and WORKING. Nothing
overlaps; rows are those of balanced experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from mixtral_jax.analysis import torus
from mixtral_jax.analysis.chips import Chip, SliceName
from mixtral_jax.analysis.custom_calls import ATTENTION_UTILISATION
from mixtral_jax.config import Config, ModelConfig
from mixtral_jax.kernels import exchange as exchanges
from mixtral_jax.kernels import megablox, splash
from mixtral_jax.model.remat import KEPT

EVERYTHING = KEPT["matmuls_rows"]
"""What `none` keeps of what has a name."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

PASSES = {
    **{"tokens": 48, "rows": 20, "hidden": 12, "exchanged": 110, "weights": 6, "logits": 6},
    **{"scores": 11, "scores again": 5},
}
"""How often a layer's training reads or writes a whole array, in memory traffic as the compiler
prices it: [tokens, D], [rows, D], [rows, F], [rows, D] once more if they are exchanged, the expert
matrices if they are gathered, and [heads, tokens, L] if attention holds its scores, again if they
are computed again; and the whole step [tokens, V]."""
KEPT_ROWS = {"rows": 4, "exchanged": 6}
"""How much less often where the rows that reach the experts are kept."""

WORKING = {"rows": 8, "hidden": 6, "weights": 1.3, "scores": 2, "logits": 2, "gradients": 2}
"""How many such arrays are live at once beside what is kept; gradients are float32, of all weights.
What is recomputed and not kept adds two more of its kind."""


class Estimate(NamedTuple):
    """Of one device and one step."""

    bytes: dict[str, float]
    """By purpose: state, gradients, kept, working."""
    flops: float
    """Of matrix products and attention, recomputation included."""
    seconds: dict[str, float]
    """arithmetic, memory, interconnect: they follow one another."""

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


class Sizes(NamedTuple):
    """What one device holds of the arrays of a microbatch."""

    tokens: int
    rows: int
    """(token, expert) pairs in use, of balanced experts."""
    buffer: int
    """Rows that it has room for."""
    exchanged: bool
    item: int
    """Bytes of a number that is computed with."""
    hidden: int
    """F over the tensor axis."""
    heads: float
    """Share of the attention heads, and of the vocabulary."""
    matrices: float
    """Numbers of a layer's expert matrices, gathered."""


def sizes_of(config: Config) -> Sizes:
    """Of a config that drops nothing for a capacity."""
    model, mesh, training = config.model, config.mesh, config.training
    sequences = training.batch_size // training.gradient_accumulation // mesh.batch_shards
    tokens = sequences * training.sequence_length
    exchange = exchanges.make(
        model.exchange or ("ragged" if mesh.expert > 1 else "local"),
        "",
        mesh.expert,
        tokens=tokens,
        experts=model.num_local_experts,
        per_token=model.num_experts_per_tok,
        receive_factor=model.receive_factor,
    )
    hidden = model.intermediate_size // mesh.tensor
    local = model.num_local_experts // mesh.expert
    return Sizes(
        tokens=tokens,
        rows=tokens * model.num_experts_per_tok,
        buffer=exchange.receive_rows,
        exchanged=mesh.expert > 1,
        item=DTYPE_BYTES[model.compute_dtype or "bfloat16"],
        hidden=hidden,
        heads=1 / mesh.tensor,
        matrices=3 * local * model.hidden_size * hidden,
    )


def estimate(config: Config, target: SliceName, slices: int) -> Estimate:
    """Memory, arithmetic and time of a config's training step."""
    sizes, steps = sizes_of(config), config.training.gradient_accumulation
    products, attention = _products(config, sizes), _attention_flops(config, sizes)
    chip, seconds = target.chip, _product_seconds(config, sizes, target.chip)
    if not holds_scores(config):  # products of scores in memory wait for it
        seconds += attention / (ATTENTION_UTILISATION * chip.peak_flops)
    return Estimate(
        bytes=_memory(config, sizes),
        flops=steps * (sum(products) + attention),
        seconds={
            "arithmetic": steps * seconds,
            "memory": _traffic(config, sizes, steps) / chip.priced_bytes,
            "interconnect": _interconnect(config, sizes, target, slices),
        },
    )


# ---- arithmetic --------------------------------------------------------------------------------


def _products(config: Config, sizes: Sizes) -> tuple[float, float]:
    """FLOPs of the products outside the experts, and of the experts, of one microbatch."""
    model, kept = config.model, KEPT.get(config.model.remat, ())
    width, head = model.hidden_size, model.head_size * sizes.heads
    again = float(model.remat != "none")
    into = 2 * width * head * (model.num_attention_heads + 2 * model.num_key_value_heads)
    out = 2 * width * head * model.num_attention_heads
    router = 2 * width * model.num_local_experts
    into *= 3 + again * ("attention_qkv" not in kept)
    out *= 3 + again * ("attention_out" not in kept)
    router *= 3 + again
    last = 3 * 2 * width * model.vocab_size * sizes.heads
    dense = sizes.tokens * (model.num_hidden_layers * (into + out + router) + last)
    expert = 2 * sizes.rows * width * sizes.hidden * (9 + recomputed_products(model))
    return dense, model.num_hidden_layers * expert


def recomputed_products(model: ModelConfig) -> int:
    """Of the experts' three, those that the backward pass computes again."""
    kept = KEPT.get(model.remat, EVERYTHING)
    return sum(name not in kept for name in ("expert_gate", "expert_up", "expert_out"))


def _product_seconds(config: Config, sizes: Sizes, chip: Chip) -> float:
    """Of the products of one microbatch: an expert's may wait for memory (megablox.py's tiles)."""
    dense, expert = _products(config, sizes)
    layers, width, rows = config.model.num_hidden_layers, config.model.hidden_size, sizes.rows
    local = config.model.num_local_experts // config.mesh.expert
    height, *tile = megablox.TILES_OF.get(chip.device_kind, megablox.TILES)
    matrix = width * sizes.hidden
    left = rows * width * math.ceil(sizes.hidden / tile[1])
    right = rows * sizes.hidden * math.ceil(width / tile[0])
    forward = sizes.item * (left + matrix * (rows / height + local) + rows * sizes.hidden)
    gradient = sizes.item * (left + right + local * matrix)
    one = expert / layers / (9 + recomputed_products(config.model)) / chip.priced_flops
    each = max(one, forward / chip.priced_bytes), max(one, gradient / chip.priced_bytes)
    experts = (6 + recomputed_products(config.model)) * each[0] + 3 * each[1]
    return dense / chip.priced_flops + layers * experts


def _attention_flops(config: Config, sizes: Sizes) -> float:
    """Of the products of scores and weights, causal where the kernel is splash."""
    model, length = config.model, config.training.sequence_length
    share, products = 1.0, 6 + 2 * (model.remat != "none")
    if not holds_scores(config):
        size, count = cut = splash.blocks(length)
        share = (count + 1) / (2 * count) * (count * size / length) ** 2
        kept = splash.KEPT in KEPT.get(model.remat, EVERYTHING)
        products = (7 if cut.fused else 9) + 2 * (not kept)
    heads = model.num_attention_heads * sizes.heads
    one = 2 * sizes.tokens * length * share * heads * model.head_size
    return model.num_hidden_layers * products * one


def holds_scores(config: Config) -> bool:
    """Whether attention is `xla`: asked for, or as the kernel does not fit."""
    fit = splash.fits(config.training.sequence_length, config.model.head_size)
    return config.model.attention == "xla" or not fit


def _scores(config: Config, sizes: Sizes) -> float:
    """Bytes of a layer's scores in float32, if attention holds them. More of those of a single
    sequence is fused: they count for three quarters."""
    if not holds_scores(config):
        return 0.0
    length, heads = config.training.sequence_length, config.model.num_attention_heads * sizes.heads
    return 4 * heads * sizes.tokens * length * (0.75 if sizes.tokens == length else 1)


# ---- memory ------------------------------------------------------------------------------------


def parameters(config: Config) -> float:
    """Parameters that one device holds; the few norms are on every device."""
    model, mesh = config.model, config.mesh
    everywhere = mesh.fsdp * mesh.expert * mesh.tensor
    norms = (2 * model.num_hidden_layers + 1) * model.hidden_size
    return (model.num_parameters - norms) / everywhere + norms


def kept_bytes(config: Config, sizes: Sizes) -> float:
    """What one layer's forward pass leaves for the backward pass."""
    model = config.model
    width, head = model.hidden_size, model.head_size * sizes.heads
    queries, keys = model.num_attention_heads, model.num_key_value_heads
    every = {
        "attention_qkv": sizes.tokens * head * (queries + 2 * keys) * sizes.item,
        "attention_kernel": sizes.tokens * queries * (head * sizes.item + 4 * sizes.heads),
        "attention_out": sizes.tokens * width * sizes.item,
        "routing": sizes.rows * 8,
        "expert_gate": sizes.buffer * sizes.hidden * sizes.item,
        "expert_up": sizes.buffer * sizes.hidden * sizes.item,
        "expert_out": sizes.rows * width * sizes.item,
        "expert_in": sizes.buffer * width * sizes.item,
    }
    if holds_scores(config):  # there is no kernel that leaves anything
        every[splash.KEPT] = 0.0
    layer_input = sizes.tokens * width * sizes.item
    if model.remat == "none":  # also both norms' inputs and outputs, sent rows and the activation
        scores = _scores(config, sizes) * (1 + sizes.item / 4)  # as they are multiplied too
        more = scores + 4 * sizes.tokens * width * 4 + sizes.buffer * width * sizes.item
        return layer_input + sum(every.values()) + every["expert_up"] + more
    names = every.keys() & set(KEPT[model.remat])  # others are of other platforms' kernels
    return layer_input + sum(every[name] for name in names)


def _memory(config: Config, sizes: Sizes) -> dict[str, float]:
    model, held = config.model, parameters(config)
    kept = KEPT.get(model.remat, EVERYTHING)
    again_hidden = sum(name not in kept for name in ("expert_gate", "expert_up"))
    again_rows = 2 * ("expert_out" not in kept)
    hidden = sizes.buffer * sizes.hidden * sizes.item * (WORKING["hidden"] + again_hidden)
    rows = sizes.buffer * model.hidden_size * sizes.item * (WORKING["rows"] + again_rows)
    weights = sizes.matrices * sizes.item * WORKING["weights"]
    logits = sizes.tokens * model.vocab_size * sizes.heads * 4 * WORKING["logits"]
    scores = _scores(config, sizes) * WORKING["scores"]
    accumulated = 4 * held * (config.training.gradient_accumulation > 1)
    return {
        "state": 3 * held * DTYPE_BYTES[model.param_dtype],
        "gradients": 4 * held * WORKING["gradients"] + accumulated,
        "kept": model.num_hidden_layers * kept_bytes(config, sizes),
        "working": max(hidden + rows + weights, logits, scores),
    }


def _traffic(config: Config, sizes: Sizes, steps: int) -> float:
    """Bytes that a step moves beside its matrix products."""
    model, mesh = config.model, config.mesh
    row = sizes.buffer * model.hidden_size * sizes.item
    again = model.remat != "none"
    less = "expert_in" in KEPT.get(model.remat, EVERYTHING)
    rows, exchanged = (PASSES[what] - KEPT_ROWS[what] * less for what in ("rows", "exchanged"))
    layer = (
        PASSES["tokens"] * sizes.tokens * model.hidden_size * sizes.item
        + (rows + exchanged * sizes.exchanged) * row
        + PASSES["hidden"] * sizes.buffer * sizes.hidden * sizes.item
        + PASSES["weights"] * sizes.matrices * sizes.item * (mesh.fsdp > 1)
        + (PASSES["scores"] + PASSES["scores again"] * again) * _scores(config, sizes)
    )
    logits = PASSES["logits"] * sizes.tokens * model.vocab_size * sizes.heads * 4
    update = parameters(config) * (6 * DTYPE_BYTES[model.param_dtype] + 4)
    return steps * (model.num_hidden_layers * layer + logits) + update


# ---- interconnect ------------------------------------------------------------------------------


def _interconnect(config: Config, sizes: Sizes, target: SliceName, slices: int) -> float:
    """Time on the links: gathers, exchanges, sums over copies and over parts of a product."""
    model, mesh, chip = config.model, config.mesh, target.chip
    steps, layers = config.training.gradient_accumulation, model.num_hidden_layers
    across_data = slices if mesh.data > 1 else 1
    data, fsdp = mesh.data // across_data, mesh.fsdp * across_data // slices
    links = torus.lay_out(target, (data, fsdp, mesh.expert, mesh.tensor))
    experts = sizes.matrices * sizes.item
    attention = model.head_size * (model.num_attention_heads + model.num_key_value_heads)
    dense = 2 * model.hidden_size * attention * sizes.heads * sizes.item
    ends = 2 * model.vocab_size * model.hidden_size * sizes.heads * sizes.item
    both = fsdp * mesh.expert
    # Where fsdp spans slices, gradients are summed whole within each before they cross.
    passes = 4 if slices > across_data else 3
    gather = passes * torus.staged_gather_seconds(experts, fsdp, links[1], chip)
    gather += passes * torus.gather_seconds(dense, both, links[1] + links[2], chip)
    exchange = 0.0
    if sizes.exchanged:
        sent = sizes.rows if model.exchange != "padded" else sizes.buffer
        kept = KEPT.get(model.remat, EVERYTHING)
        times = 4 + ("expert_in" not in kept) + ("expert_out" not in kept)
        sent *= model.hidden_size * sizes.item
        exchange = times * torus.all_to_all_seconds(sent, links[2], chip)
    times = 4 + 2 * (model.remat != "none")
    summed = 2 * times * sizes.tokens * model.hidden_size * sizes.item
    parts = torus.gather_seconds(summed, mesh.tensor, links[3], chip)
    step = layers * (gather + exchange + parts)
    step += 2 * torus.gather_seconds(ends, both, links[1] + links[2], chip)
    held = parameters(config) * sizes.item
    copies = 2 * torus.gather_seconds(held, data, links[0], chip)
    network = torus.network_seconds(held, across_data, chip)
    network += 3 * torus.network_gather_seconds(held, slices // across_data, chip)
    return steps * (step + copies + network)
