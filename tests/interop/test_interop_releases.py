"""The releases' files, planned whole: their names, shapes and shards, and holes for numbers."""

import itertools
import json
import math
import resource
import time

import jax
import numpy as np
import pytest

from mixtral_jax import sharding
from mixtral_jax.config import InputError, MeshConfig, check_mesh
from mixtral_jax.interop import folders, names
from mixtral_jax.model.mixtral import abstract_state

# config.json of Mixtral-8x7B-v0.1 and Mixtral-8x22B-v0.1, as transformers 4 wrote them.
COMMON = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}
RELEASES = {
    "8x7b": COMMON
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "router_aux_loss_coef": 0.02,
    },
    "8x22b": COMMON
    | {
        "hidden_size": 6144,
        "intermediate_size": 16384,
        "max_position_embeddings": 65536,
        "num_attention_heads": 48,
        "num_hidden_layers": 56,
        "router_aux_loss_coef": 0.001,
    },
}
BYTES = {"8x7b": 93_405_585_408, "8x22b": 281_241_268_224}
SHARDS = {"8x7b": 19, "8x22b": 59}
SHARD_BYTES = 5 * 10**9
HEAD = 128
LONGEST = 5.0  # seconds to plan a release; it takes a tenth of that on an idle machine


def huggingface_tensors(config):
    """Names and shapes, in the order of a state dict of transformers 4."""
    d, f = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[f"num_{which}_heads"] * HEAD for which in ("attention", "key_value"))
    tensors = {"model.embed_tokens.weight": (config["vocab_size"], d)}
    for layer in range(config["num_hidden_layers"]):
        shapes = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d)}
        shapes |= {"self_attn.v_proj": (kv, d), "self_attn.o_proj": (d, q)}
        shapes["block_sparse_moe.gate"] = (config["num_local_experts"], d)
        for expert in range(config["num_local_experts"]):
            shapes |= {
                f"block_sparse_moe.experts.{expert}.{matrix}": shape
                for matrix, shape in (("w1", (f, d)), ("w2", (d, f)), ("w3", (f, d)))
            }
        shapes |= {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        tensors |= {f"model.layers.{layer}.{n}.weight": shape for n, shape in shapes.items()}
    return tensors | {"model.norm.weight": (d,), "lm_head.weight": (config["vocab_size"], d)}


def mistral_tensors(config):
    """Names and shapes of consolidated.safetensors."""
    renamed = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "block_sparse_moe": "feed_forward",
    }
    tensors = {}
    for name, shape in huggingface_tensors(config).items():
        for theirs, native in renamed.items():
            name = name.replace(theirs, native)
        tensors[name] = shape
    return tensors


def nbytes(shape):
    return 2 * math.prod(shape)


def write_hollow(path, tensors):
    """A file with a true header, of its true length, with nothing on the disk behind the header."""
    stops = [0, *itertools.accumulate(map(nbytes, tensors.values()))]
    header = {"__metadata__": {"format": "pt"}}
    for (name, shape), start, stop in zip(tensors.items(), stops, stops[1:]):
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + stops[-1])


def write_huggingface(folder, release):
    """A folder like the release's; returns which file each tensor is in."""
    files, used = [{}], 0
    for name, shape in huggingface_tensors(RELEASES[release]).items():
        if used + nbytes(shape) > SHARD_BYTES:
            files.append({})
            used = 0
        files[-1][name] = shape
        used += nbytes(shape)
    weight_map = {}
    for number, tensors in enumerate(files, 1):
        shard = f"model-{number:05}-of-{len(files):05}.safetensors"
        write_hollow(folder / shard, tensors)
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {"total_size": BYTES[release]}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(RELEASES[release]))
    return weight_map


def write_mistral(folder, release):
    config = RELEASES[release]
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": HEAD,
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": 8,
        "norm_eps": 1e-5,
        "vocab_size": 32000,
        "rope_theta": 1e6,
        "moe": {"num_experts": 8, "num_experts_per_tok": 2},
    }
    (folder / "params.json").write_text(json.dumps(params))
    write_hollow(folder / "consolidated.safetensors", mistral_tensors(config))


