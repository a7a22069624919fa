import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from harness import describe, place, plain, shapes
from whole import (
    B,
    L,
    compiled,
    expected,
    loss_of,
    make_batch,
    make_config,
    oracle_loss,
    parameters,
)

from mixtral_jax import config_io, sharding
from mixtral_jax.config import REMAT_POLICIES, ModelConfig
from mixtral_jax.model.cache import make_cache
from mixtral_jax.model.mixtral import abstract_state, compute_dtype, initialize
from mixtral_jax.model.remat import KEPT

ONE = (1, 1, 1, 1)


def test_the_oracle_has_the_gradients_of_its_own_values():
    """Differences of NumPy values against the traced gradient: the one check of the oracle."""
    rng = np.random.default_rng(0)
    config, (tokens, targets, positions, segments) = make_config(), make_batch()
    p = jax.tree.map(np.float64, nnx.to_pure_dict(parameters(config)))
    direction = jax.tree.map(lambda a: rng.normal(size=a.shape), p)
    step = 1e-6

    def along(t):
        moved = jax.tree.map(lambda a, d: a + t * d, p, direction)
        return oracle_loss(moved, tokens, targets, positions, segments, config)[0]

    measured = (along(step) - along(-step)) / (2 * step)
    parts = jax.tree.map(lambda g, d: (g * d).sum(), expected()[3], direction)
    np.testing.assert_allclose(sum(jax.tree.leaves(parts)), measured, rtol=1e-6)


def test_logits_losses_statistics_and_all_gradients_equal_the_oracles():
    actual = compiled(ONE)(parameters(make_config()), make_batch())
    oracle.close(actual, expected())
    assert actual[1].dtype == np.float32


@functools.cache
def forward(mesh_sizes=ONE, **changes):
    """forward(params, tokens, positions, segments) compiled: only logits, in NumPy."""
    mesh = sharding.make_mesh(*mesh_sizes)
    graphdef, _ = abstract_state(make_config(**changes))
    run = jax.jit(lambda params, *batch: nnx.merge(graphdef, params)(*batch))

    def call(params, *batch):
        with jax.set_mesh(mesh):
            return np.asarray(run(*place((params, *batch), mesh)))

    return call


def test_positions_and_segments_default_to_one_document_a_row():
    params, tokens = parameters(make_config()), make_batch()[0]
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    explicit = forward()(params, tokens, positions, np.ones((B, L), np.int32))
    np.testing.assert_array_equal(forward()(params, tokens), explicit)


def test_packed_documents_equal_documents_alone():
    """Each document of a packed row, alone in a row of its own, gets the same logits."""
    params = parameters(make_config())
    tokens, _, positions, segments = make_batch()
    packed = forward()(params, tokens, positions, segments)
    for document in (1, 2):
        alone = [np.zeros((B, L), np.int32) for _ in range(3)]
        for row in range(B):
            mine = segments[row] == document
            for array, value in zip(alone, (tokens, positions, np.ones_like(tokens))):
                array[row, : mine.sum()] = value[row, mine]
        logits = forward()(params, *alone)
        for row in range(B):
            mine = segments[row] == document
            oracle.close(logits[row, : mine.sum()], packed[row, mine], rel=2e-6)


def test_another_document_in_the_row_changes_nothing():
    params, run = parameters(make_config()), forward()
    tokens, _, positions, segments = make_batch()
    other = np.where(segments == 1, tokens, (tokens + 5) % 38)
    a, b = (run(params, t, positions, segments)[segments == 1] for t in (tokens, other))
    np.testing.assert_array_equal(a, b)


def test_the_future_changes_nothing():
    params, run, tokens = parameters(make_config()), forward(), make_batch()[0]
    later = tokens.copy()
    later[:, 4:] = (later[:, 4:] + 3) % 38
    a, b = run(params, tokens), run(params, later)
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert (a[:, 4:] != b[:, 4:]).any()


# ---- memory for time ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remat", "mesh"),
    [
        ("full", ONE),
        ("attention_out", (1, 2, 1, 1)),
        ("matmuls", ONE),
        ("full", (1, 1, 2, 2)),
        ("matmuls", (1, 1, 2, 2)),
        ("no_down", ONE),
        ("no_up", (1, 1, 2, 1)),
        ("no_experts", (1, 1, 2, 2)),
        ("matmuls_rows", (1, 1, 2, 1)),
    ],
    ids=str,
)
def test_remat_changes_no_number(remat, mesh):
    arguments = parameters(make_config()), make_batch()
    oracle.close(compiled(mesh, remat=remat)(*arguments), expected())


