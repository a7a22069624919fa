"""The network: blocks, the scan over them, and initialisation straight onto a mesh."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.config import InputError, MeshConfig, ModelConfig, check_mesh
from mixtral_jax.kernels import bits, platform
from mixtral_jax.kernels.attention import resolve
from mixtral_jax.model import decoding, inputs, remat
from mixtral_jax.model.attention import Attention
from mixtral_jax.model.cache import Cached, CacheUse, make_cache
from mixtral_jax.model.int8 import Int8Param
from mixtral_jax.model.int8 import columns as int8_columns
from mixtral_jax.model.layers import (
    RMSNorm,
    columns,
    logits_of_transposed,
    matrix,
    product,
    rows_that_travel,
)
from mixtral_jax.model.moe import MoE, exchange_of, grouped_matmul_of
from mixtral_jax.model.router import RoutingStatistics

SENT_TIMES = 3
"""How often a device sends a row of the embedding that travels, at most: over the axis that splits
the vocabulary as a sum, which is twice, and over those that split the model dimension."""


class Forward(NamedTuple):
    """What one pass gives."""

    logits_BLV: jax.Array
    """float32."""
    statistics: RoutingStatistics
    """Of every layer: a layer dimension in front."""
    cache: Cached | tuple[Cached, ...] | None
    """Of all layers: stacked as they are, or one after another."""


class Block(nnx.Module):
    """Pre-norm: h = x + attention(norm(x)); out = h + moe(norm(h))."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        attention_key, moe_key = jax.random.split(key)
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, config.param_dtype)
        self.attention_norm = norm()
        self.attention = Attention(config, attention_key)
        self.moe_norm = norm()
        self.moe = MoE(config, moe_key)

    def __call__(self, x_BLD, positions_BL, segments_BL, use: CacheUse | None):
        with jax.named_scope("attention"):
            out_BLD, use = self.attention(
                self.attention_norm(x_BLD), positions_BL, segments_BL, use
            )
            x_BLD = x_BLD + out_BLD
        with jax.named_scope("moe"):
            out_BLD, statistics = self.moe(self.moe_norm(x_BLD), segments_BL > 0)
        return x_BLD + out_BLD, statistics, use

    def chosen_experts(self, x_BLD, positions_BL, segments_BL) -> jax.Array:
        """ids_BLC, of the experts that __call__ would send each token to."""
        out_BLD, _ = self.attention(self.attention_norm(x_BLD), positions_BL, segments_BL)
        return self.moe.chosen(self.moe_norm(x_BLD + out_BLD), segments_BL > 0)


def _stacked_blocks(config: ModelConfig, key: jax.Array) -> Block:
    """One Block whose parameters have a leading layer dimension."""

    def make(layer_key):
        return nnx.split(Block(config, layer_key))

    graphdef, _ = nnx.eval_shape(lambda: make(key))
    # One layer after another: its random numbers in float32 are all that is held beside the state.
    state = jax.lax.map(lambda k: make(k)[1], jax.random.split(key, config.num_hidden_layers))
    for _, param in nnx.to_flat_state(state):
        param.set_metadata(logical_axes=("layers", *param.get_metadata("logical_axes")))
    return nnx.merge(graphdef, state)


