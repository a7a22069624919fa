"""Checkpoint folders with one fault each: one line that names the file, and no trace of more.

A bit that flips in the tensors' bytes is not among the faults: safetensors has no checksums, so
every value is as good as any other.
"""

import json
import os
import shutil

import pytest
from checkpoint_faults import ANY, CONFIGS, FORMS, W2, message_of, weights_file
from checkpoint_files import (
    CONFIG_JSON,
    HUGGING_FACE,
    INDEX,
    PARAMS_JSON,
    edit_json,
    edit_tensors,
    tensors,
)

import mixtral_jax


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fault", ANY)
def test_a_fault_in_any_form(copy, form, fault):
    folder = copy(form)
    words = ANY[fault](folder)
    message = message_of(folder)
    if "\n" not in "".join(words):
        assert all(word in message for word in words), message


def config_keys(path):
    """The keys of a valid config that the model's sizes come from."""
    values = json.loads(path.read_text())
    optional = {"max_position_embeddings"} if path.name == PARAMS_JSON else set()
    optional |= {
        "rope_theta",
        "head_dim",
        "initializer_range",
        "router_aux_loss_coef",
        "architectures",
    }
    optional |= {"dtype", "torch_dtype", "bos_token_id", "eos_token_id", "hidden_act", "use_cache"}
    optional |= {"sliding_window", "tie_word_embeddings", "attention_dropout", "model_type"}
    optional |= {"router_jitter_noise", "output_router_logits", "rope_parameters"}
    optional |= {"pad_token_id"}
    optional -= {"head_dim"} if path.name == PARAMS_JSON else set()
    return sorted(set(values) - optional)


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_config_key_that_is_missing(valid, copy, form):
    folder = copy(form)
    path = folder / CONFIGS[form]
    keys, whole = config_keys(path), path.read_text()
    assert len(keys) >= 8
    for key in keys:
        if key == "moe":
            continue  # without it the file is a dense model's
        edit_json(path, lambda values, key=key: values.pop(key))
        assert f"{path}: {key} is missing: must be a" in message_of(folder)
        path.write_text(whole)


def test_no_base_of_rope_anywhere(copy):
    folder = copy("single")
    for key in ("rope_theta", "rope_parameters"):
        edit_json(folder / CONFIG_JSON, lambda values, key=key: values.pop(key))
    assert f"{folder / CONFIG_JSON}: rope_theta is missing" in message_of(folder)


