"""A model with its layers and experts apart: the same numbers, in the same memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from harness import addresses, describe, place, random_parameters
from tiny import MODEL, make_batch

from mixtral_jax import sharding
from mixtral_jax.model import unstacked as unstacked_
from mixtral_jax.model.mixtral import Mixtral, abstract_state
from mixtral_jax.model.unstacked import converts_blocks, in_layers, unstacked, whole_fits

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


def test_small_bfloat16_weights_become_what_is_computed_in():
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16", compute_dtype="float32")
    model = model_on(sharding.make_mesh(), config)
    new = unstacked(model)
    assert not converts_blocks(new)
    _, params = nnx.split(new)
    wide = {leaf.dtype for leaf in jax.tree.leaves(params) if leaf.ndim > 1}
    assert wide == {jnp.dtype("float32")}
    up_LEDF = np.float32(model.layers.moe.up_EDF.get_value())
    np.testing.assert_array_equal(
        params["layers"][1]["moe"]["up_EDF"].get_value()[2][0], up_LEDF[1, 2]
    )


MATRICES = {"wq_DKGH", "wk_DKH", "wv_DKH", "wo_KGHD", "gate_EDF", "up_EDF", "down_EFD", "head_DV"}


@pytest.mark.parametrize("computed", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 4, 1), (1, 2, 2, 2)], ids=describe)
def test_large_bfloat16_matrices_lie_as_their_bits(monkeypatch, sizes, computed):
    """And so those that are computed with in bfloat16: no copies, and the same logits."""
    monkeypatch.setattr(unstacked_, "LARGE", 1 if computed == "float32" else 1 << 30)
    config = dataclasses.replace(CONFIG, param_dtype="bfloat16", compute_dtype=computed)
    mesh = sharding.make_mesh(*sizes)
    model = model_on(mesh, config)
    new = unstacked(model)
    graphdef, params = nnx.split(new)
    flat = nnx.to_flat_state(params)
    assert {path[-1] for path, p in flat if types_of(p) == {"uint16"}} == MATRICES
    routers = [types_of(p) for path, p in flat if path[-1] == "router_DE"]
    assert routers == [{computed}] * config.num_hidden_layers
    assert types_of(params["embedding_VD"]) == {"float32"}
    assert converts_blocks(new)
    first = new.layers[0].moe.up_EDF.get_value()[0]
    assert addresses(first) == addresses(model.layers.moe.up_EDF.get_value())
    tokens, _, segments, positions = make_batch(8)
    wide = dataclasses.replace(config, param_dtype="float32", compute_dtype="float32")
    widened = jax.tree.map(lambda a: a.astype(jnp.float32), nnx.state(model))
    with jax.set_mesh(mesh):
        inputs = place((tokens, positions, segments), mesh)
        whole = nnx.merge(abstract_state(wide)[0], widened)
        found, wanted = (
            jax.jit(lambda p, *args, g=g: nnx.merge(g, p).forward(*args).logits_BLV)(p, *inputs)
            for g, p in ((graphdef, params), nnx.split(whole))
        )
    oracle.close(found, wanted, rel=2e-6 if computed == "float32" else 0.1)


def test_float32_matrices_computed_with_in_bfloat16_lie_as_its_bits():
    """Rounded once, and not in every product."""
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    model = model_on(sharding.make_mesh(), config)
    new = unstacked(model)
    up = new.layers[1].moe.up_EDF.get_value()[2]
    assert up.dtype == jnp.uint16
    rounded = model.layers.moe.up_EDF.get_value()[1, 2].astype(jnp.bfloat16)
    np.testing.assert_array_equal(up[0].view(jnp.bfloat16), rounded)
    assert types_of(new.layers[0].moe.router_DE) == types_of(new.embedding_VD) == {"float32"}


def types_of(param) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(param)}


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


def test_what_is_outside_the_experts_is_whole_along_the_expert_axis():
    mesh = sharding.make_mesh(1, 1, 4, 2)
    model = model_on(mesh)
    split = [model.embedding_VD.get_value(), model.head_DV.get_value()]
    params = jax.tree.leaves(nnx.state(model))
    for path, param in nnx.to_flat_state(nnx.state(in_layers(model, consume=True))):
        axes = jax.tree.leaves(tuple(param.get_value().sharding.spec))
        assert (sharding.EXPERT in axes) == path[-1].endswith(("_EDF", "_EFD")), path
    assert all(array.is_deleted() for array in split)
    assert sum(not array.is_deleted() for array in params) == 1  # the last norm, which stays


def test_without_room_all_is_split():
    mesh = sharding.make_mesh(1, 1, 4, 1)
    model = model_on(mesh)
    logical = model.layers.attention.wq_DKGH.get_metadata("logical_axes")[1:]
    new = in_layers(model, whole=False)
    assert new.layers[0].attention.wq_DKGH.get_metadata("logical_axes") == logical
    assert new.head_DV.get_value() is model.head_DV.get_value()
    held = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves(nnx.state(in_layers(model)))
    )
    assert whole_fits(model, mesh, held / 0.8)
    assert not whole_fits(model, mesh, held / 0.8 - 8)


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