class Mixtral(nnx.Module):
    """Decoder-only transformer with sparse experts. Paper: arXiv 2401.04088.

    Calling it gives logits. `forward`, which gives more, runs inside `with jax.set_mesh(mesh):`
    and wants a batch that splits over the mesh's data, fsdp and expert axes. `layers` is one Block
    with stacked parameters, or, after `unstacked.unstacked`, a list of Blocks; then `head_VD`
    stands for head_DV. After `quantized.quantized` an Int8Param stands for each large matrix.
    """

    head_VD: nnx.Param | None = None

    def __init__(self, config: ModelConfig, key: jax.Array):
        embed_key, layers_key, head_key = jax.random.split(key, 3)
        make = partial(matrix, scale=config.initializer_range, dtype=config.param_dtype)
        size = (config.vocab_size, config.hidden_size)
        self.embedding_VD = make(embed_key, size, ("vocabulary", "model"))
        self.layers = _stacked_blocks(config, layers_key)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.param_dtype)
        self.head_DV = make(head_key, size[::-1], ("model", "vocabulary"))
        self.config = config

    def __call__(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
    ) -> jax.Array:
        """float32 logits_BLV of the token after each.

        Arguments as for `forward`, of any batch size, from the host or from any device: they are
        split over the mesh that is set, or, where none is, over the one that the parameters lie on.
        The logits may lie split over it, too: np.asarray brings them to the host, and indexing a
        dimension that is split wants jax.sharding.reshard first.

        Raises:
          InputError: for what is no batch of ids of this vocabulary, or positions that begin again
            within a row without segments.
        """
        inputs.check(tokens_BL, positions_BL, segments_BL, self.config.vocab_size)
        graphdef, state = nnx.split(self)
        with sharding.mesh_of(self.embedding_VD[...]):
            return _logits(graphdef, state, tokens_BL, positions_BL, segments_BL)

    def forward(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array | None = None,
        segments_BL: jax.Array | None = None,
        cache: Cached | tuple[Cached, ...] | None = None,
        logits_at_B: jax.Array | None = None,
        row_B: jax.Array | None = None,
    ) -> Forward:
        """One pass.

        Args:
          tokens_BL: int32 ids.
          positions_BL: place of each token in its document; default 0, 1, 2, ...
          segments_BL: number of each token's document, from 1; 0 is padding. Attention stays
            within a document. Default: one document a row, so positions may not begin again.
          cache: keys and values so far, written to at positions_BL where segments_BL are not 0;
            from `empty_cache`. Then attention goes to all that a row holds up to each position.
          logits_at_B: if given, compute logits only at this index of each row (L becomes 1).
          row_B: if given, the row of the cache that each row of the batch is about, counted on
            its device; no two the same there, but for rows without a token.
        """
        if positions_BL is None:
            positions_BL = jnp.zeros_like(tokens_BL) + jnp.arange(tokens_BL.shape[1])[None]
        if segments_BL is None:
            segments_BL = jnp.ones_like(tokens_BL)
        x_BLD = self._embed(tokens_BL, cache is not None)
        use = CacheUse(cache, None, row_B, positions_BL, segments_BL > 0)
        if isinstance(self.layers, Block):
            run = self._run_layers
        elif decoding.fits(self.layers[0], x_BLD, use):
            run = partial(decoding.run, self.layers)
        else:
            run = self._run_list
        x_BLD, statistics, cache = run(x_BLD, positions_BL, segments_BL, use)
        if logits_at_B is not None:
            here_BL = jnp.arange(x_BLD.shape[1])[None] == logits_at_B[:, None]
            x_BLD = jnp.where(here_BL[..., None], x_BLD, 0).sum(axis=1, keepdims=True)
        with jax.named_scope("head"):
            logits_BLV = self._logits(self.norm(x_BLD))
        return Forward(logits_BLV, statistics, cache)

    def empty_cache(
        self, batch: int, places: int, dtype: jnp.dtype | None = None
    ) -> Cached | tuple[Cached, ...]:
        """A cache for `batch` sequences of up to `places` tokens, as `forward` wants it.

        Args:
          dtype: what is computed in, by default; or int8, with a scale for each key and value.
        """
        stacked = isinstance(self.layers, Block)
        return make_cache(self.config, batch, places, dtype or compute_dtype(self.config), stacked)

    def chosen_experts(self, tokens_BL, segments_BL, layer: int) -> jax.Array:
        """ids_BLC of the experts of one layer (from 0) that each token goes to, best first.

        Args: as for `forward`, one document a row.
        """
        positions_BL = jnp.zeros_like(tokens_BL) + jnp.arange(tokens_BL.shape[1])[None]
        x_BLD = self._embed(tokens_BL)
        for number in range(layer):
            x_BLD, _, _ = self._layer(number)(x_BLD, positions_BL, segments_BL, None)
        return self._layer(layer).chosen_experts(x_BLD, positions_BL, segments_BL)

    def _layer(self, number: int) -> Block:
        if not isinstance(self.layers, Block):
            return self.layers[number]
        graphdef, stacked = nnx.split(self.layers)
        return nnx.merge(graphdef, jax.tree.map(lambda a: a[number], stacked))

    def _embed(self, tokens_BL, cached: bool = False):
        dtype, table_VD = compute_dtype(self.config), self.embedding_VD[...]
        few = tokens_BL.size // sharding.batch_shards() * SENT_TIMES < table_VD.shape[0]
        if cached and few and any(jax.typeof(table_VD).sharding.spec):
            tokens_BL = sharding.shard(tokens_BL, "batch", None)
            return rows_that_travel(table_VD, tokens_BL).astype(dtype)
        if platform() != "cpu":  # less to gather; XLA:CPU takes rows in float32 alone
            table_VD = table_VD.astype(dtype)
        table_VD = sharding.shard(table_VD, None, None)
        rows_BLD = table_VD.at[tokens_BL].get(out_sharding=sharding.spec("batch", None, None))
        return rows_BLD.astype(dtype)

    def _logits(self, x_BLD):
        if self.head_VD is not None:
            head_VD = sharding.shard(self.head_VD[...].astype(x_BLD.dtype), "vocabulary", None)
            return logits_of_transposed(x_BLD, head_VD)
        if isinstance(self.head_DV, Int8Param):
            return int8_columns(x_BLD, self.head_DV, "vocabulary", jnp.float32)
        if self.head_DV[...].dtype == bits.BITS:
            times = partial(bits.products, dtype=jnp.float32)
            return columns(x_BLD, [self.head_DV[...]], "vocabulary", times)[0]
        head_DV = sharding.shard(self.head_DV[...].astype(x_BLD.dtype), None, "vocabulary")
        return product(x_BLD, head_DV, 1, jnp.float32)

    def _run_layers(self, x_BLD, positions_BL, segments_BL, use: CacheUse):
        """The layers as a scan, which hands the cache on and so writes to it where it lies."""
        graphdef, stacked = nnx.split(self.layers)
        cached = use.cache is not None

        def one_layer(carry, layer):
            x_BLD, cache = carry
            state, number = layer
            here = use._replace(cache=cache, layer=number) if cached else None
            block = nnx.merge(graphdef, state)
            x_BLD, statistics, here = block(x_BLD, positions_BL, segments_BL, here)
            return (x_BLD, here.cache if cached else None), statistics

        looped, layers = self.config.scan_layers, self.config.num_hidden_layers
        if self.config.remat != "none":
            one_layer = remat.checkpointed(one_layer, self.config.remat, looped)
            if not looped:
                stacked = remat.in_type(stacked, x_BLD.dtype)
        numbers = jnp.arange(layers) if cached else None
        (x_BLD, cache), statistics = jax.lax.scan(
            one_layer, (x_BLD, use.cache), (stacked, numbers), unroll=1 if looped else layers
        )
        return x_BLD, statistics, cache

    def _run_list(self, x_BLD, positions_BL, segments_BL, use: CacheUse):
        graphdef, _ = nnx.split(self.layers[0])

        @jax.jit  # so that all layers are traced as one
        def one_layer(state, x_BLD, cache):
            here = None if cache is None else use._replace(cache=cache)
            block = nnx.merge(graphdef, state)
            x_BLD, statistics, here = block(x_BLD, positions_BL, segments_BL, here)
            return x_BLD, statistics, None if here is None else here.cache

        caches = [None] * len(self.layers) if use.cache is None else use.cache
        statistics, written = [], []
        for block, cache in zip(self.layers, caches, strict=True):
            x_BLD, sums, cache = one_layer(nnx.state(block), x_BLD, cache)
            statistics.append(sums)
            written.append(cache)
        return x_BLD, jax.tree.map(lambda *sums: jnp.stack(sums), *statistics), tuple(written)


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, state, tokens_BL, positions_BL, segments_BL):
    """The logits of a batch that is padded, with rows of segment 0, to split over the mesh."""
    tokens_BL = jnp.asarray(tokens_BL, jnp.int32)
    batch = tokens_BL.shape[0]
    missing = -batch % sharding.batch_shards()
    if missing and segments_BL is None:
        segments_BL = jnp.ones_like(tokens_BL)

    def place(x):
        if x is None:
            return None
        x = jnp.asarray(x, jnp.int32)
        if missing:
            x = jnp.pad(sharding.shard(x, None, None), ((0, missing), (0, 0)))
        return sharding.shard(x, "batch", None)

    placed = map(place, (tokens_BL, positions_BL, segments_BL))
    logits_BLV = nnx.merge(graphdef, state).forward(*placed).logits_BLV
    if missing:
        logits_BLV = sharding.shard(logits_BLV, None, None, "vocabulary")[:batch]
    return logits_BLV


