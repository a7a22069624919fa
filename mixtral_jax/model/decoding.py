"""The layers of a model for one token of each of a few sequences, on GPU: decoding.

What Block does, in eight kernels, where each device has the whole of every layer. Each costs time
for being there, beside that of reading the weights. Products come in parts, which the kernel that
takes the product adds up: a layer hands those of its experts on to the next.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import few_heads, few_norms, few_rows, few_tokens
from mixtral_jax.kernels.cached_attention import Cached
from mixtral_jax.model.cache import CacheUse, spec_of
from mixtral_jax.model.layers import rotary_angles
from mixtral_jax.model.moe import over_batch, runs_few
from mixtral_jax.model.router import RoutingStatistics, local_statistics, routing_of


class Layer(NamedTuple):
    """The parameters of a Block, whole on each device; all but the router in one type."""

    attention_norm_D: jax.Array
    wq_DKGH: jax.Array
    wk_DKH: jax.Array
    wv_DKH: jax.Array
    wo_KGHD: jax.Array
    moe_norm_D: jax.Array
    router_DE: jax.Array
    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array


class Tokens(NamedTuple):
    """What all layers know of the tokens."""

    positions_B: jax.Array
    real_B: jax.Array
    """False for those that are not there: nothing of them is cached, and no expert sees them."""
    cos_Bh: jax.Array
    sin_Bh: jax.Array


def fits(block, x_BLD: jax.Array, use: CacheUse) -> bool:
    """Whether `run` runs such a Block and others like it on such activations."""
    attention, moe, config, dtype = block.attention, block.moe, block.moe.config, x_BLD.dtype
    (batch, length, width), cache = x_BLD.shape, use.cache
    arrays = isinstance(attention.wq_DKGH, nnx.Param) and isinstance(moe.gate_EDF, nnx.Param)
    if cache is None or use.row_B is not None or length != 1 or not arrays:
        return False
    if sharding.tensor_shards() > 1 or isinstance(moe.gate_EDF.get_value(), tuple):
        return False
    tokens = batch // sharding.batch_shards()
    _, heads, groups, head = attention.wq_DKGH.get_value().shape
    return (
        few_norms.fits(tokens, width, config.num_local_experts, dtype)
        and few_rows.fits(tokens, dtype, width, heads * head)
        and few_heads.fits(groups, cache[0].k_BKSH, dtype)
        and runs_few(config, tokens, dtype)
    )


def run(layers, x_BLD: jax.Array, positions_BL: jax.Array, segments_BL: jax.Array, use: CacheUse):
    """(x_BLD, statistics of each layer, caches of the layers) after all Blocks of a list."""
    config, dtype = layers[0].moe.config, x_BLD.dtype
    angles_Bh = rotary_angles(positions_BL, config.head_size, config.rope_theta)[:, 0]
    real_B = (segments_BL > 0)[:, 0]
    tokens = Tokens(positions_BL[:, 0], real_B, jnp.cos(angles_Bh), jnp.sin(angles_Bh))
    graphdef, _ = nnx.split(layers[0])

    @jax.jit  # so that all layers but the first are traced as one
    def one_layer(state, x_BD, parts_PBD, cache):
        layer = _whole(nnx.merge(graphdef, state), dtype)
        return _on_each_device(config, layer, tokens, x_BD, parts_PBD, cache)

    x_BD, parts_PBD, statistics, written = x_BLD[:, 0], None, [], []
    for block, cache in zip(layers, use.cache, strict=True):
        x_BD, parts_PBD, cache, sums = one_layer(nnx.state(block), x_BD, parts_PBD, cache)
        statistics.append(sums)
        written.append(cache)
    x_BD += parts_PBD.sum(axis=0).astype(dtype)
    return x_BD[:, None], jax.tree.map(lambda *sums: jnp.stack(sums), *statistics), tuple(written)


def _whole(block, dtype: jnp.dtype) -> Layer:
    attention, moe = block.attention, block.moe
    params = (
        *(block.attention_norm.weight, attention.wq_DKGH, attention.wk_DKH, attention.wv_DKH),
        *(attention.wo_KGHD, block.moe_norm.weight, moe.router_DE),
        *(moe.gate_EDF, moe.up_EDF, moe.down_EFD),
    )
    arrays = (p[...] if p is moe.router_DE else p[...].astype(dtype) for p in params)
    return Layer(*(sharding.shard(a, *[None] * a.ndim) for a in arrays))


def _on_each_device(config: ModelConfig, layer: Layer, tokens, x_BD, parts_PBD, cache):
    """_layer of each device's part of the batch."""
    everywhere, batch, parts = (sharding.spec(*axes) for axes in ((), ("batch",), (None, "batch")))
    cached = spec_of(False)
    body = jax.shard_map(
        partial(_layer, config),
        in_specs=(everywhere, batch, batch, parts, cached),
        out_specs=(batch, parts, cached, everywhere),
        check_vma=False,
    )
    return body(layer, tokens, x_BD, parts_PBD, cache)


def _layer(
    config: ModelConfig,
    layer: Layer,
    tokens: Tokens,
    x_TD: jax.Array,
    parts_PTD: jax.Array | None,
    cache: Cached,
) -> tuple[jax.Array, jax.Array, Cached, RoutingStatistics]:
    """(x after the attention, float32 parts_PTD of what the experts add to it, cache, statistics).

    Args: x and what is to be added to it, as the layer before gives them.
    """
    eps = config.rms_norm_eps
    with jax.named_scope("attention"):
        x_TD, normed_TD = few_norms.add_norm(x_TD, parts_PTD, layer.attention_norm_D, eps)
        into = (w.reshape(w.shape[0], -1) for w in (layer.wq_DKGH, layer.wk_DKH, layer.wv_DKH))
        out_TKGH, k_TKSH, v_TKSH = few_heads.attention(
            few_rows.parts(normed_TD, tuple(into)),
            (tokens.cos_Bh, tokens.sin_Bh),
            (cache.k_BKSH, cache.v_BKSH),
            *(tokens.positions_B, tokens.real_B),
        )
        out_TF = out_TKGH.reshape(x_TD.shape[0], -1)
        (parts_PTD,) = few_rows.parts(out_TF, (layer.wo_KGHD.reshape(out_TF.shape[1], -1),))
    with jax.named_scope("moe"):
        x_TD, normed_TD, routed = few_norms.add_norm_route(
            *(x_TD, parts_PTD, layer.moe_norm_D, eps, layer.router_DE, tokens.real_B),
            config.num_experts_per_tok,
        )
        matrices = layer.gate_EDF, layer.up_EDF, layer.down_EFD
        with jax.named_scope("experts"):
            parts_PTD = few_tokens.parts(normed_TD, *matrices, routed.ids_TC, routed.weights_TC)
        routing = routing_of(routed.logits_TE, routed.ids_TC, routed.weights_TC)
        statistics = local_statistics(routing, tokens.real_B, jnp.int32(0))
    return x_TD, parts_PTD, Cached(k_TKSH, v_TKSH), over_batch(statistics)
