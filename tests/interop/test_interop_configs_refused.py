"""What config.json and params.json may not say, and files that are neither: one line each."""

import copy
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from released import DENSE, LARGE_4, SMALL_4, SMALL_MISTRAL, as_transformers_5

from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.interop import configs
from mixtral_jax.interop.configs import from_huggingface, from_mistral


def refused(read, values, *words):
    """One line that names the file and has these words."""
    before = copy.deepcopy(values)
    with pytest.raises(InputError) as error:
        read(values, "some/dir/file.json")
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < 400
    assert message.startswith("some/dir/file.json: ")
    assert all(word in message for word in words), message
    assert repr(values) == repr(before)


# ---- values ------------------------------------------------------------------------------------

HUGGING_FACE_SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
HUGGING_FACE_SIZES += ["num_attention_heads", "num_key_value_heads", "num_local_experts"]
HUGGING_FACE_SIZES += ["num_experts_per_tok", "max_position_embeddings"]
MISTRAL_SIZES = ["vocab_size", "dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads"]
NO_SIZES = ["8", 8.0, True, 0, -8, 2**31, 10**4000, float("nan"), [8], {"a": 8}]


@pytest.mark.parametrize("value", NO_SIZES, ids=lambda value: type(value).__name__)
def test_a_size_that_is_none(value):
    for key in HUGGING_FACE_SIZES:
        refused(from_huggingface, SMALL_4 | {key: value}, f": {key}=", "whole number from 1 to")
    refused(from_huggingface, SMALL_4 | {"head_dim": value}, ": head_dim=", "whole number")
    for key in MISTRAL_SIZES:
        refused(from_mistral, SMALL_MISTRAL | {key: value}, f": {key}=", "whole number from 1 to")
    for key in ("max_seq_len", "max_position_embeddings"):
        refused(from_mistral, SMALL_MISTRAL | {key: value}, f": {key}=", "whole number from 1 to")
    for key in ("num_experts", "num_experts_per_tok"):
        moe = SMALL_MISTRAL["moe"] | {key: value}
        refused(from_mistral, SMALL_MISTRAL | {"moe": moe}, f": moe.{key}=", "whole number")


@pytest.mark.parametrize("value", ["1", True, 0, -1.0, 10**400, float("nan"), float("inf"), [1]])
def test_a_number_that_is_none(value):
    for key in ("rope_theta", "rms_norm_eps"):
        refused(from_huggingface, SMALL_4 | {key: value}, f": {key}=", "must be a number above 0")
    rope = {"rope_parameters": {"rope_theta": value}}
    refused(from_huggingface, SMALL_4 | rope, ": rope_parameters.rope_theta=", "number above 0")
    for key in ("rope_theta", "norm_eps"):
        refused(from_mistral, SMALL_MISTRAL | {key: value}, f": {key}=", "must be a number above 0")
    if value != 0:
        for key in ("router_aux_loss_coef", "initializer_range"):
            refused(from_huggingface, SMALL_4 | {key: value}, f": {key}=", "must be a number")


