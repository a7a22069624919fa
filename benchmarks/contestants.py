"""Who takes turns in benchmarks/peers.py. Each makes a function that takes one turn.

A turn returns its seconds, or None, and is then timed from outside.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial

import measure
import ours
import turns

from mixtral_jax.config import Config, MeshConfig, ModelConfig

PROMPT, NEW = 128, 128
Turn = Callable[[], float | None]


# ---- ours --------------------------------------------------------------------------------------


def our_training(config: Config, batch: int, **model) -> Turn:
    """Args: model: what differs from the config's."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    return turns.second_of_two(ours.Training(config).step)


def our_decoding(config: Config, batch: int, **model) -> Turn:
    """Args: model: what differs from the config's."""
    decoding = ours.Decoding(dataclasses.replace(config.model, **model))
    return lambda: decoding.answer(batch, PROMPT, NEW)[1]


# ---- theirs ------------------------------------------------------------------------------------

HUGGING_FACE = (  # what a MixtralConfig calls as ours does
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts"),
    *("num_experts_per_tok", "rms_norm_eps", "max_position_embeddings"),
)


def their_model(config: ModelConfig, experts: str, dtype: str):
    """torch, the device (a GPU where torch has one), and a model there with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {name: getattr(config, name) for name in HUGGING_FACE}
    made = transformers.MixtralConfig(
        **sizes, output_router_logits=True, router_aux_loss_coef=config.load_balance_weight
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_dtype(getattr(torch, dtype))  # never in float32 on the way
    with device:
        model = transformers.MixtralForCausalLM(made)
    model.set_experts_implementation(experts)
    return torch, device, model


def wait(torch, device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def their_training(config: Config, batch: int, *, experts: str, dtype: str) -> Turn:
    torch, device, model = their_model(config.model, experts, dtype)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    training = config.training
    shape = (training.batch_size, training.sequence_length)
    tokens = torch.randint(0, config.model.vocab_size, shape, device=device)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        wait(torch, device)

    return turns.second_of_two(step)


def their_decoding(config: Config, batch: int, *, experts: str, dtype: str) -> Turn:
    torch, device, model = their_model(config.model, experts, dtype)
    model.eval()
    model.config.output_router_logits = False
    rows = torch.tensor(ours.prompts(batch, PROMPT, config.model.vocab_size), device=device)

    @torch.inference_mode()
    def turn():
        out = model(rows, use_cache=True)
        wait(torch, device)
        began = time.perf_counter()
        for _ in range(NEW):
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        wait(torch, device)
        return (time.perf_counter() - began) / NEW

    return turn


# ---- the limits --------------------------------------------------------------------------------


def dense_products(config: Config, batch: int) -> Turn:
    """The floating-point work of a training step, as products of two large matrices."""
    from mixtral_jax import sharding

    sharding.start(MeshConfig())
    import jax

    from mixtral_jax.model.flops import training_flops_per_token
    from mixtral_jax.model.mixtral import compute_dtype

    model, training = config.model, config.training
    rows, width, hidden = (
        training.batch_size * training.sequence_length,
        model.hidden_size,
        model.intermediate_size,
    )
    work = training_flops_per_token(model, training.sequence_length) * rows
    keys = jax.random.split(jax.random.key(0))  # a GPU multiplies ones faster
    shapes = ((rows, width), (width, hidden))
    x, w = (jax.random.normal(*pair, compute_dtype(model)) for pair in zip(keys, shapes))
    product = jax.jit(lambda x, w: x @ w)
    repeats = 40

    def turn():
        seconds = measure.seconds(lambda: product(x, w), repeats)
        return work * seconds / (2 * rows * width * hidden)

    return turn


def reading(config: Config, batch: int) -> Turn:
    """What a decoding step must read, at the bandwidth of reading a large array."""
    from mixtral_jax import sharding

    sharding.start(MeshConfig())
    import jax

    size = 4 if jax.default_backend() == "cpu" else 2
    must = ours.read_bytes(config.model, batch, PROMPT + NEW // 2, size, size)
    read, total = measure.reading()
    return lambda: must * measure.seconds(read, 3) / total


# ---- who is there ------------------------------------------------------------------------------


THEIRS = {
    "transformers float32": {"experts": "grouped_mm", "dtype": "float32"},
    "transformers float32 eager": {"experts": "eager", "dtype": "float32"},
    "transformers bfloat16": {"experts": "grouped_mm", "dtype": "bfloat16"},
}


def _contestants(we: dict, they, limit: dict) -> dict[str, Callable[[Config, int], Turn]]:
    return {
        **we,
        **{name: partial(they, **options) for name, options in THEIRS.items()},
        **limit,
    }


CONTESTANTS = {
    "train": _contestants(
        {
            "mixtral_jax": our_training,
            "mixtral_jax bfloat16": partial(our_training, compute_dtype="bfloat16"),
        },
        their_training,
        {"dense products": dense_products},
    ),
    "decode": _contestants(
        {
            "mixtral_jax": our_decoding,
            "mixtral_jax weights in bfloat16": partial(our_decoding, param_dtype="bfloat16"),
        },
        their_decoding,
        {"reading active weights": reading},
    ),
}
LIMITS = ("dense products", "reading active weights")
