"""A training step and decoding, compiled for GPUs that are not there, most of it for an H200.

Nothing runs, so no GPU is needed: XLA takes a description of one (analysis/gpus.py). Of
requirements-gpu.txt it wants JAX's two plugins; cuDNN's attention only where it is.
"""

import dataclasses
import re
from collections import Counter
from importlib import metadata

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P
from whole import KERNEL_SIZES

from mixtral_jax import sharding
from mixtral_jax.analysis import generation_report
from mixtral_jax.analysis import gpus as gpus_module
from mixtral_jax.analysis.gpus import get_devices
from mixtral_jax.analysis.prices import compile_step
from mixtral_jax.config import Config, MeshConfig, ModelConfig, TrainingConfig
from mixtral_jax.kernels import few_rows, few_tokens
from mixtral_jax.training.step import kernels_of_step

CUDNN = any(d.name.startswith("nvidia-cudnn") for d in metadata.distributions())
MODEL = ModelConfig(**KERNEL_SIZES, compute_dtype="bfloat16", param_dtype="bfloat16")
OTHERS = {  # than an H200: the name, compute capability and bytes of shared memory of a block
    "a100": ("NVIDIA A100-SXM4-80GB", "major: 8", 166_912),
    "rtx4090": ("NVIDIA GeForce RTX 4090", "major: 8 minor: 9", 101_376),
}


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Some GPUs of one host, by their number and kind."""
    package = "jax_cuda13_plugin"
    pytest.importorskip(package, reason=f"{package} is not installed: no program for GPU")

    def make(number, kind="h200"):
        if kind in OTHERS:
            name, capability, shared = OTHERS[kind]
            text = gpus_module.DESCRIPTION.read_text(encoding="utf-8").replace("$name", name)
            text = text.replace("major: 9 feature_extension: ACCELERATED_FEATURES", capability)
            described = tmp_path / "other.txtpb"
            described.write_text(text.replace("232448", str(shared)), encoding="utf-8")
            monkeypatch.setattr(gpus_module, "DESCRIPTION", described)
        return get_devices("h200", number)

    return make


@pytest.mark.parametrize(("number", "exchange"), [(1, "local"), (4, "ragged")])
def test_a_training_step(gpus, number, exchange):
    """Each row is multiplied with its own expert alone, and one GPU sums over no axis."""
    attention = "cudnn" if CUDNN else "xla"
    model = dataclasses.replace(MODEL, attention="" if CUDNN else "xla")
    training = TrainingConfig(batch_size=2 * number, sequence_length=256)
    config = Config(model=model, training=training, mesh=MeshConfig(expert=number))
    mesh = sharding.make_mesh(expert=number, devices=gpus(number))
    with jax.set_mesh(mesh):
        chosen = kernels_of_step(config)
    assert chosen == {"exchange": exchange, "grouped_matmul": "hopper", "attention": attention}
    program = compile_step(config, mesh).as_text()
    # gate, up, down; each again for the rows' gradient and for the matrices'.
    assert program.count('custom_call_target="mosaic_gpu') == 9
    assert ("fmha" in program) == CUDNN
    assert not re.search(r" dot\(.*ragged_dot", program)
    assert ("all-reduce" in program) == (number > 1)
    assert ("ragged-all-to-all" in program) == (number > 1)
    assert "TD,PDE->PTE" in program  # the router's product, on matrix units


@pytest.mark.parametrize(
    ("kind", "dtype", "sizes"),
    [
        ("h200", "float32", (192, 320)),
        ("a100", "bfloat16", (256, 384)),
    ],
)
def test_a_training_step_of_any_size_and_type_and_on_any_gpu(gpus, kind, dtype, sizes):
    """The experts' products are of a block of rows with one expert's matrix."""
    changes = dict(zip(("hidden_size", "intermediate_size"), sizes), compute_dtype=dtype)
    model = dataclasses.replace(MODEL, **changes, attention="xla", num_hidden_layers=1)
    config = Config(model=model, training=TrainingConfig(batch_size=2, sequence_length=256))
    mesh = sharding.make_mesh(devices=gpus(1, kind))
    with jax.set_mesh(mesh):
        assert kernels_of_step(config)["grouped_matmul"] == "blocks"
    program = compile_step(config, mesh).as_text()
    products = re.findall(r" = \w+\[([\d,]*)\]\S* (?:dot|custom-call)\(.*/experts/", program)
    assert products
    assert not any("1024" in shape.split(",") for shape in products)  # as many rows as there are


def test_layers_apart_move_no_matrix_in_vain(gpus):
    """Those computed again read theirs where they lie, and one kernel updates each with its
    moments, from gradients that were put together once."""
    changes = {"grouped_matmul": "hopper", "attention": "xla", "param_dtype": "float32"}
    model = dataclasses.replace(MODEL, **changes, remat="matmuls", scan_layers=False)
    training = TrainingConfig(batch_size=2, sequence_length=256)
    mesh = sharding.make_mesh(devices=gpus(1))
    program = compile_step(Config(model=model, training=training), mesh).as_text()
    made = Counter(re.findall(r"= (bf16\[[\d,]*,(?:256,384|384,256)\])\S* fusion\(", program))
    # Stacks, of weights and of gradients: gate and up; down.
    assert made == {"bf16[2,8,256,384]": 4, "bf16[2,8,384,256]": 2}
    for shape, updated in (("2,8,256,384", 2), ("2,8,384,256", 1)):
        one = rf"f32\[{shape}\]\S*"
        assert len(re.findall(rf"= \({one}, {one}, {one}\) fusion\(", program)) == updated
        assert not re.search(rf"= {one} (fusion|copy)\(", program)


@pytest.mark.parametrize(
    ("sequences", "triton", "mosaic"), [(1, 7, 0), (few_rows.MOST, 7, 0), (few_rows.MOST + 1, 1, 3)]
)
def test_decoding_copies_no_matrix_and_is_one_graph(gpus, tmp_path, sequences, triton, mosaic):
    """Of a layer: two norms, two products of attention, it itself, and two kernels of the experts
    for a few tokens; for more, attention itself and three of the experts.

    XLA writes down what it runs one after another: a CUDA graph, and nothing for which the host
    waits within a step, as for a loop or a large sort, in a branch that is not taken too.
    """
    mesh = sharding.make_mesh(devices=gpus(1))
    model = dataclasses.replace(MODEL, hidden_size=512, intermediate_size=2048)
    batch = generation_report.Batch(sequences=sequences, prompt_length=64, max_new_tokens=64)
    program = generation_report.two_programs(model, mesh, batch, True)["decode"]
    compiled = program.compile(mesh, {"xla_dump_to": str(tmp_path)})
    (run,) = tmp_path.glob("*decode*.thunk_sequence_after_thunk_passes.txt")
    outer = re.findall(r"^\d+: (\w+)", run.read_text(encoding="utf-8"), re.MULTILINE)
    assert outer == ["kCommandBuffer"]
    assert not re.search(rf"\[(\d+,)?{model.vocab_size}\]\S* sort\(", compiled.as_text())
    called = re.findall(r'custom_call_target="([^"]*)"', compiled.as_text())
    assert called.count("__gpu$xla.gpu.triton") == triton * model.num_hidden_layers
    assert called.count("mosaic_gpu_v2") == mosaic * model.num_hidden_layers
    if not mosaic:  # caches are written to where they lie
        assert not re.search(r"= bf16\[\d+,2,\d{3,},128\]\S* (copy|fusion)\(", compiled.as_text())
    one_layer = 2 * 3 * 8 * 512 * 2048
    room = 4 if sequences == few_rows.MOST else 8  # for that many, parts of sums take more
    assert compiled.memory_analysis().temp_size_in_bytes < one_layer / room


def test_the_experts_of_few_tokens_fit_into_99_kib_of_shared_memory(gpus):
    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype)

    into, out_of = shape(8, 256, 3584), shape(8, 3584, 256)
    chosen = (shape(few_rows.MOST, 2, dtype=t) for t in (jnp.int32, jnp.float32))
    mesh = sharding.make_mesh(devices=gpus(1, "rtx4090"))
    with jax.set_mesh(mesh):
        body = jax.shard_map(few_tokens.parts, in_specs=P(), out_specs=P(), check_vma=False)
        jax.jit(body).lower(shape(few_rows.MOST, 256), into, into, out_of, *chosen).compile()
