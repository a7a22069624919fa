"""The cost model beside sums made by hand, and beside compile reports of the real model."""

import jax
import pytest

from mixtral_jax.analysis import chips, cost_model, torus
from mixtral_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    TrainingConfig,
)
from mixtral_jax.model.flops import training_flops_per_token
from mixtral_jax.model.mixtral import abstract_state

GIB = 2**30


def make_config(mesh, batch, length=4096, accumulation=1, **model):
    return Config(
        ModelConfig(**model),
        MeshConfig(**mesh),
        TrainingConfig(
            batch_size=batch, sequence_length=length, gradient_accumulation=accumulation
        ),
        DataConfig(source="synthetic"),
    )


SMALL = {
    "vocab_size": 96,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    ("remat", "products"),
    [("full", 3), ("no_up", 2), ("no_down", 1), ("matmuls", 0), ("matmuls_rows", 0), ("none", 0)],
)
def test_flops_are_the_models_and_what_is_recomputed(remat, products):
    config = make_config({"fsdp": 2, "expert": 2}, 8, 7, remat=remat, **SMALL)
    tokens = 8 * 7 / 4
    found = cost_model.estimate(config, chips.parse("v5p:2x2x1"), 1).flops
    # Attention on arrays is not causal; what the model counts of it is.
    causal = 6 * 3 * 60 * 7
    model = training_flops_per_token(config.model, 7) - causal
    attention = 3 * (6 + 2 * (remat != "none")) * 2 * 7 * 60
    again = 3 * products * 2 * 2 * 24 * 40
    if remat != "none":
        again += 3 * 2 * 24 * 4  # the router
    if remat == "full":
        again += 3 * (2 * 24 * 10 * (6 + 4) + 2 * 60 * 24)
    assert found == pytest.approx(tokens * (model + attention + again))


def test_splash_attention_computes_the_blocks_of_a_causal_mask():
    config = make_config({}, 1, 4096, remat="matmuls")
    full = make_config({}, 1, 4096, remat="matmuls", attention="xla")
    sizes = cost_model.sizes_of(config)
    one = 32 * 2 * 4096 * 4096 * 4096
    assert cost_model._attention_flops(config, sizes) == 7 * one * 10 / 16
    assert cost_model._attention_flops(full, sizes) == 8 * one


@pytest.mark.parametrize(("remat", "again", "kept"), [("matmuls", 5, 0), ("none", 0, 1.5)])
def test_scores_that_no_kernel_hides_take_memory_and_time(remat, again, kept):
    batch = {"mesh": {"tensor": 2}, "batch": 3, "remat": remat}
    kernel, held = (make_config(**batch, length=4096, attention=name) for name in ("", "xla"))
    scores, output = 4 * 16 * 3 * 4096**2, 3 * 4096 * 16 * (128 * 2 + 4)
    sizes = cost_model.sizes_of(held)
    found = cost_model.estimate(held, chips.parse("v5p:2x1x1"), 1)
    assert found.bytes["working"] == 2 * scores
    more = cost_model.kept_bytes(held, sizes) - cost_model.kept_bytes(kernel, sizes)
    assert more == kept * scores - output
    more = cost_model._traffic(held, sizes, 1) - cost_model._traffic(kernel, sizes, 1)
    assert more == 32 * (11 + again) * scores
    one = make_config({"tensor": 2}, 1, 15000, remat=remat)  # no multiple of 128
    found = cost_model.estimate(one, chips.parse("v5p:2x1x1"), 1)
    assert found.bytes["working"] == 1.5 * 4 * 16 * 15000**2


def test_long_sequences_are_padded_and_their_backward_pass_makes_scores_twice():
    config = make_config({}, 1, 16256, remat="matmuls")
    one = 32 * 2 * 16384 * 16384 * 4096
    found = cost_model._attention_flops(config, cost_model.sizes_of(config))
    assert found == pytest.approx(9 * one * 17 / 32)


def test_bytes_by_hand():
    mesh = {"fsdp": 2, "expert": 2, "tensor": 2}
    config = make_config(mesh, 8, 7, remat="no_up", receive_factor=1.5, **SMALL)
    sizes = cost_model.sizes_of(config)
    assert (sizes.tokens, sizes.rows, sizes.buffer) == (14, 28, 56)  # 128 rows, but for the worst
    assert (sizes.hidden, sizes.matrices) == (20, 3 * 2 * 24 * 20)
    attention = 14 * 5 * (6 + 4) * 2 + 14 * 24 * 2 + 28 * 8
    assert cost_model.kept_bytes(config, sizes) == 14 * 24 * 2 + attention + 56 * 20 * 2
    found = cost_model.estimate(config, chips.parse("v5p:2x2x2"), 1).bytes
    norms = 7 * 24
    held = (config.model.num_parameters - norms) / 8 + norms
    assert cost_model.parameters(config) == held
    assert found["state"] == 3 * 4 * held
    assert found["gradients"] == 2 * 4 * held


def test_microbatches_take_time_and_no_memory_but_for_the_sum():
    target = chips.parse("v5p:4x4x4")
    once = cost_model.estimate(make_config({"fsdp": 64}, 64, remat="full"), target, 1)
    thrice = cost_model.estimate(
        make_config({"fsdp": 64}, 192, accumulation=3, remat="full"), target, 1
    )
    assert thrice.flops == pytest.approx(3 * once.flops)
    assert thrice.bytes["kept"] == once.bytes["kept"]
    assert 2.5 * once.step_seconds < thrice.step_seconds < 3 * once.step_seconds


