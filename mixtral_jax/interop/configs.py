"""Hugging Face's config.json and Mistral's params.json, and the sizes of a ModelConfig.

What the files say beyond Mixtral (a sliding window, scaled RoPE, tied embeddings, quantized
weights) is refused by name; keys that change nothing about the weights or the forward pass are
passed over.

Sources: MixtralConfig of transformers 4 and 5, TransformerArgs of mistral-inference.
"""

from __future__ import annotations

import os
import pathlib
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.interop.strict_json import Reader, parse_object, quote

LONGEST_FILE = 10_000_000
"""Bytes of a JSON file; the index of Mixtral 8x22B has 0.2 million."""

# Above these nothing can be real, and below them plans and sums stay small.
_MOST_LAYERS = MOST_EXPERTS = 1000
_MOST_TOKENS = 2**31 - 1

_DENSE, _SPARSE = "MistralForCausalLM", "MixtralForCausalLM"
_MODEL_TYPES = {"mistral": _DENSE, "mixtral": _SPARSE}
# The keys that config.json and ModelConfig spell alike, and that are never null in either.
_SAME = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
_SAME += ("num_attention_heads", "num_key_value_heads", "num_local_experts", "rope_theta")
_SAME += ("num_experts_per_tok", "max_position_embeddings", "initializer_range")
_DTYPES = ("float32", "bfloat16", "float16")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Description:
    """What the configuration beside some weights says of them."""

    sizes: dict[str, Any]
    """Keyword arguments of ModelConfig; keys that the file leaves open are not in it."""
    dense: bool
    """One feed-forward network and no router: Mistral. num_local_experts is 1 then."""
    dtype: str | None
    """The type that the file names for its weights, such as bfloat16. The tensors decide."""
    token_ids: Mapping[str, Any] = field(default_factory=dict)
    """config.json's bos_token_id and so on: an id, several or null. What it lacks is not in it."""


def read_json(path: str | os.PathLike[str]) -> dict:
    """The object in a JSON file.

    Raises:
      InputError: missing, not readable, more than 10 MB, or not a JSON object.
    """
    name, path = one_line(path), pathlib.Path(path)
    try:
        kind = path.stat()
        if not stat.S_ISREG(kind.st_mode):  # a named pipe would be waited for
            data = None
        else:
            with open(path, "rb") as file:
                data = file.read(LONGEST_FILE + 1)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be read: {reason}") from None
    if data is None:
        raise InputError(f"{name} is not a file: name a JSON file")
    if len(data) > LONGEST_FILE:
        raise InputError(f"{name} has more than {LONGEST_FILE} bytes: not a configuration")
    return parse_object(data, name)


def _checked(sizes: dict[str, Any], name: str) -> dict[str, Any]:
    """The sizes, if they fit one another."""
    try:
        ModelConfig(**sizes)
    except InputError as error:
        raise InputError(f"{name}: {str(error).replace('model.', '')}") from None
    return sizes


def describe(config: ModelConfig) -> Description:
    """What a configuration beside this project's own weights says of them."""
    sizes = {key: getattr(config, key) for key in (*_SAME, "load_balance_weight")}
    return Description({**sizes, "head_dim": config.head_size}, False, config.param_dtype)


_WINDOW = "; shorter sequences than the window may use null in its place"
_WINDOWS_THETA = ", and add rope_theta=10000, which mistral-inference uses where there is a window"


def from_huggingface(values: Mapping[str, Any], name: str) -> Description:
    """The sizes in a config.json of MixtralForCausalLM or MistralForCausalLM.

    Both spellings are read: rope_theta and torch_dtype (transformers 4), rope_parameters and dtype
    (transformers 5). head_dim may be absent or null: hidden_size / num_attention_heads.

    Args:
      values: the file's contents.
      name: the file, as errors name it.

    Raises:
      InputError: naming the file and the key, in one line.
    """
    read = Reader(values, one_line(name))
    dense = _architecture(values, read) == _DENSE
    read.allow("sliding_window", fix=_WINDOW)
    read.allow("hidden_act", "silu")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        read.allow(key, False)
    read.allow("quantization_config", fix="; convert the weights to bfloat16 first")
    sizes: dict[str, Any] = {
        "vocab_size": read.size("vocab_size"),
        "hidden_size": read.size("hidden_size"),
        "intermediate_size": read.size("intermediate_size"),
        "num_hidden_layers": read.size("num_hidden_layers", _MOST_LAYERS),
        "num_attention_heads": read.size("num_attention_heads"),
        "head_dim": read.size("head_dim") if read.given("head_dim") else None,
        "num_local_experts": 1 if dense else read.size("num_local_experts", MOST_EXPERTS),
        "num_experts_per_tok": 1 if dense else read.size("num_experts_per_tok", MOST_EXPERTS),
        "rope_theta": _rope_theta(values, read),
        "rms_norm_eps": read.number("rms_norm_eps"),
        "max_position_embeddings": read.size("max_position_embeddings", _MOST_TOKENS),
    }
    shared = "num_key_value_heads" not in values or read.given("num_key_value_heads")
    sizes["num_key_value_heads"] = read.size(
        "num_key_value_heads" if shared else "num_attention_heads"  # null: a pair for each query
    )
    if read.given("initializer_range"):
        sizes["initializer_range"] = read.coefficient("initializer_range")
    if not dense and read.given("router_aux_loss_coef"):
        sizes["load_balance_weight"] = read.coefficient("router_aux_loss_coef")
    dtype = read.text("dtype") or read.text("torch_dtype")
    dtype = dtype and dtype.removeprefix("torch.")
    return Description(_checked(sizes, read.name), dense, dtype, _token_ids(values))


