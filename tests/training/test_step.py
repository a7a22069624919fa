"""One optimizer step: meshes, microbatches, skipping, schedules, decay."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tiny import CONFIG, host, initial_state, make_batch, make_config

from mixtral_jax import sharding
from mixtral_jax.model.mixtral import abstract_state
from mixtral_jax.training import step as steps
from mixtral_jax.training.optimizer import (
    is_matrix,
    learning_rate,
    make_optimizer,
    stochastically_rounded,
)
from mixtral_jax.training.placement import Placement


def gradients(config, batch):
    """(gradients, losses, statistics) of a batch on the config's mesh, in NumPy."""
    mesh = sharding.make_mesh(**vars(config.mesh))
    graphdef, _ = abstract_state(config.model)
    with jax.set_mesh(mesh):
        params = initial_state(config, mesh).params
        function = jax.jit(partial(steps._gradients, config, graphdef))
        grads, losses, statistics, _ = function(params, Placement(config, mesh)(batch))
        return host((grads, losses, statistics))


def assert_trees_close(got, expected, rtol=1e-5):
    """Every array within rtol of the expected one, relative to that one's largest element."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max() + 1e-30
        np.testing.assert_allclose(
            a / scale, b / scale, rtol=0, atol=rtol, err_msg=jax.tree_util.keystr(path)
        )


WEIGHTS = {"load_balance_weight": 0.3, "router_z_weight": 0.1}


def test_losses_gradients_and_statistics_do_not_depend_on_the_mesh():
    """Those of the step; tests/model/test_meshes.py has the network's, on more meshes."""
    terms = {"model": WEIGHTS, "training": {"z_loss_weight": 0.05}}
    mesh = {"data": 2, "expert": 2, "tensor": 2}
    spread, alone = (
        gradients(make_config(**terms, **more), make_batch(8)) for more in ({"mesh": mesh}, {})
    )
    assert_trees_close(spread, alone)


def test_accumulation_of_equal_microbatches_changes_nothing():
    """Two microbatches with the same rows: all statistics agree, so must every gradient.

    The auxiliary losses weigh a thousand times the usual, so that a wrong scale of theirs shows.
    """
    heavy = {"load_balance_weight": 20.0, "router_z_weight": 5.0}
    batch = jax.tree.map(lambda half: np.concatenate([half, half]), make_batch(4))
    whole = gradients(make_config(model=heavy), batch)
    cut = gradients(make_config(model=heavy, training={"gradient_accumulation": 2}), batch)
    assert_trees_close(cut, whole)
    light = gradients(make_config(model={"load_balance_weight": 0.0}), batch)
    assert optax.tree.norm(whole[0]) > 3 * optax.tree.norm(light[0])


def test_cross_entropy_under_accumulation_is_the_mean_over_all_tokens():
    """Microbatches with different numbers of real tokens: not a mean of means."""
    plain = {"load_balance_weight": 0.0}
    batch = make_batch(8)
    batch.segments_BL[:3, 2:] = 0
    whole = gradients(make_config(model=plain), batch)
    cut = gradients(make_config(model=plain, training={"gradient_accumulation": 4}), batch)
    assert_trees_close(cut[0], whole[0])
    np.testing.assert_allclose(cut[1].cross_entropy, whole[1].cross_entropy, rtol=1e-6)


def run_steps(config, batches, break_at=None):
    """States (NumPy) and metrics after each step; break_at spoils the head before that step."""
    mesh = sharding.make_mesh(**vars(config.mesh))
    placement = Placement(config, mesh)
    with jax.set_mesh(mesh):
        state = initial_state(config, mesh)
        train_step = jax.jit(steps.make_train_step(config))
        out = [(host(state), None)]
        for number, batch in enumerate(batches):
            if number == break_at:
                state.params.head_DV[...] = state.params.head_DV[...] * jnp.inf
            state, metrics = train_step(state, placement(batch))
            out.append((host(state), host(metrics)))
    return out