def test_a_key_that_is_missing_is_named():
    for key in (*HUGGING_FACE_SIZES, "rope_theta", "rms_norm_eps"):
        values = {k: v for k, v in SMALL_4.items() if k != key}
        refused(from_huggingface, values, f": {key} is missing: must be a")
    for key in (*MISTRAL_SIZES, "norm_eps"):
        values = {k: v for k, v in SMALL_MISTRAL.items() if k != key}
        refused(from_mistral, values, f": {key} is missing: must be a")
    for key in ("num_experts", "num_experts_per_tok"):
        moe = {k: v for k, v in SMALL_MISTRAL["moe"].items() if k != key}
        refused(from_mistral, SMALL_MISTRAL | {"moe": moe}, f": moe.{key} is missing")
    values = {k: v for k, v in SMALL_4.items() if k not in ("model_type", "architectures")}
    refused(from_huggingface, values, "model_type is missing: must be mistral or mixtral")
    refused(from_huggingface, {}, "model_type is missing")
    refused(from_mistral, {}, "vocab_size is missing")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sliding_window": 4096}, ["sliding_window=4096", "must be null", "shorter sequences"]),
        ({"sliding_window": 0}, ["sliding_window=0", "must be null"]),
        ({"hidden_act": "gelu"}, ["hidden_act='gelu'", "silu"]),
        ({"hidden_act": 3}, ["hidden_act=3", "silu"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings=True", "null or false"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings=1"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"mlp_bias": True}, ["mlp_bias=True"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "bfloat16"]),
        ({"model_type": "qwen3_moe"}, ["model_type='qwen3_moe'", "mistral or mixtral"]),
        ({"model_type": 7}, ["model_type=7", "text"]),
        ({"model_type": "mistral"}, ["architectures", "'MixtralForCausalLM'", "Mistral"]),
        ({"architectures": ["MixtralModel"]}, ["'MixtralModel'", "MixtralForCausalLM"]),
        (
            {"architectures": ["LlamaForCausalLM"], "model_type": None},
            ["'LlamaForCausalLM'", "MistralForCausalLM or MixtralForCausalLM"],
        ),
        ({"architectures": "MixtralForCausalLM"}, ["architectures"]),
        ({"architectures": ["MixtralForCausalLM"] * 2}, ["architectures", "list of 2"]),
        ({"architectures": [{}]}, ["architectures"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling.type='linear'"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_scaling.rope_type='yarn'", "default"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling='yarn'", "object"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, ["rope_parameters.rope_t"]),
        ({"rope_parameters": 5}, ["rope_parameters=5", "object"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor=0.5"]),
        ({"rope_parameters": {"rope_theta": 5.0}}, ["rope_theta=1000000.0 differs", "=5"]),
        (
            {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            ["rope_theta=None", "must be a number"],
        ),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "num_local_experts=8"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads=5", "num_attention_heads=32"]),
        ({"hidden_size": 4097}, ["hidden_size=4097", "head_dim"]),
        ({"head_dim": 7}, ["head_dim=7", "even"]),
        ({"num_hidden_layers": 1001}, ["num_hidden_layers=1001", "1000"]),
        ({"dtype": 16}, ["dtype=16", "text"]),
        ({"vocab_size": "a\n" + "b" * 5000}, [r"vocab_size='a\nbbb", "..."]),
        ({"vocab_size": None}, ["vocab_size=None"]),
    ],
)
def test_what_is_not_mixtral_is_named(change, words):
    refused(from_huggingface, SMALL_4 | change, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"sliding_window": 4096},
            ["sliding_window=4096", "in its place, and add rope_theta=1000"],
        ),
        ({"sliding_window": 4096, "rope_theta": 1e4}, ["null in its place"]),
        ({"_sliding_window": [4096]}, ["_sliding_window", "must be null"]),
        ({"model_type": "mamba"}, ["model_type='mamba'", "transformer"]),
        ({"lora": {"rank": 4}}, ["lora"]),
        ({"quantization": {"qformat_weight": "fp8_e4m3"}}, ["quantization"]),
        ({"vision_encoder": {}}, ["vision_encoder"]),
        ({"yarn": {"factor": 4}}, ["yarn"]),
        ({"tied_embeddings": True}, ["tied_embeddings=True"]),
        ({"moe": 8}, ["moe=8", "object"]),
        ({"moe": {"num_experts": 2, "num_experts_per_tok": 3}}, ["num_experts_per_tok=3", "=2"]),
        ({"n_kv_heads": 5}, ["num_key_value_heads=5"]),
        ({"head_dim": 9}, ["head_dim=9", "even"]),
    ],
)
def test_what_is_not_mixtral_in_mistrals_words_is_named(change, words):
    refused(from_mistral, SMALL_MISTRAL | change, *words)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=400)
@given(
    st.sampled_from([SMALL_4, as_transformers_5(LARGE_4), DENSE, SMALL_MISTRAL]),
    st.data(),
)
def test_any_value_under_any_key_is_read_or_one_line(values, data):
    keys = st.sampled_from([*values, "rope_scaling", "rope_parameters", "moe", "head_dim", "x"])
    changed = values | data.draw(st.dictionaries(keys, JSON, min_size=1, max_size=2))
    read = from_mistral if "dim" in values else from_huggingface
    try:
        found = read(changed, "a file")
    except InputError as error:
        message = str(error)
    else:
        message = "a file: "
        assert ModelConfig(**found.sizes).num_parameters > 0
    assert message.startswith("a file: ")
    assert message.isprintable()
    assert len(message) < 400


# ---- files -------------------------------------------------------------------------------------


def test_a_json_file_is_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL_4 | {"name": "字"}), encoding="utf-8")
    assert configs.read_json(path) == configs.read_json(str(path)) == SMALL_4 | {"name": "字"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"{'a': 1}", "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"[1]", "must be a JSON object, not list of 1"),
        (b"null", "must be a JSON object, not None"),
        (b'"' + b"a" * 9999 + b'"', "must be a JSON object, not 'aaa"),
        (b"1e999", "must be a JSON object, not inf"),
        (b"9" * 9999, "thousands of digits"),
        (b"[" * 10**6, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b'{"a": {"b\\n": 1, "b\\n": 1}}', r"'b\n' stands there twice"),
        (b" " * 10_000_001, "more than 10000000 bytes"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path, content, words):
    path = tmp_path / "two\nlines.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        configs.read_json(path)
    assert words in str(error.value)
    assert str(error.value).isprintable()
    assert r"two\nlines.json" in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 200


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    for path, words in [
        ("none", "does not exist"),
        (".", "is not a file"),
        ("pipe", "is not a file"),
        ("file/x", "cannot be read"),
        ("a\0b", "cannot be read"),
        ("n" * 300, "cannot be read"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            configs.read_json(tmp_path / path)
        assert str(error.value).isprintable()


def test_a_sparse_file_of_gigabytes_is_refused_at_once(tmp_path):
    path = tmp_path / "config.json"
    path.touch()
    os.truncate(path, 2**36)
    with pytest.raises(InputError, match="more than 10000000 bytes"):
        configs.read_json(path)
