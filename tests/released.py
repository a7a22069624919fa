"""The configuration files of the released models, and of a small dense one, as dictionaries."""

# Mixtral 8x7B v0.1 as transformers 4 wrote it.
SMALL_4 = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}
# Mixtral 8x22B v0.1, too.
LARGE_4 = SMALL_4 | {
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "max_position_embeddings": 65536,
    "num_attention_heads": 48,
    "num_hidden_layers": 56,
    "router_aux_loss_coef": 0.001,
    "transformers_version": "4.38.0",
}


def as_transformers_5(values):
    """The same in the words of transformers 5."""
    old = ("rope_theta", "torch_dtype", "transformers_version")
    return {key: value for key, value in values.items() if key not in old} | {
        "dtype": values["torch_dtype"],
        "head_dim": None,
        "pad_token_id": None,
        "rope_parameters": {"rope_theta": values["rope_theta"], "rope_type": "default"},
        "router_jitter_noise": 0.0,
        "transformers_version": "5.23.0",
    }


SMALL_MISTRAL = {
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}
LARGE_MISTRAL = SMALL_MISTRAL | {
    "dim": 6144,
    "n_layers": 56,
    "hidden_dim": 16384,
    "n_heads": 48,
    "vocab_size": 32768,
    "rope_theta": 1000000.0,
}
DENSE = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 60,
    "intermediate_size": 44,
    "max_position_embeddings": 99,
    "model_type": "mistral",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 3e-6,
    "rope_theta": 10000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 77,
}