def test_training_on_one_batch_lowers_its_loss():
    out = run_steps(CONFIG, [make_batch(8)] * 6)
    seen = [float(metrics.losses.cross_entropy) for _, metrics in out[1:]]
    assert seen[-1] < seen[0] - 0.2
    assert [int(state.step) for state, _ in out] == list(range(7))


@pytest.mark.parametrize("microbatches", [1, 2])
def test_bfloat16_weights_train_and_the_state_keeps_its_types(microbatches):
    training = {"warmup_steps": 0, "gradient_accumulation": microbatches}
    config = make_config(model={"param_dtype": "bfloat16"}, training=training)
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        state = steps.initial_state(config, mesh)
        before = jax.tree.map(jnp.shape, state), jax.tree.map(lambda a: a.dtype, state)
        batch = Placement(config, mesh)(make_batch(8))
        step = jax.jit(steps.make_train_step(config), donate_argnums=0)
        compiled = step.lower(steps.abstract_train_state(config, mesh), batch).compile()
        losses = []
        for _ in range(4):  # a compiled step takes no other types than it was made for
            state, metrics = compiled(state, batch)
            losses.append(float(metrics.losses.total))
    assert (jax.tree.map(jnp.shape, state), jax.tree.map(lambda a: a.dtype, state)) == before
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert losses[-1] < losses[0] - 0.05


def test_bfloat16_weights_take_less_memory():
    """Neither gradients nor random bits are held for them in 4 bytes each."""
    bytes_of = {}
    for dtype in ("float32", "bfloat16"):
        sizes = {"param_dtype": dtype, "intermediate_size": 4096}
        config = make_config(model=sizes, training={"batch_size": 1})
        mesh = sharding.make_mesh()
        with jax.set_mesh(mesh):
            shapes = steps.abstract_train_state(config, mesh), Placement(config, mesh).abstract()
            step = jax.jit(steps.make_train_step(config), donate_argnums=0)
            memory = step.lower(*shapes).compile().memory_analysis()
        bytes_of[dtype] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    assert bytes_of["bfloat16"] < 0.9 * bytes_of["float32"]


def test_bfloat16_weights_keep_small_updates():
    """Rounded to the nearest, norms of 1.0 would stand still at such a rate, and so most others."""
    moved = {}
    for dtype in ("float32", "bfloat16"):
        training = {"learning_rate": 1e-4, "warmup_steps": 0, "steps": 20, "schedule": "constant"}
        config = make_config(model={"param_dtype": dtype}, training=training)
        mesh = sharding.make_mesh()
        with jax.set_mesh(mesh):
            state = initial_state(config, mesh)
            before = host(state.params)
            step = jax.jit(steps.make_train_step(config))
            batch = Placement(config, mesh)(make_batch(8))
            for _ in range(20):
                state, _ = step(state, batch)
            after = host(state.params)
        norm = [a["norm"]["weight"].get_value().astype(np.float32) for a in (after, before)]
        moved[dtype] = np.abs(norm[0] - norm[1]).mean()
    assert moved["float32"] > 1e-3
    np.testing.assert_allclose(moved["bfloat16"], moved["float32"], rtol=0.3)


