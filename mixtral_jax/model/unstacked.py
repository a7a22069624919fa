"""A model whose layers are arrays of their own, for inference; on CPU its experts' matrices too.

XLA copies what a program takes out of an array (on CPU always, on GPU and TPU for kernels), and
reads arrays that it is given whole where they lie. Stacked layers would be copied for every token.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.model.int8 import Int8
from mixtral_jax.model.mixtral import Block, Mixtral, compute_dtype


def in_layers(model: Mixtral, *, consume: bool = False) -> Mixtral:
    """The same model with its layers in a list: a copy of them, on the devices they lie on.

    Args:
      model: with stacked layers, or their shapes alone; or as it is to be, which is given back.
      consume: free the arrays of all layers as they are taken apart, and with them the given model:
        no more is held beside it than one of them, such as all layers' gate matrices.
    """
    if not isinstance(model.layers, Block):
        return model
    graphdef, params = nnx.split(model)
    new = nnx.merge(graphdef, jax.tree.map(lambda p: p, params))
    layer_graphdef, stacked = nnx.split(new.layers)
    layers = [{} for _ in range(model.config.num_hidden_layers)]
    for path, param in nnx.to_flat_state(stacked):
        array, logical = param.get_value(), param.get_metadata("logical_axes")[1:]
        for layer, part in zip(layers, _taken_apart(array, logical), strict=True):
            layer[path] = nnx.Param(part, logical_axes=logical)
        if consume:
            array.delete()
    new.layers = nnx.List(nnx.merge(layer_graphdef, nnx.from_flat_state(layer)) for layer in layers)
    return new


def _taken_apart(array: jax.Array, logical) -> tuple[jax.Array, ...]:
    """The arrays [...] of an array [layers, ...]: theirs are the logical axes."""
    layers = range(array.shape[0])
    if isinstance(array, jax.ShapeDtypeStruct):
        return tuple(jax.ShapeDtypeStruct(array.shape[1:], array.dtype) for _ in layers)
    take = jax.jit(
        lambda array: tuple(array[layer] for layer in layers),
        out_shardings=sharding.on(array.sharding.mesh, *logical),
    )
    with sharding.no_mesh():
        return jax.block_until_ready(take(array))


def unstacked(model: Mixtral, transposed: bool = True) -> Mixtral:
    """The same model with its layers in a list, and the matrices of each expert apart, for CPU.

    Args:
      model: its parameters lie on a mesh of CPU devices.
      transposed: whether the head is to be head_VD: faster for one row.
    Returns:
      A model for `forward`, with arrays of at least the type that it computes in. They share the
      memory of the given model's where they have the same type and begin where XLA wants arrays to
      begin, at multiples of 64 bytes; a transposed head is a copy. What is in int8 stays so.
    """
    widen = partial(_placed, dtype=compute_dtype(model.config))
    graphdef, params = nnx.split(model)
    new = nnx.merge(graphdef, jax.tree.map(lambda p: p, params))
    layer_graphdef, stacked = nnx.split(new.layers)
    new.layers = nnx.List(
        nnx.merge(layer_graphdef, _map(lambda p, i=i: _layer(p, i, widen), stacked))
        for i in range(model.config.num_hidden_layers)
    )
    new.embedding_VD = _whole(new.embedding_VD, widen)
    if isinstance(new.head_DV, Int8):
        return new
    head_DV = _whole(new.head_DV, widen)
    del new.head_DV
    if transposed:
        new.head_VD = _transposed(head_DV)
    else:
        new.head_DV = head_DV
    return new


def _whole(param: nnx.Param, widen) -> nnx.Param:
    array, logical = param.get_value(), param.get_metadata("logical_axes")
    return nnx.Param(widen(array, array.shape, logical), logical_axes=logical)


def _transposed(param: nnx.Param) -> nnx.Param:
    logical = param.get_metadata("logical_axes")[::-1]
    array = param.get_value()
    where = sharding.on(array.sharding.mesh, *logical)
    with sharding.no_mesh():
        return nnx.Param(jax.jit(jnp.transpose, out_shardings=where)(array), logical_axes=logical)


def _map(function, params: nnx.State) -> nnx.State:
    return jax.tree.map(function, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _layer(param: nnx.Param, layer: int, widen) -> nnx.Param:
    """One layer of a stacked parameter; experts as a tuple, by their number on each device."""
    array, (_, *logical) = param.get_value(), param.get_metadata("logical_axes")
    if logical[0] != "experts":
        value = widen(array, array.shape[1:], logical, (layer,))
    else:
        shards = array.sharding.mesh.shape[sharding.EXPERT]
        shape = (shards, *array.shape[2:])
        value = tuple(
            widen(array, shape, logical, (layer, slice(expert, expert + 1)))
            for expert in range(array.shape[1] // shards)
        )
    return nnx.Param(value, logical_axes=tuple(logical))


def _placed(array: jax.Array, shape, logical, part=(), *, dtype: jnp.dtype) -> jax.Array:
    """The array that is made of the same part of each device's share of another."""
    where = sharding.on(array.sharding.mesh, *logical)
    dtype = array.dtype if array.dtype == jnp.int8 else jnp.promote_types(array.dtype, dtype)
    with sharding.no_mesh():
        parts = [
            jax.device_put(np.asarray(shard.data)[part], shard.device).astype(dtype)
            for shard in array.addressable_shards
        ]
    return jax.make_array_from_single_device_arrays(tuple(shape), where, parts)