HUGGING_FACE_ONLY = {
    "sliding window": ({"sliding_window": 4096}, "sliding_window=4096 must be null"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act='gelu' must be null or silu"),
    "quantized": ({"quantization_config": {"bits": 4}}, "convert the weights to bfloat16 first"),
    "tied": ({"tie_word_embeddings": True}, "tie_word_embeddings=True must be null or false"),
    "Llama": (
        {"architectures": ["LlamaForCausalLM"]},
        "architectures names 'LlamaForCausalLM', must be MixtralForCausalLM",
    ),
    "its type": ({"model_type": "llama"}, "model_type='llama' must be mistral or mixtral"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
    "per token": ({"num_experts_per_tok": 4}, "num_experts_per_tok=4 is more than"),
}


@pytest.mark.parametrize("case", HUGGING_FACE_ONLY)
def test_what_config_json_says_that_is_not_mixtral(copy, case):
    changes, words = HUGGING_FACE_ONLY[case]
    folder = copy("single")
    edit_json(folder / CONFIG_JSON, lambda values: values.update(changes))
    message = message_of(folder)
    assert message.startswith(f"{folder / CONFIG_JSON}: ")
    assert words in message


def test_no_key_value_heads_are_not_taken_for_eight(copy):
    """transformers' class would: its default is Mixtral 8x7B's 8, whatever the query heads are."""
    folder = copy("sharded")
    edit_json(folder / CONFIG_JSON, lambda values: values.pop("num_key_value_heads"))
    expected = f"{folder / CONFIG_JSON}: num_key_value_heads is missing"
    assert expected in message_of(folder)


# ---- the index ---------------------------------------------------------------------------------


def test_an_index_beside_a_single_file(valid, copy):
    """transformers would take the file, whatever the index says."""
    folder = copy("sharded")
    shutil.copy(valid / "single" / HUGGING_FACE, folder)
    expected = f"{folder} has both {HUGGING_FACE} and {INDEX}: remove one of them"
    assert message_of(folder) == expected
    names = tensors(valid / "single")
    edit_json(folder / INDEX, lambda v: v.update(weight_map=dict.fromkeys(names, HUGGING_FACE)))
    mixtral_jax.load_model(folder)


def test_a_shard_that_is_missing(copy):
    folder = copy("sharded")
    path = weights_file(folder)
    count = sum(
        name == path.name
        for name in json.loads((folder / INDEX).read_text())["weight_map"].values()
    )
    path.unlink()
    assert message_of(folder) == f"{path} is missing: {INDEX} expects {count} tensors there"


def test_a_tensor_that_the_index_has_and_the_shard_has_not(copy):
    folder = copy("sharded")
    path = weights_file(folder)
    edit_tensors(path, lambda arrays: arrays.pop(W2))
    assert f"{path} has no tensor '{W2}', which {INDEX} expects there" in message_of(folder)


def test_a_tensor_that_the_index_does_not_name(copy):
    folder = copy("sharded")
    path = weights_file(folder)
    edit_json(folder / INDEX, lambda values: values["weight_map"].pop(W2))
    message = message_of(folder)
    assert str(path) in message
    assert W2 in message
    assert f"{INDEX} does not name" in message


def test_a_tensor_in_two_files(copy):
    folder = copy("sharded")
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    array = tensors(folder)[W2]
    other = next(folder / name for name in weight_map.values() if name != weight_map[W2])
    edit_tensors(other, lambda arrays: arrays.update({W2: array}))
    message = message_of(folder)
    assert str(other) in message
    assert W2 in message


@pytest.mark.parametrize(
    "name",
    [
        *("../x", "/etc/passwd", ".", "..", "", "a/b", "./a", 7, None, True, ["a"], {"a": 1}),
        *("none", "no\nne", "n" * 300, "é" * 200, "a\0b", "\ud800", "n" * 90_000),
        json.loads("[" * 900 + "]" * 900),
    ],
    ids=lambda name: type(name).__name__ if not isinstance(name, str) else repr(name)[:9],
)
def test_an_index_that_points_elsewhere(copy, name):
    folder = copy("sharded")
    edit_json(folder / INDEX, lambda values: values["weight_map"].update({W2: name}))
    message = message_of(folder)
    assert str(folder) in message
    if not isinstance(name, str) or "/" in name or name in ("", ".", ".."):
        assert f"{folder / INDEX}: '{W2}' is in " in message
        assert "no file of that folder" in message


def test_a_shard_that_is_a_folder_or_a_pipe(copy):
    folder = copy("sharded")
    path = weights_file(folder)
    path.unlink()
    path.mkdir()
    assert f"{path} is a folder" in message_of(folder)
    path.rmdir()
    os.mkfifo(path)
    assert f"{path} is not a regular file" in message_of(folder)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{}", "has no weight_map"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": [1]}', "has no weight_map"),
        (b"weight_map: {}", "is not JSON"),
        (b"", "is not JSON"),
        (b"[]", "must be a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "run git lfs pull"),
        (b'{"weight_map": {"a\\nb": "none"}}', "is missing"),
    ],
)
def test_an_index_that_is_none(copy, data, words):
    folder = copy("sharded")
    (folder / INDEX).write_bytes(data)
    message = message_of(folder)
    assert str(folder) in message
    assert words in message


def test_a_tensor_of_the_index_with_a_line_break(copy):
    folder = copy("sharded")
    shard = weights_file(folder).name
    edit_json(folder / INDEX, lambda v: v["weight_map"].update({"two\nlines" + "x" * 999: shard}))
    assert r"has no tensor 'two\nlinesxx" in message_of(folder)