def test_every_policy_in_the_config_exists():
    assert {"none", *KEPT} == set(REMAT_POLICIES)


@functools.cache
def saved_bytes(remat, mesh_sizes=ONE, **changes):
    """Bytes that the forward pass keeps for the backward pass."""
    graphdef, state = abstract_state(make_config(remat=remat, **changes))
    mesh = sharding.make_mesh(*mesh_sizes)

    def residuals(params, *batch):
        return jax.vjp(lambda p: loss_of(graphdef, p, *batch)[0], params)[1]

    with jax.set_mesh(mesh):
        kept = jax.tree.leaves(jax.eval_shape(residuals, *shapes((state, *make_batch()), mesh)))
    return sum(a.size * a.dtype.itemsize for a in kept)


@pytest.mark.parametrize("mesh", [ONE, (1, 1, 2, 1)], ids=describe)
def test_each_policy_keeps_more_than_the_last(mesh):
    sizes = [saved_bytes(name, mesh) for name in ("full", "attention_out", "matmuls", "none")]
    assert sizes == sorted(set(sizes)), sizes


def test_full_and_attention_out_keep_one_array_a_layer_each():
    layers, array = 3, B * L * 24 * 4
    grows = {
        name: saved_bytes(name, num_hidden_layers=2 * layers) - saved_bytes(name)
        for name in ("full", "attention_out")
    }
    layer = nnx.to_pure_dict(abstract_state(make_config())[1])["layers"]
    weights = sum(a.size * 4 for a in jax.tree.leaves(layer))
    assert grows["attention_out"] - grows["full"] == layers * array
    assert grows["full"] - weights < 1.5 * layers * array


def test_matmuls_keeps_the_result_of_every_matrix_product():
    """Queries, keys, values of each token; gate, up and down of each row; and where rows go.

    The policies between leave out the experts' products, one after another.
    """
    config = make_config()
    tokens, heads = B * L, config.num_attention_heads + 2 * config.num_key_value_heads
    rows, experts = tokens * config.num_experts_per_tok, config.num_local_experts
    kept = tokens * heads * config.head_size + 2 * rows + 2 * experts
    for policy, size in (
        ("no_experts", 0),
        ("no_up", config.intermediate_size),
        ("no_down", 2 * config.intermediate_size),
        ("matmuls", 2 * config.intermediate_size + config.hidden_size),
    ):
        more = saved_bytes(policy) - saved_bytes("attention_out")
        assert more == 4 * config.num_hidden_layers * (kept + rows * size), policy


def test_unrolled_layers_change_no_number():
    arguments = parameters(make_config()), make_batch()
    oracle.close(compiled(ONE, scan_layers=False)(*arguments), expected())


# ---- the cache ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [ONE, (1, 1, 2, 2), (2, 2, 1, 1)], ids=describe)
def test_prefill_and_single_tokens_equal_the_full_pass(mesh):
    """Rows whose prompts differ in length: padding of a prompt is overwritten, never seen."""
    config, made = make_config(), sharding.make_mesh(*mesh)
    params, (tokens, *_) = parameters(config), make_batch(3)
    graphdef, _ = abstract_state(config)
    prompt_B, longest, slots = np.array([1, 2, 3, 4, 4, 3, 2, 1]), 4, 9

    @jax.jit
    def step(params, tokens_BL, positions_BL, segments_BL, cache, logits_at_B):
        model = nnx.merge(graphdef, params)
        out = model.forward(tokens_BL, positions_BL, segments_BL, cache, logits_at_B)
        return out.logits_BLV, out.cache

    with jax.set_mesh(made):
        full = forward(mesh)(params, tokens)
        params = place(params, made)
        cache = make_cache(config, B, slots, jnp.float32, True)
        at = np.broadcast_to(np.arange(longest, dtype=np.int32), (B, longest))
        real = (at < prompt_B[:, None]).astype(np.int32)
        garbage = np.where(real, tokens[:, :longest], 37)
        inputs = place((garbage, at, real), made)
        logits, cache = step(params, *inputs, cache, *place((prompt_B - 1,), made))
        got = [np.asarray(logits)[:, 0]]
        for i in range(3):
            place_B = (prompt_B + i).astype(np.int32)[:, None]
            token = np.take_along_axis(tokens, place_B, axis=1)
            inputs = place((token, place_B, np.ones_like(token)), made)
            logits, cache = step(params, *inputs, cache, *place((0 * prompt_B,), made))
            got.append(np.asarray(logits)[:, 0])
    for i, logits in enumerate(got):
        wanted = np.take_along_axis(full, (prompt_B - 1 + i)[:, None, None], axis=1)[:, 0]
        oracle.close(logits, wanted, rel=3e-6)