def test_parameters_are_those_of_the_abstract_model():
    config = make_config({}, 1, 7, **SMALL)
    state = jax.tree.leaves(abstract_state(config.model)[1])
    assert cost_model.parameters(config) == sum(leaf.size for leaf in state)


# mesh, sequences, policy, factor; GiB, the compiler's seconds of the rows in use and our price for
# attention (None where the kernels had other tiles), seconds on links.
# From `python train.py --config configs/planned.yaml model.preset=mixtral_8x7b ... --compile-only`.
REPORTS = [
    ("v5p:4x4x4", {"fsdp": 16, "expert": 4}, 128, "no_up", 1.25, 49.12, 2.687, 0.317),
    ("v5p:4x4x4", {"fsdp": 64}, 128, "matmuls", None, 61.63, 2.208, 0.728),
    ("v5p:4x4x4", {"fsdp": 64}, 192, "matmuls", None, 83.99, 3.121, 0.728),
    ("v6e:16x16", {"fsdp": 64, "expert": 4}, 256, "matmuls", 1.25, 31.11, 0.815, 0.490),
    ("v6e:16x16", {"fsdp": 256}, 256, "matmuls", None, 28.66, None, 0.953),
]


@pytest.mark.parametrize("report", REPORTS, ids=lambda r: f"{r[0]} {r[1]} {r[3]} {r[2]}")
def test_the_model_is_near_compile_reports(report):
    name, mesh, batch, remat, factor, gib, compiler, links = report
    config = make_config(mesh, batch, remat=remat, receive_factor=factor)
    found = cost_model.estimate(config, chips.parse(name), 1)
    assert found.total_bytes / GIB == pytest.approx(gib, rel=0.06)
    if compiler is not None:
        seconds = found.step_seconds - found.seconds["interconnect"]
        assert seconds == pytest.approx(compiler, rel=0.07)
    assert found.seconds["interconnect"] == pytest.approx(links, rel=0.06)


# ---- the torus ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes", "links"),
    [
        ("v5p:4x4x4", (1, 64, 1, 1), [[], [(4, 2)] * 3, [], []]),
        ("v5p:4x4x4", (1, 16, 4, 1), [[], [(4, 2)] * 2, [(4, 2)], []]),
        ("v5p:4x4x4", (1, 8, 8, 1), [[], [(2, 1), (4, 2)], [(4, 2), (2, 1)], []]),
        ("v6e:16x16", (1, 64, 4, 1), [[], [(16, 2), (4, 1)], [(4, 1)], []]),
        ("v6e:8x16", (1, 1, 32, 4), [[], [], [(2, 1), (16, 2)], [(4, 1)]]),
        ("tpu7x:2x2x1", (1, 4, 1, 2), [[], [(2, 1), (2, 1)], [], []]),
    ],
)
def test_mesh_axes_lie_on_the_torus(name, sizes, links):
    target = chips.parse(name)
    found = torus.lay_out(target, sizes)
    assert [sorted(axis) for axis in found] == [sorted(axis) for axis in links]


def test_seconds_of_gathers_and_exchanges():
    chip = chips.CHIPS["v5p"]  # 100 GB/s a link
    ring = [(4, 2)]
    assert torus.gather_seconds(64e9, 4, ring, chip) == pytest.approx(64 * 3 / 4 / 200)
    assert torus.gather_seconds(64e9, 1, [], chip) == 0
    staged = torus.staged_gather_seconds(64e9, 64, ring * 3, chip)
    assert staged == pytest.approx(4 * 3 / 4 / 200 + 64 * 15 / 16 / 400)
    split = torus.staged_gather_seconds(64e9, 32, [*ring * 2, (2, 1)], chip)
    assert split == pytest.approx(8 * 3 / 4 / 200 + 64 * 7 / 8 / 300)
    assert torus.all_to_all_seconds(64e9, ring, chip) == pytest.approx(64 / 2 / 100)
    assert torus.network_seconds(50e9, 2, chip) == pytest.approx(8)
    assert torus.network_gather_seconds(50e9, 3, chip) == pytest.approx(16)


@pytest.mark.parametrize(
    ("mesh", "passes", "crossing"),
    [({"data": 3, "fsdp": 4}, 3, 2 * 2 / 3), ({"fsdp": 12}, 4, 3 * 2)],
)
def test_what_crosses_the_network_depends_on_the_axis_that_spans_the_slices(mesh, passes, crossing):
    config = make_config(mesh, 24, 7, accumulation=2, **SMALL)
    layer = 2 * (3 * 4 * 24 * 40 + 2 * 24 * 10 * (6 + 2))
    inside = (3 * passes * layer + 2 * 2 * 2 * 96 * 24) * 3 / 4
    between = crossing * 2 * cost_model.parameters(config)
    found = cost_model.estimate(config, chips.parse("v5p:2x2x1"), slices=3).seconds
    assert found["interconnect"] == pytest.approx(2 * (inside / 200e9 + between / 6.25e9))


def test_rows_that_are_kept_are_not_exchanged_again():
    again, kept = (
        cost_model.estimate(
            make_config({"fsdp": 8, "expert": 8}, 64, remat=remat, receive_factor=1.0),
            chips.parse("v5p:4x4x4"),
            1,
        )
        for remat in ("matmuls", "matmuls_rows")
    )
    rows = 32 * 2 * 4096 * 4096 * 2  # a device's, of all layers
    assert kept.bytes["kept"] - again.bytes["kept"] == pytest.approx(rows)
    assert kept.seconds["memory"] < again.seconds["memory"]
    assert kept.seconds["interconnect"] < again.seconds["interconnect"]