def chosen_kernels(config: ModelConfig, batch: int, length: int) -> dict[str, str]:
    """The bodies that a batch [batch, length] gets on the mesh that is set, by the config's keys.

    Raises:
      InputError: if one that the config asks for cannot run there, or not on these shapes.
    """
    try:
        exchange = exchange_of(config, batch * length // sharding.batch_shards())
        dtype = compute_dtype(config)
        return {
            "exchange": exchange.implementation,
            "grouped_matmul": grouped_matmul_of(config, dtype),
            "attention": resolve(config.attention, length, config.head_size, dtype),
        }
    except ValueError as error:
        raise InputError(f"model.{error}") from None


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The activations' type: the config's, or float32 on CPU and bfloat16 elsewhere."""
    default = "float32" if platform() == "cpu" else "bfloat16"
    return jnp.dtype(config.compute_dtype or default)


def abstract_state(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure and its parameters' shapes, without making any array."""
    model = nnx.eval_shape(lambda: Mixtral(config, jax.random.key(0)))
    return nnx.split(model)


def initialize(config: ModelConfig, key: jax.Array, mesh: jax.sharding.Mesh) -> Mixtral:
    """A Mixtral with random weights, each made on the devices that own its slice.

    The same key gives the same weights on every mesh.

    Raises:
      InputError: if the model's sizes do not split over the mesh.
    """
    check_mesh(config, MeshConfig(**mesh.shape))
    graphdef, abstract = abstract_state(config)
    shardings = sharding.param_shardings(abstract, mesh)
    with jax.set_mesh(mesh):
        make = jax.jit(lambda key: nnx.state(Mixtral(config, key)), out_shardings=shardings)
        return nnx.merge(graphdef, make(key))
