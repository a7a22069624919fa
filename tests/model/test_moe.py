"""The sparse layer on every mesh against an oracle that runs every expert on every token."""

import contextlib
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from emulation import ragged_on_cpu
from flax import nnx
from harness import abstract, describe, place, plain, random_parameters
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.model import moe
from mixtral_jax.model.moe import MoE, capacity_of
from mixtral_jax.model.router import RoutingStatistics

B, L, D, F, E, K = 16, 5, 24, 10, 8, 2  # 8 experts and 16 rows, for meshes of 8
ONE = (1, 1, 1, 1)


def make_config(**changes):
    sizes = {
        "hidden_size": D,
        "intermediate_size": F,
        "num_local_experts": E,
        "num_experts_per_tok": K,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return ModelConfig(**{**sizes, **changes})


def module(config):
    return abstract(lambda: MoE(config, jax.random.key(0)))


def objective(out, statistics, g):
    """A scalar through which every output that has a gradient is felt: g weighs each number."""
    return (
        (out * g["out"]).sum()
        + (statistics.probabilities_E * g["probabilities_E"]).sum()
        + statistics.squared_logsumexp * 0.01
    )


@functools.cache
def compiled(mesh_sizes, **changes):
    """(parameters, x, real, g) -> output, statistics, gradients of parameters and of x."""
    config, mesh = make_config(**changes), sharding.make_mesh(*mesh_sizes)
    graphdef, _ = module(config)

    def scalar(params, x_BLD, real_BL, g):
        out, statistics = nnx.merge(graphdef, params)(x_BLD, real_BL)
        return objective(out, statistics, g), (out, statistics)

    gradient = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))

    def call(params, x_BLD, real_BL, g):
        ragged = ragged_on_cpu() if config.exchange == "ragged" else contextlib.nullcontext()
        with jax.set_mesh(mesh), ragged:
            g = {**place({"out": g["out"]}, mesh), "probabilities_E": g["probabilities_E"]}
            placed = place((params, x_BLD, real_BL), mesh)
            (_, outputs), gradients = gradient(*placed, g)
            out, statistics = outputs
        return plain((out, statistics, *gradients))

    return call


@functools.cache
def oracle_gradient(k):
    def scalar(p, x_BLD, real_BL, keep_TC, g):
        x_TD, real_T = x_BLD.reshape(-1, x_BLD.shape[-1]), real_BL.reshape(-1)
        out_TD, statistics = oracle.moe(x_TD, p, real_T, k, keep_TC)
        return objective(out_TD.reshape(x_BLD.shape), statistics, g)

    return oracle.gradient(scalar, (0, 1))


def expected(params, x_BLD, real_BL, g, k=K, keep=None):
    """What `compiled` gives, from the oracle; keep(ids_TC, real_T) says what is not dropped."""
    p, x_BLD, g = jax.tree.map(np.float64, (nnx.to_pure_dict(params), x_BLD, g))
    x_TD, real_T = x_BLD.reshape(-1, x_BLD.shape[-1]), real_BL.reshape(-1)
    logits_TE = x_TD @ p["router_DE"]
    ordered = np.sort(logits_TE[real_T], axis=1)[:, ::-1][:, : k + 1]
    assert (-np.diff(ordered, axis=1)).min(initial=1) > 1e-5, "too near a tie to compare"
    keep_TC = np.ones((len(x_TD), k), bool)
    if keep is not None:
        keep_TC = keep(oracle.top_k(logits_TE, k), real_T)
    out_TD, statistics = oracle.moe(x_TD, p, real_T, k, keep_TC)
    gradients = oracle_gradient(k)(p, x_BLD, real_BL, keep_TC, g)
    return out_TD.reshape(x_BLD.shape), RoutingStatistics(*statistics), *gradients