def _token_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    """The ids in a config.json; what cannot be one is passed over, as it changes no weight."""

    def good(value: object) -> bool:
        ids = value if isinstance(value, list) else [value]
        return value is None or all(type(one) is int for one in ids)

    return {key: values[key] for key in _TOKEN_IDS if key in values and good(values[key])}


def _architecture(values: Mapping[str, Any], read: Reader) -> str:
    """The class that the file is for, by architectures, model_type or both."""
    wanted = "must be " + " or ".join(_MODEL_TYPES)
    model_type = read.text("model_type")
    if model_type is not None and model_type not in _MODEL_TYPES:
        raise read.error("model_type", wanted)
    classes = values.get("architectures")
    if classes is None or classes == []:
        if model_type is None:
            raise read.error("model_type", wanted)
        return _MODEL_TYPES[model_type]
    expected = [_MODEL_TYPES[model_type]] if model_type else list(_MODEL_TYPES.values())
    if not isinstance(classes, list) or len(classes) != 1 or classes[0] not in expected:
        single = isinstance(classes, list) and len(classes) == 1
        shown = quote(classes[0] if single else classes)
        raise InputError(
            f"{read.name}: architectures names {shown}, must be {' or '.join(expected)}"
        )
    return classes[0]


def _rope_theta(values: Mapping[str, Any], read: Reader) -> float:
    """The base of RoPE's angles, wherever the file has it; scaled RoPE is refused."""
    for key in ("rope_parameters", "rope_scaling"):
        section = read.section(key)
        if section is not None:
            section.allow("rope_type", "default")
            section.allow("type", "default")
            section.allow("partial_rotary_factor", 1, 1.0)
    section = read.section("rope_parameters")
    if section is None or not section.given("rope_theta"):
        return read.number("rope_theta")
    theta = section.number("rope_theta")
    if read.given("rope_theta") and read.number("rope_theta") != theta:
        raise read.error("rope_theta", f"differs from rope_parameters.rope_theta={theta:g}")
    return theta


def from_mistral(values: Mapping[str, Any], name: str) -> Description:
    """The sizes in a params.json of Mixtral, or of Mistral where it has no key moe.

    A file without rope_theta means 1e6, as in mistral-inference, which takes 10000 where there is a
    sliding window: a file whose window is made null must say so. Released files name no longest
    sequence; without max_position_embeddings or max_seq_len it is 32768, Mixtral 8x7B's: a limit,
    which changes no weight and no angle, and which the caller may raise (8x22B: 65536).

    Raises:
      InputError: naming the file and the key, in one line.
    """
    read = Reader(values, one_line(name))
    read.allow("model_type", "transformer")
    for key in ("sliding_window", "_sliding_window"):
        read.allow(key, fix=_WINDOW + ("" if read.given("rope_theta") else _WINDOWS_THETA))
    for key in ("lora", "quantization", "vision_encoder", "yarn", "rope_scaling"):
        read.allow(key)
    for key in ("tied_embeddings", "use_biases"):
        read.allow(key, False)
    moe = read.section("moe")
    longest = next((k for k in ("max_position_embeddings", "max_seq_len") if read.given(k)), None)
    sizes = {
        "vocab_size": read.size("vocab_size"),
        "hidden_size": read.size("dim"),
        "intermediate_size": read.size("hidden_dim"),
        "num_hidden_layers": read.size("n_layers", _MOST_LAYERS),
        "num_attention_heads": read.size("n_heads"),
        "num_key_value_heads": read.size("n_kv_heads"),
        "head_dim": read.size("head_dim"),
        "num_local_experts": moe.size("num_experts", MOST_EXPERTS) if moe else 1,
        "num_experts_per_tok": moe.size("num_experts_per_tok", MOST_EXPERTS) if moe else 1,
        "rope_theta": read.number("rope_theta") if read.given("rope_theta") else 1e6,
        "rms_norm_eps": read.number("norm_eps"),
        "max_position_embeddings": read.size(longest, _MOST_TOKENS) if longest else 32768,
    }
    return Description(_checked(sizes, read.name), dense=moe is None, dtype=None)


def to_huggingface(config: ModelConfig, dtype: str, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for transformers.MixtralForCausalLM, of transformers 4 and of 5.

    capacity_factor and router_z_weight have no key there: the written model drops no token.

    Args:
      config: the model.
      dtype: of the weights: float32, bfloat16 or float16.
      token_ids: bos_token_id, eos_token_id and pad_token_id, as far as they are known; null is
        written for the others.

    Raises:
      ValueError: another dtype.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}")
    return {
        "architectures": [_SPARSE],
        "model_type": "mixtral",
        **{key: getattr(config, key) for key in _SAME},
        "head_dim": config.head_size,
        "router_aux_loss_coef": config.load_balance_weight,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": dtype,
        "torch_dtype": dtype,
        **{key: token_ids.get(key) for key in _TOKEN_IDS},
        "hidden_act": "silu",
        "sliding_window": None,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
        "use_cache": True,
    }


def generation_config(token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """A generation_config.json for transformers: where a text begins and where it ends."""
    return {"_from_model_config": True, **{key: token_ids.get(key) for key in _TOKEN_IDS}}


def to_mistral(config: ModelConfig) -> dict[str, Any]:
    """A params.json for mistral-inference, with the longest sequence, which it passes over."""
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_size,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "moe": {
            "num_experts": config.num_local_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
        },
    }