def plan(folder):
    """The plan of a folder, made quickly and in little memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    weights = folders.open_weights(folder)
    assert time.perf_counter() - began < LONGEST
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    return weights


def check(weights, release, tensors):
    """Every name is used, every piece filled, and nothing counted twice."""
    assert set(weights.places) == set(names.pieces(weights.config))
    used = [place.entry.name for place in weights.places.values()]
    assert len(used) == len(set(used))
    assert set(used) == set(tensors)
    for place in weights.places.values():
        assert place.info.shape == tensors[place.entry.name]
        assert place.entry.name in place.file.tensors
    assert weights.nbytes == BYTES[release] == 2 * weights.config.num_parameters
    assert sum(file.path.stat().st_size for file in weights.files) > BYTES[release]
    assert weights.config.param_dtype == "bfloat16"


@pytest.mark.parametrize("release", RELEASES)
def test_huggingface_shards_are_planned_whole(release, tmp_path):
    weight_map = write_huggingface(tmp_path, release)
    assert len(set(weight_map.values())) == SHARDS[release]
    torn = [
        layer
        for layer in range(RELEASES[release]["num_hidden_layers"])
        if len({f for n, f in weight_map.items() if f".{layer}.block_sparse_moe.experts." in n}) > 1
    ]
    assert torn, "the experts of a layer should lie in several files"
    weights = plan(tmp_path)
    assert len(weights.files) == SHARDS[release]
    check(weights, release, huggingface_tensors(RELEASES[release]))
    for piece, place in weights.places.items():
        assert place.file.path.name == weight_map[place.entry.name], piece
    weights.close()


@pytest.mark.parametrize("release", RELEASES)
def test_mistrals_one_file_is_planned_whole(release, tmp_path):
    write_mistral(tmp_path, release)
    weights = plan(tmp_path)
    assert len(weights.files) == 1
    check(weights, release, mistral_tensors(RELEASES[release]))
    weights.close()


@pytest.mark.parametrize("release", RELEASES)
def test_the_files_are_read_in_their_order(release, tmp_path):
    """A disk reads forward, and a file that is done with is not opened again."""
    write_huggingface(tmp_path, release)
    weights = plan(tmp_path)
    at = [(place.file.path.name, place.info.start) for place in weights.places.values()]
    assert at == sorted(at)
    weights.close()


def test_a_missing_shard_is_named(tmp_path):
    write_huggingface(tmp_path, "8x7b")
    (tmp_path / "model-00007-of-00019.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00007-of-00019\.safetensors is missing"):
        folders.open_weights(tmp_path)


def test_a_shard_cut_short_is_named(tmp_path):
    write_huggingface(tmp_path, "8x7b")
    path = tmp_path / "model-00011-of-00019.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(InputError, match=r"model-00011-of-00019\.safetensors.*cut short"):
        folders.open_weights(tmp_path)


# ---- the model that they fill ------------------------------------------------------------------

# Slices of v5p, whose chips have 95 GB each.
MESHES = {"8x7b": MeshConfig(expert=8), "8x22b": MeshConfig(expert=8, fsdp=2, tensor=2)}


@pytest.mark.parametrize("release", RELEASES)
def test_every_parameter_splits_over_a_slice(release, tmp_path):
    """Every chip holds its share, and whole only what is small."""
    write_mistral(tmp_path, release)
    weights, sizes = plan(tmp_path), MESHES[release]
    weights.close()
    check_mesh(weights.config, sizes)
    shape = sizes.data, sizes.fsdp, sizes.expert, sizes.tensor
    mesh = jax.sharding.AbstractMesh(shape, sharding.AXES)
    _, state = abstract_state(weights.config)
    shardings = sharding.param_shardings(state, mesh)
    total = share = 0
    for leaf, where in zip(*map(jax.tree.leaves, (state, shardings))):
        part = where.shard_shape(leaf.shape)
        assert leaf.dtype == np.dtype("bfloat16")
        total += leaf.size
        share += math.prod(part)
        assert part != leaf.shape or leaf.ndim <= 2, (leaf.shape, part)
    assert total == weights.config.num_parameters
    assert share * sizes.size < 1.01 * total
    assert 2 * share < 12e9
