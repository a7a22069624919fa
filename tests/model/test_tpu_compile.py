"""Programs for TPU slices, compiled on a machine that has none."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from harness import abstract, describe, shapes
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax import sharding
from mixtral_jax.analysis.prices import compile_step
from mixtral_jax.config import Config, ModelConfig, TrainingConfig
from mixtral_jax.kernels import platform, splash
from mixtral_jax.model.mixtral import abstract_state, chosen_kernels
from mixtral_jax.model.moe import MoE
from mixtral_jax.training import losses as terms

pytestmark = pytest.mark.tpu_compile

CONFIG = ModelConfig(
    vocab_size=640,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=128,
    num_local_experts=8,
    num_experts_per_tok=2,
    remat="matmuls",
)


@pytest.fixture(scope="module")
def devices(optimized):
    """The eight chips of a v5p:2x2x2, of which only a description exists."""
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc("v5p:2x2x2", platform="tpu")
    except Exception as error:
        pytest.skip(f"libtpu does not start here: {str(error).splitlines()[0]}")
    return topology.devices


def lower_layer(config, mesh):
    """Forward and backward of one sparse layer on 64 bfloat16 tokens a device."""
    graphdef, state = abstract(lambda: MoE(config, jax.random.key(0)))

    def scalar(params, x_BLD, real_BL):
        out_BLD, statistics = nnx.merge(graphdef, params)(x_BLD, real_BL)
        return jnp.sum(out_BLD.astype(jnp.float32) ** 2) + statistics.squared_logsumexp

    x_BLD = jax.ShapeDtypeStruct((16, 32, config.hidden_size), jnp.bfloat16)
    real_BL = jax.ShapeDtypeStruct((16, 32), jnp.bool)
    with jax.set_mesh(mesh):
        assert platform() == "tpu"
        gradient = jax.jit(jax.value_and_grad(scalar, (0, 1)))
        return gradient.lower(*shapes((state, x_BLD, real_BL), mesh))


@pytest.mark.parametrize("sizes", [(1, 1, 8, 1), (1, 2, 4, 1)], ids=describe)
def test_the_sparse_layer_compiles_with_ragged_exchange(devices, sizes):
    lowered = lower_layer(CONFIG, sharding.make_mesh(*sizes, devices=devices))
    program = lowered.as_text()
    # Forward there and back, and the same again backward.
    assert program.count("custom_call @ragged_all_to_all") == 4
    # gate, up, down; each again for the rows' gradient and (tgmm) for the matrices'.
    assert len(re.findall(r"call @gmm\w*\(", program)) == 6
    assert len(re.findall(r"call @tgmm\w*\(", program)) == 3
    assert "tpu_custom_call" in program
    assert "chlo.ragged_dot" not in program
    memory = lowered.compile().memory_analysis()
    assert memory.temp_size_in_bytes > 0


def test_shapes_that_the_kernels_do_not_take_get_ragged_dot(devices):
    config = ModelConfig(**{**vars(CONFIG), "intermediate_size": 192, "head_dim": 64})
    mesh = sharding.make_mesh(fsdp=2, expert=4, devices=devices)
    with jax.set_mesh(mesh):
        chosen = chosen_kernels(config, 16, 32)
        assert chosen == {"exchange": "ragged", "grouped_matmul": "ragged_dot", "attention": "xla"}
        aligned = chosen_kernels(CONFIG, 8, 128)
    assert aligned == {"exchange": "ragged", "grouped_matmul": "megablox", "attention": "splash"}
    program = lower_layer(config, mesh).as_text()
    assert "chlo.ragged_dot" in program
    assert "tpu_custom_call" not in program
    assert "stablehlo.while" not in program, "the loop over blocks is for CPU"


@pytest.mark.parametrize("exchange", ["padded", "local"])
def test_the_exchange_asked_for_is_what_a_tpu_gets(devices, exchange):
    config = ModelConfig(**{**vars(CONFIG), "exchange": exchange, "capacity_factor": 1.25})
    mesh = {"padded": {"fsdp": 2, "expert": 4}, "local": {"fsdp": 8}}[exchange]
    program = lower_layer(config, sharding.make_mesh(**mesh, devices=devices)).as_text()
    assert "ragged_all_to_all" not in program
    assert ("stablehlo.all_to_all" in program) == (exchange == "padded")


@pytest.mark.parametrize("sizes", [(1, 2, 4, 1), (1, 2, 2, 2)], ids=describe)
def test_loss_and_gradient_of_a_whole_model_compile(devices, sizes):
    mesh = sharding.make_mesh(*sizes, devices=devices)
    graphdef, state = abstract_state(CONFIG)

    def loss(params, tokens_BL, targets_BL, segments_BL):
        model = nnx.merge(graphdef, params)
        out = model.forward(tokens_BL, segments_BL=segments_BL)
        sums = terms.token_sums(out.logits_BLV, targets_BL, segments_BL > 0)
        weights = {"load_balance_weight": 0.02, "router_z_weight": 0.0, "z_weight": 0.0}
        return terms.losses(sums, out.statistics, sums.tokens, **weights).total

    batch = [jax.ShapeDtypeStruct((8, 128), jnp.int32)] * 3
    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.value_and_grad(loss)).lower(*shapes((state, *batch), mesh))
        compiled = lowered.compile()
    assert "bf16" in lowered.as_text(), "a TPU computes in bfloat16 unless told otherwise"
    kept = sum(a.size * 4 for a in jax.tree.leaves(state))
    arguments = compiled.memory_analysis().argument_size_in_bytes
    assert arguments < kept / 3, "each device holds its part of the weights"


def test_memory_of_the_gradient_of_attention_grows_with_the_length(devices):
    mesh = sharding.make_mesh(fsdp=8, devices=devices)
    spec = PartitionSpec("fsdp")
    alone = jax.shard_map(
        splash.attention, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
    )

    def temporaries(length):
        shapes = (8, length, 1, 4, 128), (8, length, 1, 128), (8, length, 1, 128)
        whole = NamedSharding(mesh, spec)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole) for shape in shapes]
        segments_BL = jax.ShapeDtypeStruct((8, length), jnp.int32, sharding=whole)
        gradient = jax.grad(lambda *a: jnp.sum(alone(*a).astype(jnp.float32)), (0, 1, 2))
        compiled = jax.jit(gradient).lower(*arrays, segments_BL).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # 127 blocks of 128, if nothing were padded.
    assert temporaries(16256) < 2.5 * temporaries(8192)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_layer_computed_again_gathers_its_experts_again(devices, scan_layers):
    """Or the backward pass would find those of all layers kept, whole."""
    mesh = sharding.make_mesh(fsdp=8, devices=devices)
    training = TrainingConfig(batch_size=8, sequence_length=128)

    def gathered(remat):
        model = dataclasses.replace(CONFIG, remat=remat, scan_layers=scan_layers)
        program = compile_step(Config(model=model, training=training), mesh).as_text()
        return len(re.findall(r"= bf16\[(?:1,)?8,(?:256,384|384,256)\]\S* all-gather", program))

    assert gathered("full") == 2 * gathered("none") > 0
