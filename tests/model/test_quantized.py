"""A model in int8: the numbers of its dequantised matrices, near the original's, in less memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from emulation import tpu_kernels_on_cpu
from flax import nnx
from harness import addresses, describe, parameter_bytes, place, random_parameters
from tiny import MODEL, make_batch

from mixtral_jax import sharding
from mixtral_jax.kernels import int8
from mixtral_jax.kernels.int8 import product, quantize
from mixtral_jax.model.mixtral import Mixtral, abstract_state
from mixtral_jax.model.quantized import CONTRACTED, quantized
from mixtral_jax.model.unstacked import unstacked

MESHES = [(1, 1, 1, 1), (1, 1, 4, 1), (1, 2, 2, 2)]


def model_on(mesh, config=MODEL) -> Mixtral:
    graphdef, state = abstract_state(config)
    params = random_parameters(state, 3)
    params = jax.tree.map(lambda a: a.astype(config.param_dtype), params)
    return nnx.merge(graphdef, place(params, mesh))


def holders(model):
    """(module, name) of each matrix that is quantised."""
    modules = (model.layers.attention, model.layers.moe, model)
    return [(m, name) for m in modules for name in CONTRACTED if hasattr(m, name)]


def contracted_axes(array, name):
    letters = name.rpartition("_")[2]
    return tuple(array.ndim - len(letters) + letters.index(a) for a in CONTRACTED[name])


def dequantised(model, new):
    """The float model whose matrices are values * scale of another, which is quantised."""
    graphdef, params = nnx.split(model)
    wide = nnx.merge(graphdef, jax.tree.map(lambda p: p, params))
    for (module, name), (quantised, _) in zip(holders(wide), holders(new), strict=True):
        param, made = getattr(module, name), getattr(quantised, name)
        where, dtype = param.get_value().sharding, param.get_value().dtype
        array = in_place(*map(np.asarray, made.arrays()), name)
        param.set_value(jax.device_put(array.astype(dtype), where))
    return wide


def in_place(values, scale, name):
    """values * scale, its dimensions in the order of a name's letters."""
    letters = name.rpartition("_")[2]
    kept = "".join(letter for letter in letters if letter not in CONTRACTED[name])
    order = kept + CONTRACTED[name]
    stacked = values.ndim - len(letters)
    wide = np.float32(values) * scale[(..., *[None] * len(CONTRACTED[name]))]
    back = [stacked + order.index(letter) for letter in letters]
    return wide.transpose(*range(stacked), *back)


def outputs(model, mesh, length=9):
    tokens, _, segments, positions = make_batch(8, length)
    with jax.set_mesh(mesh):
        inputs = place((tokens, positions, segments), mesh)
        graphdef, params = nnx.split(model)
        run = jax.jit(lambda params, *args: nnx.merge(graphdef, params).forward(*args))
        out = run(params, *inputs)
    return jax.tree.map(np.asarray, (out.logits_BLV, *out.statistics))


@pytest.mark.parametrize("few", [256, 0], ids=["few rows", "any rows"])
@pytest.mark.parametrize("sizes", MESHES, ids=describe)
def test_it_computes_what_the_dequantised_matrices_do(sizes, few, monkeypatch):
    monkeypatch.setattr(int8, "FEW", few)
    mesh = sharding.make_mesh(*sizes)
    model = model_on(mesh)
    new = quantized(model)
    wanted = outputs(dequantised(model, new), mesh)
    for each in (new, unstacked(new)) if few else (new,):
        for actual, reference in zip(outputs(each, mesh), wanted, strict=True):
            oracle.close(actual, reference, rel=3e-6)


def test_few_rows_see_nothing_of_other_experts():
    gate, up = (np.float32(np.random.default_rng(n).normal(size=(3, 16, 8))) for n in range(2))
    down = np.float32(np.random.default_rng(2).normal(size=(3, 8, 16)))
    matrices = [quantize(jnp.array(w), (2,)) for w in (gate, up, down)]
    x_RD, sizes_E = jnp.array(np.random.default_rng(3).normal(size=(7, 8))), jnp.array([2, 3, 1])
    wanted = np.asarray(int8.experts(x_RD, *matrices, sizes_E))
    spoilt = [int8.Int8(w.values, w.scale.at[1].set(np.nan)) for w in matrices]
    found = np.asarray(int8.experts(x_RD, *spoilt, sizes_E))
    assert np.isnan(found[2:5]).all()
    np.testing.assert_array_equal(np.delete(found, [2, 3, 4], 0), np.delete(wanted, [2, 3, 4], 0))
    assert not wanted[6].any()  # the row of no expert


