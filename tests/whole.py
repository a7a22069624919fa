"""A whole Mixtral of odd sizes: compiled on a mesh, and the same from the oracle."""

import contextlib
import functools

import jax
import numpy as np
import oracle
from emulation import ragged_on_cpu
from flax import nnx
from harness import place, plain, random_parameters

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.mixtral import abstract_state
from mixtral_jax.model.router import RoutingStatistics
from mixtral_jax.training import losses as terms

B, L = 8, 7
SIZES = {
    "vocab_size": 38,
    "hidden_size": 24,
    "intermediate_size": 10,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4 + 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_theta": 50.0,
    "max_position_embeddings": 16,
}
KERNEL_SIZES = {
    "vocab_size": 640,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
"""Small ones that the kernels of a GPU take."""
WEIGHTS = {"load_balance_weight": 0.3, "router_z_weight": 0.1, "z_weight": 0.05}


def make_config(**changes):
    return ModelConfig(**{**SIZES, **changes})


def parameters(config, seed=0):
    return random_parameters(abstract_state(config)[1], seed)


def make_batch(seed=0, rows=B, length=L):
    """tokens, targets, positions, segments: two documents a row, then perhaps padding."""
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(SIZES["vocab_size"], size=(2, rows, length), dtype=np.int32)
    at = np.arange(length)
    cut = rng.integers(1, length - 2, size=(rows, 1))
    end = length - rng.integers(0, 3, size=(rows, 1))
    segments = np.where(at < cut, 1, np.where(at < end, 2, 0)).astype(np.int32)
    positions = np.where(at < cut, at, at - cut).astype(np.int32)
    return tokens, targets, positions, segments


def loss_of(graphdef, params, tokens_BL, targets_BL, positions_BL, segments_BL):
    """The training loss, with all its terms switched on; and the forward pass's outputs."""
    out = nnx.merge(graphdef, params).forward(tokens_BL, positions_BL, segments_BL)
    sums = terms.token_sums(out.logits_BLV, targets_BL, segments_BL > 0)
    parts = terms.losses(sums, out.statistics, sums.tokens, **WEIGHTS)
    return parts.total, (parts, out.logits_BLV, out.statistics)


@functools.cache
def compiled(mesh_sizes, **changes):
    """(parameters, batch) -> losses, logits, statistics and gradients."""
    mesh, config = sharding.make_mesh(*mesh_sizes), make_config(**changes)
    graphdef, _ = abstract_state(config)
    scalar = functools.partial(loss_of, graphdef)
    gradient = jax.jit(jax.value_and_grad(scalar, has_aux=True))

    def call(params, batch):
        ragged = ragged_on_cpu() if config.exchange == "ragged" else contextlib.nullcontext()
        with jax.set_mesh(mesh), ragged:
            (_, outputs), gradients = gradient(*place((params, *batch), mesh))
            return plain((*outputs, gradients))

    return call


def oracle_loss(p, tokens_BL, targets_BL, positions_BL, segments_BL, config):
    logits, statistics = oracle.mixtral(p, tokens_BL, positions_BL, segments_BL, config)
    cross_entropy, balance, router_z, z = oracle.losses(
        logits, statistics, targets_BL, segments_BL > 0
    )
    total = cross_entropy + 0.3 * balance + 0.1 * router_z + 0.05 * z
    return total, ((total, cross_entropy, balance, router_z, z), logits, statistics)


@functools.cache
def expected(seed=0):
    """What `compiled` gives for parameters(config, seed) and make_batch(seed)."""
    config = make_config()
    p = jax.tree.map(np.float64, nnx.to_pure_dict(parameters(config, seed)))
    batch = make_batch(seed)
    _, (parts, logits, statistics) = oracle_loss(p, *batch, config)
    gradient = oracle.gradient(lambda p, *batch: oracle_loss(p, *batch, config)[0], 0)
    gradients = gradient(p, *batch)
    return terms.Losses(*parts), logits, RoutingStatistics(*statistics), gradients
