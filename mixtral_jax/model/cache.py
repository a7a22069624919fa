"""The key-value cache: a pytree of arrays, sharded like the activations."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values by position: slot s of a row holds the token at position s.

    Slots past a row's length hold anything: no query sees a key after its own position, and the
    token that comes to a position overwrites the slot first. A leading layer dimension may be
    stacked in front.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array

    def write(self, k_BLKH: jax.Array, v_BLKH: jax.Array, start_B: jax.Array) -> LayerCache:
        """The cache with row b's L new tokens in slots start[b] .. start[b] + L."""
        cached = sharding.spec("batch", None, "heads", None)
        start_B = sharding.shard(start_B, "batch")  # a slice of one row may have lost its sharding

        def put(cache_BSKH, new_BLKH, start_B):
            return jax.vmap(jax.lax.dynamic_update_slice_in_dim, in_axes=(0, 0, 0, None))(
                cache_BSKH, new_BLKH.astype(cache_BSKH.dtype), start_B, 0
            )

        put = jax.shard_map(
            put, in_specs=(cached, cached, sharding.spec("batch")), out_specs=cached
        )
        return LayerCache(put(self.k_BSKH, k_BLKH, start_B), put(self.v_BSKH, v_BLKH, start_B))


def make_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype) -> LayerCache:
    """An empty cache of all layers, for `batch` sequences of up to `slots` tokens.

    Bytes: 2 * layers * batch * slots * kv heads * head width * the size of dtype.
    """
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_size)
    spec = sharding.spec("layers", "batch", None, "heads", None)

    def zeros():
        return jnp.zeros(shape, dtype, out_sharding=spec)

    return LayerCache(zeros(), zeros())