def draw(seed=0, *, batch=B, length=L, real=1.0, **changes):
    """Random parameters, activations, mask and gradient."""
    config, rng = make_config(**changes), np.random.default_rng(seed)
    params = random_parameters(module(config)[1], seed)
    x_BLD = rng.normal(size=(batch, length, config.hidden_size)).astype(np.float32)
    g = {
        "out": rng.normal(size=x_BLD.shape).astype(np.float32),
        "probabilities_E": rng.normal(size=config.num_local_experts).astype(np.float32),
    }
    return params, x_BLD, rng.random((batch, length)) < real, g


def padded():
    """A third is padding, with activations of its own; the first device's rows all are."""
    params, x_BLD, real_BL, g = draw(1, real=0.65)
    real_BL[: B // 8] = False
    x_BLD[~real_BL] *= 100
    return params, x_BLD, real_BL, g


def forced(experts, **changes):
    """Every token chooses the given experts, best first: one feature is 1 and decides."""
    params, x_BLD, real_BL, g = draw(2, **changes)
    x_BLD[..., 0] = 1
    for place_, expert in enumerate(experts):
        params["router_DE"][...][0, expert] = 30 - place_
    return params, x_BLD, real_BL, g


CASES = {
    "random": draw,
    "padding": padded,
    "all to the last device": lambda: forced([E - 1, E - 2]),
    "all to the first device": lambda: forced([0, 1]),
    "all padding": lambda: draw(3, real=0.0),
}


@functools.cache
def case(name):
    """A case with what the oracle makes of it, once for all meshes."""
    arguments = CASES[name]()
    return arguments, expected(*arguments)


MESHES = [
    ONE,
    (1, 1, 2, 1),
    (2, 1, 1, 1),
    (1, 2, 1, 1),
    (1, 1, 1, 2),
    (1, 1, 4, 1),
    (1, 2, 2, 1),
    (2, 1, 2, 1),
    (1, 1, 2, 2),
    (4, 1, 1, 1),
    (2, 2, 2, 1),
    (1, 1, 8, 1),
    (1, 2, 2, 2),
    (1, 4, 1, 2),
    (2, 1, 2, 2),
]
ODD_MESHES = [(1, 1, 3, 1), (3, 1, 1, 2), (1, 3, 2, 1), (1, 1, 2, 3), (5, 1, 1, 1), (1, 1, 6, 1)]
CAPACITY_MESHES = [ONE, (1, 1, 4, 1), (1, 2, 2, 2), (2, 2, 2, 1)]


@pytest.mark.parametrize("mesh", MESHES, ids=describe)
def test_every_mesh_gives_the_oracles_values_gradients_and_statistics(mesh):
    for name in CASES:
        arguments, wanted = case(name)
        actual = compiled(mesh)(*arguments)
        oracle.close(actual, wanted)
        assert actual[1].dropped == 0, name
        np.testing.assert_array_equal(actual[1].assignments_E, wanted[1].assignments_E)


@pytest.mark.parametrize("mesh", [ONE, (1, 1, 4, 1), (2, 1, 2, 2)], ids=describe)
def test_one_choice_and_all_tokens_to_one_expert(mesh):
    """Every row of every device lands on one expert; the others have no row, and no gradient."""
    arguments = forced([5], num_experts_per_tok=1)
    out, statistics, gradients, dx = compiled(mesh, num_experts_per_tok=1)(*arguments)
    oracle.close((out, statistics, gradients, dx), expected(*arguments, k=1))
    np.testing.assert_array_equal(statistics.assignments_E, B * L * (np.arange(E) == 5))
    assert statistics.dropped == 0
    for name in ("gate_EDF", "up_EDF", "down_EFD"):
        idle = np.delete(gradients[name], 5, axis=0)
        assert not idle.any(), f"{name}: an expert without a token has a gradient"
        assert gradients[name][5].any()


@pytest.mark.parametrize("mesh", [ONE, (2, 1, 2, 1)], ids=describe)
@pytest.mark.parametrize("k", [3, E])
def test_more_choices_up_to_every_expert(mesh, k):
    arguments = draw(4, num_experts_per_tok=k, real=0.8)
    actual = compiled(mesh, num_experts_per_tok=k)(*arguments)
    oracle.close(actual, expected(*arguments, k=k))


def test_padding_is_not_routed():
    """Padding gets zeros and gives nothing: neither to the statistics nor to a gradient."""
    params, x_BLD, real_BL, g = padded()
    run = compiled((1, 1, 4, 1))
    out, statistics, gradients, dx = run(params, x_BLD, real_BL, g)
    assert not out[~real_BL].any()
    assert not dx[~real_BL].any()
    assert statistics.tokens == real_BL.sum()
    assert statistics.assignments_E.sum() == K * real_BL.sum()
    np.testing.assert_allclose(statistics.probabilities_E.sum(), real_BL.sum(), rtol=1e-6)
    other = np.where(real_BL[..., None], x_BLD, -7)
    again = run(params, other, real_BL, g)
    chex.assert_trees_all_equal(again, (out, statistics, gradients, dx))


@pytest.mark.parametrize("exchange", ["local", "padded", "ragged"])
def test_rows_of_no_expert_may_come_out_as_anything(monkeypatch, exchange):
    """Not one of them is read, in the backward pass either."""
    original = moe.experts_of

    def with_others(x_RD, *operands, **options):
        out_RD = original(x_RD, *operands, **options)
        in_use_R = jnp.arange(x_RD.shape[0]) < operands[-1].sum()
        return jnp.where(in_use_R[:, None], out_RD, jnp.nan)

    monkeypatch.setattr(moe, "experts_of", with_others)
    mesh = ONE if exchange == "local" else (1, 1, 4, 1)
    run = compiled.__wrapped__(mesh, exchange=exchange)
    for name in ("padding", "all to the last device"):
        arguments, wanted = case(name)
        oracle.close(run(*arguments), wanted)


# ---- capacity ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "tokens", "k", "experts", "rows"),
    [(1.0, 40, 2, 8, 10), (1.25, 40, 2, 8, 13), (1.0, 41, 2, 8, 11), (0.01, 4, 1, 8, 1)],
)
def test_capacity_is_rounded_up(factor, tokens, k, experts, rows):
    assert capacity_of(factor, tokens, k, experts) == rows
    assert capacity_of(None, tokens, k, experts) is None