def test_fewer_rows_than_experts_read_their_own_alone(monkeypatch):
    """On TPU: rows of the third and of the fifth expert of six, and one of none."""
    rng = np.random.default_rng(4)
    into, out_of = (6, 16, 8), (6, 8, 16)
    weights = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (into, into, out_of)]
    gate, up, down = (quantize(w, (2,)) for w in weights)
    arguments = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32), gate, up, down
    sizes_E = jnp.array([0, 0, 2, 0, 1, 0])
    wanted = int8.experts(*arguments, sizes_E)
    monkeypatch.setattr(int8, "platform", lambda: "tpu")
    oracle.close(int8.experts(*arguments, sizes_E), wanted, rel=1e-6)
    program = jax.jit(int8.experts).lower(*arguments, sizes_E).as_text()
    assert "tensor<1x16x8xi8>" in program, "the matrix of one expert"
    assert "tensor<96x8xi8>" not in program, "those of all, as one"


@pytest.mark.parametrize("sizes", MESHES, ids=describe)
def test_each_value_is_the_nearest(sizes):
    mesh = sharding.make_mesh(*sizes)
    model = model_on(mesh)
    up_LEDF = np.asarray(model.layers.moe.up_EDF.get_value()).copy()
    up_LEDF[1, 2, :, 3] = 0
    model.layers.moe.up_EDF.set_value(
        jax.device_put(up_LEDF, model.layers.moe.up_EDF.get_value().sharding)
    )
    new = quantized(model)
    for (module, name), (quantised, _) in zip(holders(model), holders(new), strict=True):
        w = np.asarray(getattr(module, name).get_value())
        axes = contracted_axes(w, name)
        made = getattr(quantised, name)
        values, scale = (np.asarray(param.get_value()) for param in (made.values, made.scale))
        assert values.dtype == np.int8
        most = np.abs(w).max(axis=axes)
        np.testing.assert_allclose(scale, np.where(most > 0, most / 127, 1), rtol=2e-7)
        # No value is further away than half a step of its channel, but for float32's rounding.
        steps = np.expand_dims(scale, axes)
        assert (np.abs(in_place(values, scale, name) - w) <= 0.50001 * steps).all()
        assert (np.abs(values).max(axis=tuple(range(scale.ndim, w.ndim))) == 127 * (most > 0)).all()
        for param in (made.values, made.scale):
            where = sharding.param_shardings(param, mesh).get_value()
            assert param.get_value().sharding.is_equivalent_to(where, param.get_value().ndim)
    zero = new.layers.moe.up_EDF
    assert not np.asarray(zero.values.get_value())[1, 2, 3].any()
    assert np.asarray(zero.scale.get_value())[1, 2, 3] == 1
    assert np.isfinite(outputs(new, mesh)[0]).all()


def test_halves_go_to_the_even_neighbour():
    w_DF = jnp.array([[127.0, 63.5], [0.5, 0.25], [1.5, 0.75], [-2.5, 1e-9]])
    values, scale = quantize(w_DF, (0,))
    np.testing.assert_array_equal(values, [[127, 0, 2, -2], [127, 0, 2, 0]])
    np.testing.assert_array_equal(scale, [1, 0.5])


@pytest.mark.parametrize(
    ("implementation", "width", "most"),
    [("xla", 24, None), ("blocks", 24, None), ("blocks", 1 << 14, None), ("blocks", 300, 1000)],
    ids=["whole", "2 blocks", "4 blocks", "10 blocks"],
)
def test_the_bodies_of_the_product_agree(monkeypatch, implementation, width, most):
    """29 channels: the last block has some of the one before."""
    monkeypatch.setattr(int8, "MOST", most or int8.MOST)
    rng = np.random.default_rng(0)
    x_RD, w_DF = rng.normal(size=(3, width)), rng.normal(size=(width, 29))
    made = quantize(jnp.float32(w_DF), (0,))
    out_RF = product(jnp.float32(x_RD), made, implementation=implementation)
    values_FD, scale_F = (np.float64(a) for a in made)
    oracle.close(out_RF, x_RD @ (values_FD * scale_F[:, None]).T, rel=2e-6)


def test_a_product_is_off_by_no_more_than_half_a_step_of_each_input():
    mesh = sharding.make_mesh()
    model = model_on(mesh)
    x_RD = np.random.default_rng(0).normal(size=(5, 24))
    head_DV = np.float64(model.head_DV.get_value())
    made = quantized(model).head_DV.arrays()
    error_RV = x_RD @ (np.float64(made.values) * np.float64(made.scale)[:, None]).T - x_RD @ head_DV
    bound_RV = np.abs(x_RD).sum(axis=1)[:, None] * np.float64(made.scale) / 2
    assert (np.abs(error_RV) <= bound_RV * (1 + 1e-5)).all()
    assert np.abs(error_RV).max() > bound_RV.max() / 100


