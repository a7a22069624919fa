"""config.json and params.json: what the released models say, both spellings, and the way back."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from released import (
    DENSE,
    LARGE_4,
    LARGE_MISTRAL,
    SMALL_4,
    SMALL_MISTRAL,
    as_transformers_5,
)

from mixtral_jax.config import PRESETS, ModelConfig
from mixtral_jax.interop import configs
from mixtral_jax.interop.configs import Description, from_huggingface, from_mistral

ODD = ModelConfig(
    vocab_size=77,
    hidden_size=60,
    intermediate_size=44,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=14,
    num_local_experts=5,
    num_experts_per_tok=4,
    rope_theta=12345.5,
    rms_norm_eps=3e-6,
    max_position_embeddings=99,
    initializer_range=0.03,
    load_balance_weight=0.007,
)


def model(description: Description) -> ModelConfig:
    return ModelConfig(**description.sizes)


# ---- released models ---------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [dict, as_transformers_5])
@pytest.mark.parametrize(
    ("values", "preset", "parameters"),
    [
        (SMALL_4, "mixtral_8x7b", 46_702_792_704),
        (LARGE_4, "mixtral_8x22b", 140_620_634_112),
        (LARGE_4 | {"vocab_size": 32768}, "mixtral_8x22b", 140_630_071_296),
    ],
)
def test_the_released_models(values, preset, parameters, spelling):
    found = from_huggingface(spelling(values), "config.json")
    assert (found.dense, found.dtype) == (False, "bfloat16")
    assert model(found) == ModelConfig(**PRESETS[preset] | {"vocab_size": values["vocab_size"]})
    assert model(found).num_parameters == parameters


def test_the_released_models_in_mistrals_words():
    small = from_mistral(SMALL_MISTRAL, "params.json")
    assert (small.dense, small.dtype) == (False, None)
    assert model(small) == ModelConfig(head_dim=128)
    large = model(from_mistral(LARGE_MISTRAL, "params.json"))
    assert large.num_parameters == 140_630_071_296
    assert large.max_position_embeddings == 32768  # it does not say
    for key in ("max_seq_len", "max_position_embeddings"):
        longer = from_mistral(LARGE_MISTRAL | {key: 65536}, "params.json")
        assert longer.sizes["max_position_embeddings"] == 65536


def test_a_dense_model():
    found = from_huggingface(DENSE, "config.json")
    assert (found.dense, found.dtype) == (True, "float32")
    sizes = model(found)
    assert (sizes.num_local_experts, sizes.num_experts_per_tok) == (1, 1)
    assert (sizes.hidden_size, sizes.intermediate_size, sizes.head_size) == (60, 44, 10)
    assert (sizes.rope_theta, sizes.rms_norm_eps) == (10000.0, 3e-6)
    newer = from_huggingface(as_transformers_5(DENSE), "config.json")
    assert newer == dataclasses.replace(found, token_ids=found.token_ids | {"pad_token_id": None})
    params = {key: value for key, value in SMALL_MISTRAL.items() if key != "moe"}
    native = from_mistral(params | {"moe": None}, "params.json")
    assert native == from_mistral(params, "params.json")
    assert native.dense
    assert model(native).num_local_experts == 1


# ---- spellings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        ({"head_dim": 20}, "head_size", 20),
        ({"head_dim": None}, "head_size", 128),
        ({"num_key_value_heads": None}, "num_key_value_heads", 32),
        ({"rope_theta": 10000}, "rope_theta", 10000.0),
        ({"rope_parameters": None}, "rope_theta", 1e6),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta", 1e6),
        ({"rope_parameters": {"rope_theta": 1000000}}, "rope_theta", 1e6),
        ({"rope_scaling": None}, "rope_theta", 1e6),
        ({"rope_scaling": {"type": "default"}}, "rope_theta", 1e6),
        ({"router_aux_loss_coef": 0}, "load_balance_weight", 0.0),
        ({"router_aux_loss_coef": None}, "load_balance_weight", 0.02),
        ({"initializer_range": 0.5}, "initializer_range", 0.5),
        ({"architectures": None}, "hidden_size", 4096),
        ({"architectures": []}, "hidden_size", 4096),
        ({"model_type": None}, "hidden_size", 4096),
        ({"hidden_act": None}, "hidden_size", 4096),
        ({"quantization_config": None}, "hidden_size", 4096),
        ({"attention_bias": False, "mlp_bias": False}, "hidden_size", 4096),
        ({"time_step_limit": [0.0, float("inf")], "new": {"a": [{}]}}, "hidden_size", 4096),
    ],
)
def test_what_a_file_may_leave_out_or_spell_otherwise(change, key, value):
    found = getattr(model(from_huggingface(SMALL_4 | change, "config.json")), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({"torch_dtype": None}, None),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"dtype": None}, "bfloat16"),
        ({"dtype": "torch.float16"}, "float16"),
    ],
)
def test_the_type_of_the_weights(change, dtype):
    assert from_huggingface(SMALL_4 | change, "config.json").dtype == dtype


# ---- writing -----------------------------------------------------------------------------------


def on_disk(values):
    return json.loads(json.dumps(values, allow_nan=False))


PRESET_CONFIGS = [ModelConfig(**{**sizes, "preset": name}) for name, sizes in PRESETS.items()]


@pytest.mark.parametrize("config", [ODD, *PRESET_CONFIGS])
def test_what_is_written_reads_back(config):
    values = on_disk(configs.to_huggingface(config, "bfloat16", {"bos_token_id": 5}))
    found = from_huggingface(values, "config.json")
    assert (found.dense, found.dtype) == (False, "bfloat16")
    expected = configs.describe(config)
    assert found.sizes == expected.sizes
    assert (values["bos_token_id"], values["eos_token_id"]) == (5, None)
    native = from_mistral(on_disk(configs.to_mistral(config)), "params.json")
    assert not native.dense
    del expected.sizes["initializer_range"], expected.sizes["load_balance_weight"]
    assert native.sizes == expected.sizes


SIZES = st.integers(1, 50)


@settings(max_examples=200)
@given(
    st.fixed_dictionaries(
        {
            "vocab_size": SIZES,
            "hidden_size": SIZES,
            "intermediate_size": SIZES,
            "num_hidden_layers": SIZES,
            "num_key_value_heads": SIZES,
            "head_dim": SIZES.map(lambda half: 2 * half),
            "num_local_experts": st.integers(8, 50),
            "num_experts_per_tok": st.integers(1, 8),
            "rope_theta": st.floats(1e-3, 1e9),
            "rms_norm_eps": st.floats(1e-12, 1),
            "max_position_embeddings": SIZES,
            "initializer_range": st.floats(0, 1),
            "load_balance_weight": st.floats(0, 1),
        }
    ),
    st.integers(1, 7),
)
def test_any_sizes_read_back(sizes, groups):
    config = ModelConfig(num_attention_heads=groups * sizes["num_key_value_heads"], **sizes)
    values = on_disk(configs.to_huggingface(config, "float32", {}))
    assert model(from_huggingface(values, "config.json")) == config
    native = model(from_mistral(on_disk(configs.to_mistral(config)), "params.json"))
    assert (native.num_parameters, native.head_dim) == (config.num_parameters, config.head_dim)


def test_transformers_reads_what_is_written():
    transformers = pytest.importorskip("transformers")
    for config in (ODD, *PRESET_CONFIGS):
        values = configs.to_huggingface(config, "bfloat16", {})
        theirs = transformers.MixtralConfig.from_dict(on_disk(values))
        for key, value in values.items():
            if key not in ("rope_theta", "rope_parameters", "torch_dtype", "dtype"):
                assert getattr(theirs, key) == value, key
        assert theirs.rope_parameters["rope_theta"] == config.rope_theta
        assert theirs.rope_parameters["rope_type"] == "default"
        assert str(theirs.dtype).removeprefix("torch.") == "bfloat16"
        again = from_huggingface(on_disk(theirs.to_dict()), "config.json")
        assert again == from_huggingface(values, "config.json")


def test_transformers_builds_the_model_that_is_written():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    theirs = transformers.MixtralConfig.from_dict(configs.to_huggingface(ODD, "bfloat16", {}))
    with torch.device("meta"):
        built = transformers.MixtralForCausalLM(theirs)
    assert sum(p.numel() for p in built.parameters()) == ODD.num_parameters


def test_transformers_reads_the_generation_config(tmp_path):
    transformers = pytest.importorskip("transformers")
    values = configs.generation_config({"bos_token_id": 5})
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (5, None)


def test_a_type_that_weights_do_not_have():
    with pytest.raises(ValueError, match="dtype='int8' is not one of float32, bfloat16"):
        configs.to_huggingface(ODD, "int8", {})