def capped(factor, mesh, experts=E):
    """The oracle's rule for a capacity, for `expected`."""
    devices = math.prod(mesh[:3])
    return functools.partial(oracle.keep_rows, experts=experts, factor=factor, devices=devices)


@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("mesh", CAPACITY_MESHES, ids=describe)
def test_capacity_drops_what_its_rule_says(mesh, factor):
    """Outputs, gradients and the count: the oracle applies the rule device by device."""
    run = compiled(mesh, capacity_factor=factor)
    keep = capped(factor, mesh)
    for name in CASES:
        arguments, _ = case(name)
        wanted = expected(*arguments, keep=keep)
        actual = run(*arguments)
        oracle.close(actual, wanted)
        assert actual[1].dropped == wanted[1].dropped, name
        assert wanted[1].dropped > 0 or "padding" in name, "the case tests nothing"
        chosen = expected(*arguments)[1].assignments_E
        np.testing.assert_array_equal(actual[1].assignments_E, chosen)  # before any is dropped


def test_capacity_prefers_first_choices_and_then_earlier_tokens():
    """Three tokens whose first choice is 0, then three whose second is; room for four each."""
    run = compiled(ONE, capacity_factor=4 * E / (6 * K))
    params, _, _, _ = draw(5)
    params["router_DE"][...][:] = 0
    params["router_DE"][...][:4, :4] = np.eye(4)
    x_BLD = np.zeros((1, 6, D), np.float32)
    x_BLD[0, :, :4] = [[2, 9, 0, 0]] * 3 + [[9, 2, 0, 0]] * 3  # 0 is second choice, then first
    x_BLD[0, :, 4:] = np.random.default_rng(0).normal(size=(6, D - 4))
    real_BL, g = np.ones((1, 6), bool), {"out": x_BLD, "probabilities_E": np.zeros(E, np.float32)}
    capped = run(params, x_BLD, real_BL, g)
    assert capped[1].dropped == 4  # of 6 rows each, 4 stay
    whole = compiled(ONE)(params, x_BLD, real_BL, g)[0]
    # Expert 0 keeps the firsts of tokens 3, 4, 5 and the second of 0; expert 1 the firsts of
    # 0, 1, 2 and the second of 3. So tokens 0 and 3 keep both.
    same = np.isclose(capped[0], whole, rtol=1e-5, atol=1e-6).all(axis=2)[0]
    np.testing.assert_array_equal(same, [True, False, False, True, False, False])


