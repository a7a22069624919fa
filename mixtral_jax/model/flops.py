"""Arithmetic of the network, the experts it visits, and the peak rates it is compared with."""

from __future__ import annotations

from mixtral_jax.config import ModelConfig

# Dense bf16 FLOP/s of one device by JAX's device_kind. Sources: cloud.google.com/tpu/docs (system
# architecture pages) and NVIDIA's datasheets (dense, SXM).
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,  # a chip counts as two devices
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def training_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Model FLOPs of forward and backward per token: what MFU counts.

    6 per active parameter that takes part in a matrix product (all but the embedding and the
    norms), plus causal attention's 6 * layers * N * H * L (half of the 12 of full attention).
    Recomputation is not counted.
    """
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    embedding = config.vocab_size * config.hidden_size
    heads = config.num_attention_heads * config.head_size
    attention = 6 * config.num_hidden_layers * heads * sequence_length
    return 6.0 * (config.num_active_parameters - norms - embedding) + attention


def experts_visited(config: ModelConfig, tokens: float) -> float:
    """Experts of a layer that some of so many tokens choose, if each chooses at random.

    E (1 - (1 - k / E)^tokens), on average.
    """
    experts = config.num_local_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** tokens)
