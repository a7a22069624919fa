"""A model whose layers are arrays of their own, for inference; on CPU its experts' matrices too.

XLA copies what a program takes out of an array (on CPU always, on GPU and TPU for kernels), and
reads arrays that it is given whole where they lie. Stacked layers would be copied for every token.
On GPU and TPU each device of the expert axis has all that lies outside the experts, if it has the
room: a step of decoding would gather it for longer than it takes.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.kernels.bits import BITS
from mixtral_jax.model.int8 import Int8Param
from mixtral_jax.model.mixtral import Block, Mixtral, compute_dtype
from mixtral_jax.model.quantized import CONTRACTED

WHOLE = 0.8
"""Share of a device's memory up to which weights may be whole along the expert axis."""
LARGE = 1 << 20
"""Values of a matrix of bfloat16 from which it is read as it is no slower than in float32."""


def whole_fits(model: Mixtral, mesh: jax.sharding.Mesh, memory: float) -> bool:
    """Whether devices of so many bytes have room for what `in_layers` makes whole.

    Args: model: with stacked layers, or their shapes alone.
    """

    def held(param: nnx.Param) -> int:
        array = param.get_value()
        shape = sharding.on(mesh, *_served_axes(param)).shard_shape(array.shape)
        return math.prod(shape) * array.dtype.itemsize

    flat = nnx.to_flat_state(nnx.state(model))
    return sum(held(param) for _, param in flat) <= WHOLE * memory


def in_layers(model: Mixtral, *, consume: bool = False, whole: bool = True) -> Mixtral:
    """The same model with its layers in a list: a copy of them, on the devices they lie on.

    Args:
      model: with stacked layers, or their shapes alone; or as it is to be, which is given back.
      whole: put what lies outside the experts whole on each device of the expert axis, not split.
      consume: free the arrays of all layers as they are taken apart, and with them the given model:
        no more is held beside it than one of them, such as all layers' gate matrices.
    """
    if not isinstance(model.layers, Block):
        return model
    graphdef, params = nnx.split(model)
    new = nnx.merge(graphdef, jax.tree.map(lambda p: p, params))
    for path, param in nnx.to_flat_state(nnx.state(new)):
        if whole and path[0] != "layers":
            _serve(param, consume)
    layer_graphdef, stacked = nnx.split(new.layers)
    layers = [{} for _ in range(model.config.num_hidden_layers)]
    for path, param in nnx.to_flat_state(stacked):
        array, logical = param.get_value(), param.get_metadata("logical_axes")[1:]
        if whole:
            logical = _served_axes(param)[1:]
        for layer, part in zip(layers, _taken_apart(array, logical), strict=True):
            layer[path] = nnx.Param(part, logical_axes=logical)
        if consume:
            array.delete()
    new.layers = nnx.List(nnx.merge(layer_graphdef, nnx.from_flat_state(layer)) for layer in layers)
    return new


def _serve(param: nnx.Param, consume: bool) -> None:
    """Move a parameter to where it is to lie for inference."""
    array, logical = param.get_value(), _served_axes(param)
    param.set_metadata(logical_axes=logical)
    if isinstance(array, jax.ShapeDtypeStruct):
        return
    where = sharding.on(array.sharding.mesh, *logical)
    if where != array.sharding:
        param.set_value(jax.block_until_ready(jax.device_put(array, where)))
        if consume:
            array.delete()


