"""A model with its layers and experts apart: the same numbers, in the same memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from harness import describe, place, random_parameters
from tiny import MODEL, make_batch

from mixtral_jax import sharding
from mixtral_jax.model.mixtral import Mixtral, abstract_state
from mixtral_jax.model.unstacked import in_layers, unstacked

CONFIG = dataclasses.replace(MODEL, hidden_size=32, head_dim=8, intermediate_size=48)


def model_on(mesh, config=CONFIG) -> Mixtral:
    graphdef, state = abstract_state(config)
    params = random_parameters(state, 3)
    params = jax.tree.map(lambda a: a.astype(config.param_dtype), params)
    return nnx.merge(graphdef, place(params, mesh))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 4, 1), (1, 2, 2, 2)], ids=describe)
def test_it_computes_the_same(sizes):
    mesh = sharding.make_mesh(*sizes)
    model = model_on(mesh)
    tokens, _, segments, positions = make_batch(8)
    with jax.set_mesh(mesh):
        inputs = place((tokens, positions, segments), mesh)
        outs = []
        forms = (in_layers(model), unstacked(model), unstacked(model, transposed=False))
        for each in (model, *forms):
            graphdef, params = nnx.split(each)
            run = jax.jit(lambda params, *args, g=graphdef: nnx.merge(g, params).forward(*args))
            outs.append(run(params, *inputs))
    for found in outs[1:]:
        for whole, apart in zip(*((o.logits_BLV, *o.statistics) for o in (outs[0], found))):
            oracle.close(apart, whole, rel=2e-6)


def addresses(array: jax.Array) -> set[int]:
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 2, 2, 2)], ids=describe)
def test_it_shares_the_memory(sizes):
    model = model_on(sharding.make_mesh(*sizes))
    new = unstacked(model)
    embedding_VD = model.embedding_VD.get_value()
    assert addresses(new.embedding_VD.get_value()) == addresses(embedding_VD)
    gate_LEDF = model.layers.moe.gate_EDF.get_value()
    first = new.layers[0].moe.gate_EDF.get_value()
    assert len(first) == 4 // sizes[2]
    assert first[0].shape == (sizes[2], 32, 48)
    assert addresses(first[0]) == addresses(gate_LEDF)
    local = gate_LEDF.addressable_shards[0].data.nbytes
    last = new.layers[-1].moe.gate_EDF.get_value()[-1]
    part = last.addressable_shards[0].data.nbytes
    assert addresses(last) == {start + local - part for start in addresses(gate_LEDF)}


def test_bfloat16_weights_become_what_is_computed_in():
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16", compute_dtype="float32")
    model = model_on(sharding.make_mesh(), config)
    _, params = nnx.split(unstacked(model))
    wide = {leaf.dtype for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert wide == {jnp.dtype("float32")}
    up_LEDF = np.float32(model.layers.moe.up_EDF.get_value())
    np.testing.assert_array_equal(
        params["layers"][1]["moe"]["up_EDF"].get_value()[2][0], up_LEDF[1, 2]
    )


def test_layers_are_taken_apart_where_they_lie():
    mesh = sharding.make_mesh(1, 2, 2, 2)
    model = model_on(mesh)
    up = model.layers.moe.up_EDF
    whole, logical = np.asarray(up.get_value()), up.get_metadata("logical_axes")
    new = in_layers(model)
    assert not up.get_value().is_deleted()
    assert in_layers(new) is new
    for number, layer in enumerate(new.layers):
        part = layer.moe.up_EDF
        assert part.get_metadata("logical_axes") == logical[1:]
        assert part.get_value().sharding == sharding.on(mesh, *logical[1:])
        np.testing.assert_array_equal(part.get_value(), whole[number])


def test_the_given_model_can_be_consumed():
    model = model_on(sharding.make_mesh())
    stacked = jax.tree.leaves(nnx.state(model.layers))
    new = in_layers(model, consume=True)
    assert all(array.is_deleted() for array in stacked)
    assert not any(array.is_deleted() for array in jax.tree.leaves(nnx.state(new)))


def test_of_shapes_it_gives_shapes():
    """With the axes that say where each lies."""
    shapes = in_layers(nnx.merge(*abstract_state(CONFIG)))
    arrays = in_layers(model_on(sharding.make_mesh()))
    (graphdef, asked), (same, made) = nnx.split(shapes), nnx.split(arrays)
    assert graphdef == same
    for (path, shape), (other, array) in zip(nnx.to_flat_state(asked), nnx.to_flat_state(made)):
        assert path == other
        assert shape.get_value().shape == array.get_value().shape
        assert shape.get_metadata("logical_axes") == array.get_metadata("logical_axes")