def test_an_ample_capacity_drops_nothing():
    arguments, wanted = case("all to the last device")
    actual = compiled((1, 1, 4, 1), capacity_factor=E / K)(*arguments)
    oracle.close(actual, wanted)
    assert actual[1].dropped == 0


# ---- room for rows received --------------------------------------------------------------------

BOUNDED = [("padded", 1.0), ("padded", 0.4), ("ragged", 1.0), ("ragged", 0.4)]


@pytest.mark.parametrize(("body", "factor"), BOUNDED, ids=str)
@pytest.mark.parametrize("mesh", [(1, 1, 4, 1), (2, 1, 2, 2)], ids=describe)
def test_a_bounded_buffer_drops_what_its_rule_says(mesh, body, factor):
    """Outputs, gradients and the count; the ragged buffer has whole blocks of 128 rows."""
    devices, shards, length = math.prod(mesh[:3]), mesh[2], 40
    rows = B * length // devices * K * factor
    room = math.ceil(rows / shards) if body == "padded" else 128 * math.ceil(rows / 128)
    keep = functools.partial(
        oracle.keep_received,
        **{"experts": E, "room": room, "devices": devices, "shards": shards},
        each=body == "padded",
    )
    run = compiled(mesh, receive_factor=factor, exchange=body)
    for arguments in (draw(1, length=length, real=0.9), forced([E - 1, E - 2], length=length)):
        wanted = expected(*arguments, keep=keep)
        actual = run(*arguments)
        oracle.close(actual, wanted)
        assert actual[1].dropped == wanted[1].dropped
    assert wanted[1].dropped > 0, "the case tests nothing"


@pytest.mark.parametrize("body", ["padded", "ragged"])
def test_an_ample_buffer_drops_nothing(body):
    arguments, wanted = case("random")
    actual = compiled((1, 1, 4, 1), receive_factor=3.0, exchange=body)(*arguments)
    oracle.close(actual, wanted)
    assert actual[1].dropped == 0


# ---- bodies ------------------------------------------------------------------------------------


RAGGED = [
    *(({}, mesh) for mesh in [(1, 1, 2, 1), (1, 1, 4, 1), (1, 2, 2, 2), (1, 1, 8, 1)]),
    *(({"capacity_factor": 0.3}, mesh) for mesh in [(1, 1, 4, 1), (2, 2, 2, 1)]),
]


@pytest.mark.parametrize(("changes", "mesh"), RAGGED, ids=str)
def test_ragged_equals_padded(changes, mesh):
    """`ragged`, on the emulated collective, gives the numbers of `padded`, the choice on CPU."""
    ragged, padded = compiled(mesh, exchange="ragged", **changes), compiled(mesh, **changes)
    for name in CASES:
        arguments, _ = case(name)
        oracle.close(ragged(*arguments), padded(*arguments), rel=1e-6)


def test_a_config_for_many_devices_runs_on_one():
    arguments, wanted = case("padding")
    oracle.close(compiled(ONE, exchange="padded")(*arguments), wanted)


