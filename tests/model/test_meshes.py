"""The whole network, loss and gradients, on many meshes; and what its compiled program moves."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from harness import describe, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from whole import B, L, compiled, expected, loss_of, make_batch, make_config, parameters

from mixtral_jax import sharding
from mixtral_jax.config import InputError, MeshConfig, check_mesh
from mixtral_jax.model.layers import rows_that_travel
from mixtral_jax.model.mixtral import abstract_state

ONE = (1, 1, 1, 1)
MESHES = [
    (1, 1, 4, 1),
    (2, 1, 1, 2),
    (2, 2, 2, 1),
    (1, 2, 2, 2),
    (2, 1, 2, 2),
    (1, 4, 1, 2),
]


@pytest.mark.parametrize("mesh", MESHES, ids=describe)
def test_loss_gradients_and_statistics_do_not_depend_on_the_mesh(mesh):
    """All terms of the loss are on; padding is spread unevenly over the devices."""
    arguments = parameters(make_config()), make_batch()
    actual = compiled(mesh)(*arguments)
    oracle.close(actual, expected())
    oracle.close(actual, compiled(ONE)(*arguments))


def test_ragged_exchange_in_the_whole_network():
    arguments = parameters(make_config()), make_batch()
    oracle.close(compiled((1, 1, 4, 1), exchange="ragged")(*arguments), expected())


@pytest.mark.parametrize("model", ["model", "served_model"])
@pytest.mark.parametrize("mesh", [(1, 2, 2, 2), (2, 1, 1, 2), (1, 1, 4, 1)], ids=describe)
def test_rows_of_a_split_table_travel(mesh, model):
    """Values, and the gradient of a row that several devices want; zeros for ids of no row."""
    rng = np.random.default_rng(0)
    table_VD, g_BLD = rng.normal(size=(38, WIDTH)), rng.normal(size=(B, L, WIDTH))
    ids_BL = rng.integers(38, size=(B, L))
    ids_BL[0, :2] = -1, 38
    has_BL1 = (ids_BL % 39 < 38)[..., None]
    expected_BLD, grad_VD = has_BL1 * table_VD[ids_BL % 38], np.zeros_like(table_VD)
    np.add.at(grad_VD, ids_BL % 38, has_BL1 * g_BLD)
    mesh = sharding.make_mesh(*mesh)
    where, batch = (sharding.on(mesh, *axes) for axes in (("vocabulary", model), ("batch",)))
    table_VD = jax.device_put(np.float32(table_VD), where)
    ids_BL, g_BLD = jax.device_put((np.int32(ids_BL), np.float32(g_BLD)), batch)
    with jax.set_mesh(mesh):
        rows_BLD, pull = jax.vjp(lambda table: rows_that_travel(table, ids_BL), table_VD)
        (found_VD,) = pull(g_BLD)
    assert jax.typeof(rows_BLD).sharding.spec == sharding.spec("batch", None, None, mesh=mesh)
    assert found_VD.sharding == table_VD.sharding
    oracle.close((rows_BLD, found_VD), (expected_BLD, grad_VD), rel=1e-6)


# ---- the compiled program ----------------------------------------------------------------------

# Sizes whose prime factors tell what an array is: only expert matrices have a dimension of 13, and
# none but the number of experts is 20.
HIDDEN, EXPERTS, WIDTH = 13, 20, 24
COLLECTIVES = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"


def collectives(program):
    """(kind, shape) of every array that a collective of a compiled program gives."""
    found = []
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", line)
        if match:
            shapes_ = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found += [(match[2], tuple(int(n) for n in s.split(",") if n)) for s in shapes_]
    return found


def moved_experts(program, shards):
    """Collectives that move expert matrices to devices that do not own those experts.

    A device may gather its own experts' matrices whole, no more.
    """
    whole = EXPERTS // shards * WIDTH * HIDDEN
    return [
        (kind, shape)
        for kind, shape in collectives(program)
        if math.prod(shape) % HIDDEN == 0
        and kind in ("all-gather", "all-to-all", "collective-permute")
        and (kind != "all-gather" or EXPERTS in shape or math.prod(shape) > whole)
    ]


def program_of(sizes, **changes):
    """The loss and its gradient, compiled for a mesh."""
    mesh = sharding.make_mesh(*sizes)
    config = make_config(intermediate_size=HIDDEN, num_local_experts=EXPERTS, **changes)
    graphdef, state = abstract_state(config)
    step = jax.value_and_grad(functools.partial(loss_of, graphdef), has_aux=True)
    with jax.set_mesh(mesh):
        lowered = jax.jit(step).lower(*shapes((state, *make_batch()), mesh))
        return lowered.compile().as_text()


def test_one_device_sums_over_no_axis(optimized):
    """XLA:CPU copies what it sums over an axis of one device: the gradients of all experts."""
    assert collectives(program_of(ONE)) == []


@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (2, 2, 2, 1)], ids=describe)
def test_rows_travel_to_the_experts_and_never_the_reverse(optimized, sizes):
    program = program_of(sizes)
    rows = [shape for kind, shape in collectives(program) if kind == "all-to-all"]
    assert len(rows) >= 4, "there and back, forward and backward"
    assert all(shape[-1] == WIDTH for shape in rows)
    assert moved_experts(program, sizes[2]) == []
    gathered = [s for kind, s in collectives(program) if kind == "all-gather" and HIDDEN in s]
    if sizes[1] > 1:
        assert gathered, "the matrices of the experts that live here are gathered over fsdp"


@pytest.mark.parametrize(
    ("remat", "again"), [("none", 0), ("matmuls_rows", 0), ("matmuls", 1), ("full", 2)]
)
def test_what_is_kept_does_not_travel_again(optimized, remat, again):
    program = program_of((1, 1, 4, 1), remat=remat)
    moved = [shape for kind, shape in collectives(program) if kind == "all-to-all"]
    assert sum(shape[-1] == WIDTH for shape in moved) == 4 * (4 + again)  # a part for each device


@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (1, 2, 2, 1)], ids=describe)
def test_a_program_that_gathers_experts_would_be_seen(optimized, sizes):
    mesh = sharding.make_mesh(*sizes)

    def gathers(gate_EDF):
        return jnp.sin(sharding.shard(gate_EDF, None, "expert_model", None))

    where = sharding.on(mesh, "experts", "expert_model", None)
    gate_EDF = jax.ShapeDtypeStruct((EXPERTS, WIDTH, HIDDEN), jnp.float32, sharding=where)
    with jax.set_mesh(mesh):
        program = jax.jit(gathers).lower(gate_EDF).compile().as_text()
    assert moved_experts(program, sizes[2])


def test_the_batch_splits_over_every_axis_but_tensor():
    """Each device computes its own rows only: the logits lie as the batch does."""
    mesh = sharding.make_mesh(1, 2, 2, 2)
    graphdef, state = abstract_state(make_config())
    with jax.set_mesh(mesh):
        arguments = shapes((state, *make_batch()), mesh)
        _, (_, logits_BLV, statistics) = jax.eval_shape(
            functools.partial(loss_of, graphdef), *arguments
        )
    assert logits_BLV.shape == (B, L, 38)
    assert logits_BLV.sharding.spec == sharding.spec("batch", None, "vocabulary", mesh=mesh)
    assert all(not any(a.sharding.spec) for a in jax.tree.leaves(statistics))
    np.testing.assert_array_equal(logits_BLV.sharding.mesh.axis_sizes, (1, 2, 2, 2))


# ---- which meshes are allowed ------------------------------------------------------------------


@given(
    st.tuples(*[st.integers(1, 3)] * 4),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 6),
)
@settings(max_examples=40)
def test_a_mesh_is_refused_exactly_where_a_parameter_would_not_split(mesh, d, k, f, e, v):
    sizes = {"hidden_size": 2 * d, "num_key_value_heads": k, "num_attention_heads": 3 * k}
    sizes |= {"intermediate_size": f, "num_local_experts": e, "num_experts_per_tok": 1}
    config = make_config(**sizes, vocab_size=v, num_hidden_layers=1)
    mesh = dict(zip(sharding.AXES, mesh))
    _, state = abstract_state(config)
    splits = all(
        size % math.prod(mesh[name] for name in np.atleast_1d(axes or [])) == 0
        for _, param in nnx.to_flat_state(state)
        for size, axes in zip(param.shape, sharding.spec(*param.get_metadata("logical_axes")))
    )
    try:
        check_mesh(config, MeshConfig(**mesh))
        allowed = True
    except InputError:
        allowed = False
    assert allowed == splits