def test_stochastic_rounding():
    """To one of two neighbours, on average to the value; the same on every mesh."""
    eighth = np.float32(1 + 2**-10)  # of the way from 1 to the next number of bfloat16, 1 + 2**-7
    x = np.repeat(np.float32([eighth, -eighth, 1, 0]), 4096)
    key = jax.random.key(0)
    mesh = sharding.make_mesh(data=4)
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, sharding.on(mesh, "batch"))
        split = np.asarray(jax.jit(stochastically_rounded)(placed, key), np.float32)
    with jax.set_mesh(sharding.make_mesh()):
        whole = np.asarray(jax.jit(stochastically_rounded)(x, key), np.float32)
    np.testing.assert_array_equal(split, whole)
    up, down, one, zero = whole.reshape(4, -1)
    assert set(up) == {1, 1 + 2**-7}
    assert set(down) == {-1, -1 - 2**-7}
    assert {*one, *zero} == {0, 1}
    for ups in (up > 1, down < -1):
        assert abs(ups.mean() - 1 / 8) < 4 * np.sqrt(1 / 8 * 7 / 8 / 4096)
    odd = np.float32([np.inf, -np.inf, np.nan])
    np.testing.assert_array_equal(np.float32(stochastically_rounded(odd, key)), odd)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted():
    out = run_steps(CONFIG, [make_batch(8)] * 2, break_at=1)
    (before, _), (after, metrics) = out[-2:]
    assert int(metrics.skipped) == int(metrics.skipped_in_a_row) == 1
    assert int(after.step) == 2
    assert not np.isfinite(metrics.losses.total)
    chex.assert_trees_all_equal(after.optimizer, before.optimizer)
    chex.assert_trees_all_equal(after.params.layers, before.params.layers)
    chex.assert_trees_all_equal(after.params.embedding_VD, before.params.embedding_VD)


def test_only_matrices_decay():
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        params = initial_state(CONFIG, mesh).params
    flat = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(is_matrix(params))
    }
    assert {name for name, decays in flat.items() if not decays} == {
        name for name in flat if "norm" in name
    }
    assert sum(flat.values()) == 10  # embedding, head, 4 of attention, router, 3 of the experts


def test_clipping_bounds_the_update_that_adam_sees():
    training = make_config(training={"clip_norm": 0.5}).training
    params = nnx.State({"w": nnx.Param(jnp.ones((3, 2)), logical_axes=(None, None))})
    optimizer = make_optimizer(training)
    grads = jax.tree.map(lambda p: 100 * jnp.ones_like(p), params)
    _, state = optimizer.update(grads, optimizer.init(params), params, norm=optax.tree.norm(grads))
    first_moment = optax.tree.norm(optax.tree_utils.tree_get(state, "mu"))
    np.testing.assert_allclose(first_moment, (1 - training.adam_beta1) * 0.5, rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # step:      0    5   10   60   80   90  100
        ("constant", [0, 0.5, 1, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 1 - 0.9 * 5 / 9, 1 - 0.9 * 7 / 9, 1 - 0.9 * 8 / 9, 0.1]),
        ("cosine", [0, 0.5, 1, *(0.1 + 0.45 * (1 + np.cos(np.pi * t / 9)) for t in (5, 7, 8, 9))]),
        ("warmup_stable_decay", [0, 0.5, 1, 1, 1, 0.55, 0.1]),
    ],
)
def test_schedules(schedule, expected):
    training = make_config(
        training={"schedule": schedule, "steps": 100, "warmup_steps": 10, "learning_rate": 2e-3}
    ).training
    got = [learning_rate(training)(step) for step in (0, 5, 10, 60, 80, 90, 100)]
    np.testing.assert_allclose(got, 2e-3 * np.array(expected), rtol=1e-4, atol=1e-9)


def test_a_decay_that_the_warm_up_cuts_short_still_ends_where_it_should():
    sizes = {"steps": 10, "warmup_steps": 8, "decay_fraction": 0.5, "learning_rate": 1.0}
    schedule = learning_rate(
        make_config(training={"schedule": "warmup_stable_decay", **sizes}).training
    )
    got = [schedule(step) for step in (8, 9, 10)]
    np.testing.assert_allclose(got, [1, 0.55, 0.1], rtol=1e-5)


def test_a_batch_reaches_the_mesh_in_its_order():
    config = make_config(training={"gradient_accumulation": 2}, mesh={"data": 2, "expert": 2})
    placement = Placement(config, sharding.make_mesh(data=2, expert=2))
    batch = make_batch(8)
    placed = placement(batch)
    assert placement.rows == list(range(8))
    assert placed.tokens_BL.shape == (2, 4, 9)
    np.testing.assert_array_equal(np.asarray(placed.tokens_BL).reshape(8, 9), batch.tokens_BL)