def test_bfloat16_tokens_do_not_round_the_gradients_of_float32_matrices():
    params, x_BLD, real_BL, g = draw()
    out, _, gradients, _ = compiled(ONE)(params, x_BLD.astype(jnp.bfloat16), real_BL, g)
    assert out.dtype == jnp.bfloat16
    for name in ("gate_EDF", "up_EDF", "down_EFD"):
        gradient = gradients[name]
        assert gradient.dtype == np.float32
        assert (gradient != gradient.astype(jnp.bfloat16)).any(), name


def test_bodies_that_cannot_run_here_are_refused():
    arguments, _ = case("random")
    mesh = sharding.make_mesh(expert=2)
    for body, message in (("ragged", "does not run on cpu"), ("local", "2 devices")):
        config = make_config(exchange=body)
        graphdef, _ = module(config)
        params, x_BLD, real_BL = place(arguments[:3], mesh)
        layer = nnx.merge(graphdef, params)
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
            layer(x_BLD, real_BL)


# ---- any shape ---------------------------------------------------------------------------------


def layer_of(mesh, experts, k, widths, rows, length, *, real, preferred, capacity, exchange=""):
    """A layer that splits over a mesh: its sizes are multiples of what they are split over."""
    data, fsdp, expert, tensor = mesh
    changes = {
        "num_local_experts": expert * experts,
        "num_experts_per_tok": min(k, expert * experts),
        "hidden_size": 2 * fsdp * expert * widths[0],
        "intermediate_size": tensor * widths[1],
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    sizes = {"batch": data * fsdp * expert * rows, "length": length, "real": real}
    return mesh, changes, sizes, preferred, capacity, exchange if expert > 1 else ""


@st.composite
def layers(draw):
    """A layer on a mesh, a share of padding, and experts that are preferred."""
    mesh = draw(st.sampled_from([*MESHES[1:], *ODD_MESHES]))
    experts = draw(st.integers(1, 3))
    return layer_of(
        mesh,
        experts,
        draw(st.integers(1, 3)),
        (draw(st.integers(1, 3)), draw(st.integers(1, 7))),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 6)),
        real=draw(st.sampled_from([1.0, 0.5])),
        preferred=draw(st.sets(st.integers(0, mesh[2] * experts - 1))),
        capacity=draw(st.sampled_from([None, None, 0.5, 1.25])),
        exchange=draw(st.sampled_from(["", "ragged"])),
    )


THREE = layer_of(
    (1, 1, 3, 2), 3, 2, (1, 3), 1, 5, real=0.8, preferred={7}, capacity=0.7, exchange="ragged"
)
FIVE = layer_of((5, 1, 1, 1), 7, 3, (2, 3), 1, 3, real=0.8, preferred={6}, capacity=1.0)
SIX = layer_of((1, 1, 6, 1), 2, 3, (1, 5), 1, 3, real=0.7, preferred={4, 11}, capacity=None)


@pytest.mark.slow
@example(THREE, 1)
@example(FIVE, 2)
@example(SIX, 3)
@given(layers(), st.integers(0, 1000))
@settings(max_examples=6)
def test_any_shape_on_any_mesh(layer, seed):
    mesh, changes, sizes, preferred, capacity, exchange = layer
    params, x_BLD, real_BL, g = draw(seed, **sizes, **changes)
    x_BLD[..., 0] = 1
    params["router_DE"][...][0, list(preferred)] += 20  # the others get what is left, or nothing
    run = compiled(mesh, capacity_factor=capacity, exchange=exchange, **changes)
    actual = run(params, x_BLD, real_BL, g)
    keep = capacity and capped(capacity, mesh, changes["num_local_experts"])
    wanted = expected(params, x_BLD, real_BL, g, changes["num_experts_per_tok"], keep)
    oracle.close(actual, wanted)
    assert actual[1].dropped == wanted[1].dropped
