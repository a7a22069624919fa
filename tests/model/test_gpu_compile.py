"""A training step and decoding, compiled for an H200 that is not there; wants requirements-gpu.txt.

Nothing runs, so no GPU is needed: XLA takes a description of one (tests/data/h200.txtpb).
"""

import dataclasses
import pathlib
import re

import jax
import pytest

from mixtral_jax import sharding
from mixtral_jax.analysis import generation_report
from mixtral_jax.analysis.prices import compile_step
from mixtral_jax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from mixtral_jax.kernels import few_rows
from mixtral_jax.training.step import kernels_of_step

CHIP = pathlib.Path(__file__).parents[1] / "data" / "h200.txtpb"
MODEL = ModelConfig(
    vocab_size=640,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_local_experts=8,
    num_experts_per_tok=2,
    compute_dtype="bfloat16",
    param_dtype="bfloat16",
)


@pytest.fixture
def gpus(monkeypatch):
    """Some H200s of one host, by their number."""
    for package in ("jax_cuda13_plugin", "tokamax"):
        pytest.importorskip(package, reason=f"{package} is not installed: no program for GPU")
    from jax.experimental import topologies
    from jax.extend import backend

    def make(number):
        described = {"topology": f"1x{number}x1", "target_config": CHIP.read_text()}
        devices = topologies.get_topology_desc("", platform="cuda", **described).devices
        # By it tokamax knows what it is about to compile for.
        monkeypatch.setattr(backend, "get_default_device", lambda: devices[0])
        return devices

    return make


@pytest.mark.parametrize(("number", "exchange"), [(1, "local"), (4, "ragged")])
def test_a_training_step(gpus, number, exchange):
    """Each row is multiplied with its own expert alone, and one GPU sums over no axis."""
    training = TrainingConfig(batch_size=2 * number, sequence_length=256)
    config = Config(model=MODEL, training=training, mesh=MeshConfig(expert=number))
    mesh = sharding.make_mesh(expert=number, devices=gpus(number))
    with jax.set_mesh(mesh):
        chosen = kernels_of_step(config)
    assert chosen == {"exchange": exchange, "grouped_matmul": "hopper", "attention": "cudnn"}
    program = compile_step(config, mesh).as_text()
    # gate, up, down; each again for the rows' gradient and for the matrices'.
    assert program.count('custom_call_target="mosaic_gpu') == 9
    assert "fmha" in program
    assert not re.search(r" dot\(.*ragged_dot", program)
    assert ("all-reduce" in program) == (number > 1)
    assert ("ragged-all-to-all" in program) == (number > 1)


@pytest.mark.parametrize(
    ("sequences", "triton", "mosaic"), [(1, 5, 0), (few_rows.MOST, 5, 0), (few_rows.MOST + 1, 1, 3)]
)
def test_decoding_copies_no_matrix(gpus, sequences, triton, mosaic):
    """Of a layer: two products of attention, it itself, and two kernels of the experts for a few
    tokens; for more, attention itself and three of the experts."""
    mesh = sharding.make_mesh(devices=gpus(1))
    model = dataclasses.replace(MODEL, hidden_size=512, intermediate_size=2048)
    batch = generation_report.Batch(sequences=sequences, prompt_length=64, max_new_tokens=64)
    program = generation_report.two_programs(model, mesh, batch)["decode"]
    compiled = program.compile(mesh)
    called = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
    assert called.count("__gpu$xla.gpu.triton") == triton * model.num_hidden_layers
    assert called.count("mosaic_gpu_v2") == mosaic * model.num_hidden_layers
    one_layer = 2 * 3 * 8 * 512 * 2048
    assert compiled.memory_analysis().temp_size_in_bytes < one_layer / 4