def test_the_rest_is_untouched():
    model = model_on(sharding.make_mesh(1, 2, 2, 2))
    new = quantized(model)
    for old, kept in [
        (model.layers.moe.router_DE, new.layers.moe.router_DE),
        (model.layers.moe_norm.weight, new.layers.moe_norm.weight),
        (model.layers.attention_norm.weight, new.layers.attention_norm.weight),
        (model.norm.weight, new.norm.weight),
        (model.embedding_VD, new.embedding_VD),
    ]:
        assert kept.get_value() is old.get_value()
    assert isinstance(model.head_DV, nnx.Param)  # and so is the given model


def test_the_memory_is_as_computed():
    config = dataclasses.replace(MODEL, hidden_size=96, intermediate_size=160, head_dim=24)
    config = dataclasses.replace(config, param_dtype="bfloat16", num_local_experts=8)
    model = model_on(sharding.make_mesh(), config)
    count = wanted = 0
    for module, name in holders(model):
        array = getattr(module, name).get_value()
        inputs = np.prod([array.shape[axis] for axis in contracted_axes(array, name)])
        count += array.size
        wanted += array.size + 4 * array.size // inputs
    others = parameter_bytes(model) - 2 * count
    made = parameter_bytes(quantized(model))
    assert made == wanted + others
    assert made < 0.55 * parameter_bytes(model)


def test_shapes_alone_will_do():
    def make():
        return quantized(Mixtral(MODEL, jax.random.key(0)))

    abstract = nnx.state(nnx.eval_shape(make))
    state = nnx.state(quantized(model_on(sharding.make_mesh())))
    shape = lambda a: (a.shape, a.dtype)  # noqa: E731
    assert jax.tree.map(shape, nnx.to_pure_dict(abstract)) == jax.tree.map(
        shape, nnx.to_pure_dict(state)
    )


def test_consuming_frees_what_was_quantised():
    model = model_on(sharding.make_mesh())
    head_DV, norm = model.head_DV.get_value(), model.norm.weight.get_value()
    wanted = np.asarray(quantized(model).head_DV.values.get_value())
    new = quantized(model, consume=True)
    assert head_DV.is_deleted()
    assert not norm.is_deleted()
    np.testing.assert_array_equal(np.asarray(new.head_DV.values.get_value()), wanted)


def test_layers_in_a_list_are_refused():
    model = unstacked(model_on(sharding.make_mesh()))
    with pytest.raises(ValueError, match="call quantized first, then unstacked"):
        quantized(model)


def test_unstacked_shares_the_memory():
    config = dataclasses.replace(MODEL, hidden_size=32, head_dim=8, intermediate_size=64)
    new = quantized(model_on(sharding.make_mesh(), config))
    apart = unstacked(new)
    values = apart.layers[0].moe.gate_EDF.values.get_value()
    assert [v.shape for v in values] == [(1, 64, 32)] * 4
    assert addresses(values[0]) == addresses(new.layers.moe.gate_EDF.values.get_value())
    assert addresses(apart.head_DV.values.get_value()) == addresses(new.head_DV.values.get_value())


def test_bfloat16_is_computed_with_too():
    config = dataclasses.replace(MODEL, param_dtype="bfloat16", compute_dtype="bfloat16")
    mesh = sharding.make_mesh()
    model = model_on(mesh, config)
    wanted = outputs(model_on(mesh, dataclasses.replace(config, compute_dtype="float32")), mesh)[0]
    new = quantized(model)
    for each in (new, unstacked(new)):
        logits = outputs(each, mesh)[0]
        assert logits.dtype == np.float32
        assert np.abs(logits - wanted).mean() < 0.1 * np.abs(wanted).mean()


def test_with_the_kernels_of_a_tpu():
    sizes = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    config = dataclasses.replace(MODEL, **sizes, grouped_matmul="megablox")
    mesh = sharding.make_mesh()
    graphdef, state = abstract_state(config)
    model = nnx.merge(graphdef, place(random_parameters(state, 3, spread=0.1), mesh))
    with tpu_kernels_on_cpu():
        new = quantized(model)
        wanted = outputs(dequantised(model, new), mesh, 8)
        actual = outputs(new, mesh, 8)
    oracle.close(actual, wanted, rel=3e-6)