# ---- types -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("param_dtype", "mesh"), [("float32", ONE), ("bfloat16", (1, 1, 2, 2))], ids=str
)
def test_bfloat16_runs_and_is_close(param_dtype, mesh):
    """Gradients come in the parameters' type; bfloat16 has 8 bits, three layers lose a few more."""
    config = make_config(compute_dtype="bfloat16", param_dtype=param_dtype)
    params = jax.tree.map(lambda a: a.astype(jnp.dtype(param_dtype)), parameters(config))
    losses, logits, _, gradients = compiled(
        mesh, compute_dtype="bfloat16", param_dtype=param_dtype
    )(params, make_batch())
    wanted = expected()
    assert logits.dtype == np.float32
    assert abs(losses.total / wanted[0].total - 1) < 0.02
    off = np.abs(logits - wanted[1]) / np.abs(wanted[1]).max()
    assert np.median(off) < 0.01
    for got in jax.tree.leaves(gradients):
        assert got.dtype == jnp.dtype(param_dtype)
        assert np.isfinite(got.astype(np.float32)).all()


def test_compute_type_is_float32_on_cpu_unless_asked():
    assert compute_dtype(make_config()) == jnp.float32
    assert compute_dtype(make_config(compute_dtype="bfloat16")) == jnp.bfloat16


# ---- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "total", "total_active"),
    [
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248),
        ("mixtral_8x22b", 140_620_634_112, 39_152_031_744),
        ("tiny", None, None),
    ],
)
def test_parameter_counts(preset, total, total_active):
    config = make_config()
    if total:
        config = config_io.from_dict({"model": {"preset": preset}}).model
    _, state = abstract_state(config)
    counted = sum(a.size for a in jax.tree.leaves(state))
    experts = nnx.to_pure_dict(state)["layers"]["moe"]
    of_experts = sum(experts[name].size for name in ("gate_EDF", "up_EDF", "down_EFD"))
    active = config.num_experts_per_tok * of_experts // config.num_local_experts
    assert counted == config.num_parameters
    assert counted - of_experts + active == config.num_active_parameters
    if total:
        assert (config.num_parameters, config.num_active_parameters) == (total, total_active)


def test_every_parameter_names_an_axis_for_each_dimension():
    _, state = abstract_state(ModelConfig())
    for path, param in nnx.to_flat_state(state):
        axes = param.get_metadata("logical_axes")
        assert len(axes) == len(param.shape), path
        used = [a for axis in axes for a in np.atleast_1d(sharding.RULES[axis] or [])]
        assert len(used) == len(set(used)), f"{path} uses a mesh axis twice"
        assert path[0] != "layers" or axes[0] == "layers", path


def test_parameters_lie_where_their_axes_say():
    mesh = sharding.make_mesh(1, 2, 2, 2)
    state = nnx.state(initialize(make_config(), jax.random.key(0), mesh))
    parts = {
        ".".join(map(str, path)): param[...].addressable_shards[0].data.size * 8 / param[...].size
        for path, param in nnx.to_flat_state(state)
    }
    for name, part in parts.items():  # copies of a parameter that the mesh holds
        copies = {"norm": 8, "router_DE": 2}
        assert part == next((n for word, n in copies.items() if word in name), 1), name


def test_initial_weights_are_the_same_on_every_mesh():
    key, config = jax.random.key(7), make_config()
    one = plain(nnx.state(initialize(config, key, sharding.make_mesh())))
    for sizes in [(2, 1, 2, 1), (1, 2, 2, 2)]:
        other = plain(nnx.state(initialize(config, key, sharding.make_mesh(*sizes))))
        chex.assert_trees_all_equal(other, one, strict=True)


def test_initial_weights_are_normal_and_all_different():
    config = make_config(hidden_size=48, initializer_range=0.05, param_dtype="bfloat16")
    state = nnx.state(initialize(config, jax.random.key(1), sharding.make_mesh()))
    seen = []
    for path, param in nnx.to_flat_state(state):
        value = np.asarray(param[...], np.float32)
        assert param[...].dtype == jnp.bfloat16
        if "norm" in "".join(map(str, path)):
            np.testing.assert_array_equal(value, 1)
            continue
        np.testing.assert_allclose(value.std(), 0.05, rtol=0.15, err_msg=str(path))
        assert abs(value.mean()) < 0.01, path
        seen += [layer.ravel()[:20] for layer in (value if path[0] == "layers" else [value])]
    assert len(np.unique(np.stack(seen), axis=0)) == len(seen), "two matrices start the same"