def _served_axes(param: nnx.Param) -> tuple[str | None, ...]:
    """The logical axes of a parameter as it is to lie for inference."""
    logical = param.get_metadata("logical_axes")
    return tuple("served_model" if axis == "model" else axis for axis in logical)


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
      transposed: whether the head is to be head_VD, if it is not kept as bits: faster for one row.
    Returns:
      A model for `forward`, with arrays of at least the type that it computes in, the embedding in
      float32, and matrices as the bits of bfloat16 (kernels/bits.py) if they are large and of that
      type, or computed with in it. They share the memory of the given model's where they have the
      same type, or its bits, and begin where XLA wants arrays to begin, at multiples of 64 bytes; a
      transposed head is a copy. What is in int8 stays so.
    """
    dtype = compute_dtype(model.config)
    graphdef, params = nnx.split(model)
    new = nnx.merge(graphdef, jax.tree.map(lambda p: p, params))
    layer_graphdef, stacked = nnx.split(new.layers)
    flat = nnx.to_flat_state(stacked)
    new.layers = nnx.List(
        nnx.merge(
            layer_graphdef,
            nnx.from_flat_state({path: _layer(path[-1], p, i, dtype) for path, p in flat}),
        )
        for i in range(model.config.num_hidden_layers)
    )
    new.embedding_VD = _whole("embedding_VD", new.embedding_VD, dtype)
    if isinstance(new.head_DV, Int8Param):
        return new
    head_DV = _whole("head_DV", new.head_DV, dtype)
    del new.head_DV
    if transposed and head_DV.get_value().dtype != BITS:
        new.head_VD = _transposed(head_DV)
    else:
        new.head_DV = head_DV
    return new


def converts_blocks(model: Mixtral) -> bool:
    """Whether the products with most of an unstacked model's weights convert them in blocks."""
    expert = model.layers[0].moe.gate_EDF
    return isinstance(expert, Int8Param) or expert.get_value()[0].dtype == BITS


def _whole(name: str, param: nnx.Param, dtype: jnp.dtype) -> nnx.Param:
    array, logical = param.get_value(), param.get_metadata("logical_axes")
    shape = array.shape
    array = _placed(array, shape, logical, _type_of(name, array.dtype, shape, dtype))
    return nnx.Param(array, logical_axes=logical)


def _transposed(param: nnx.Param) -> nnx.Param:
    logical = param.get_metadata("logical_axes")[::-1]
    array = param.get_value()
    where = sharding.on(array.sharding.mesh, *logical)
    with sharding.no_mesh():
        return nnx.Param(jax.jit(jnp.transpose, out_shardings=where)(array), logical_axes=logical)


def _layer(name: str, param: nnx.Param, layer: int, dtype: jnp.dtype) -> nnx.Param:
    """One layer of a stacked parameter; experts as a tuple, by their number on each device."""
    array, (_, *logical) = param.get_value(), param.get_metadata("logical_axes")
    apart = logical[0] == "experts"
    to = _type_of(name, array.dtype, array.shape[2 if apart else 1 :], dtype)
    if not apart:
        value = _placed(array, array.shape[1:], logical, to, (layer,))
    else:
        shards = array.sharding.mesh.shape[sharding.EXPERT]
        shape = (shards, *array.shape[2:])
        value = tuple(
            _placed(array, shape, logical, to, (layer, slice(expert, expert + 1)))
            for expert in range(array.shape[1] // shards)
        )
    return nnx.Param(value, logical_axes=tuple(logical))


def _type_of(name: str, stored: jnp.dtype, shape, dtype: jnp.dtype) -> jnp.dtype:
    """What a parameter is to lie as, where dtype is computed in; shape: of one matrix."""
    if stored == jnp.int8:
        return stored
    large = stored == jnp.bfloat16 and math.prod(shape) >= LARGE
    if name in CONTRACTED and (large or dtype == jnp.bfloat16):
        return BITS
    # XLA:CPU takes rows of a table in float32 alone, and would widen all of it for each token.
    return jnp.promote_types(stored, jnp.float32 if name == "embedding_VD" else dtype)


def _placed(array: jax.Array, shape, logical, dtype: jnp.dtype, part=()) -> jax.Array:
    """The array that is made of the same part of each device's share of another."""
    where = sharding.on(array.sharding.mesh, *logical)

    def place(shard) -> jax.Array:
        values = np.asarray(shard.data)[part]
        if dtype == BITS:
            values = values.astype(jnp.bfloat16, copy=False).view(BITS)
        return jax.device_put(values, shard.device).astype(dtype)

    with sharding.no_mesh():
        parts = [place(shard) for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(tuple(shape), where, parts)
