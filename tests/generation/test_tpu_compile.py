"""Parts of prompts and decoding compile for a slice of TPUs, with none at hand."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from tiny import MODEL

from mixtral_jax import sharding
from mixtral_jax.analysis import generation_report

pytestmark = pytest.mark.tpu_compile
BATCH, LENGTH, NEW = 8, 600, 100


@pytest.fixture(scope="module")
def tpu_mesh():
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    devices = topologies.get_topology_desc("v5p:2x2x2", platform="tpu").devices
    return sharding.make_mesh(expert=4, tensor=2, devices=devices)


def test_parts_and_decoding_compile_for_tpu(tpu_mesh):
    config = dataclasses.replace(MODEL, max_position_embeddings=1024)
    batch = generation_report.Batch(BATCH, LENGTH, NEW, part=32)
    programs = generation_report.two_programs(config, tpu_mesh, batch, True)
    assert programs["prefill"].arguments[3].tokens_YL.shape == (8, 32)  # two prompts a device
    progress = programs["decode"].arguments[1]
    cache, _ = (layer.k_BKSH for layer in progress.cache)
    assert cache.shape == (BATCH, 2, 1024, 6)  # in blocks of 512
    assert cache.dtype == jnp.bfloat16
    assert tuple(cache.sharding.spec[:2]) == ("expert", "tensor")
    per_device = 2 * 2 * cache.size * cache.dtype.itemsize // tpu_mesh.size
    for program in programs.values():
        with jax.set_mesh(tpu_mesh):
            lowered = program.function.lower(*program.arguments, **program.options)
        assert "ragged_all_to_all" in lowered.as_text()
        # The cache, the largest argument, is updated in place.
        memory = lowered.compile().memory_analysis()
        assert memory.alias_size_in_bytes >= per_device


def test_decoding_gathers_no_embedding(tpu_mesh):
    """The table is [500, 24] on each device."""
    config = dataclasses.replace(MODEL, vocab_size=1000, max_position_embeddings=1024)
    batch = generation_report.Batch(BATCH, LENGTH, NEW, part=32)
    text = generation_report.two_programs(config, tpu_mesh, batch, True)["decode"].compile(tpu_mesh)
    assert "[1000,24]" not in text.as_text()


def test_decoding_copies_no_matrix(tpu_mesh):
    """The kernels read the experts' matrices, two on each device, where they lie."""
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_local_experts": 8}
    config = dataclasses.replace(MODEL, **sizes, param_dtype="bfloat16", compute_dtype="bfloat16")
    batch = generation_report.Batch(BATCH, LENGTH, NEW, part=32)
    text = generation_report.two_programs(config, tpu_mesh, batch, True)["decode"].compile(tpu_mesh)
    text = text.as_text()
    assert "gmm" in text
    matrices = r"bf16\[(2,)?(1,)?(2,256,384|2,384,256|256,384|384,256)\]"
    assert not re.search(rf"= {matrices}\S* (copy|transpose|convert|fusion|dynamic-slice)\(", text)
