"""Make tiny checkpoints with transformers and record what it computes with them.

    python tests/data/make_parity.py

Needs torch, transformers and safetensors (recorded with torch 2.13.0 and transformers 5.23.0).
Into tests/data/parity/ it writes

  huggingface/  bfloat16, a name for each expert, a layer's experts in several files
  fused/        the same weights under the fused names of transformers 5, in one file
  mistral/      the same weights in Mistral's own form, whose RoPE turns neighbours
  three_layers.npz  a batch, and what transformers computes with those weights in float32
  single/       one layer in float32, its config.json as transformers 4 wrote them
  one_layer.npz     the same for that one

Nothing of mixtral_jax is used here: what is recorded does not depend on it.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

FOLDER = pathlib.Path(__file__).with_name("parity")
THREE_LAYERS = {
    "vocab_size": 58,
    "hidden_size": 20,
    "intermediate_size": 14,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 70.0},
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 48,
    "router_aux_loss_coef": 0.02,
}
ONE_LAYER = {
    "vocab_size": 34,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_local_experts": 6,
    "num_experts_per_tok": 3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "rms_norm_eps": 1e-3,
    "max_position_embeddings": 32,
    "router_aux_loss_coef": 0.001,
}


def make_model(sizes, dtype, seed):
    """Weights that matter everywhere, norms included; rounded to dtype, and of type float32."""
    model = MixtralForCausalLM(MixtralConfig(**sizes)).eval()
    model.set_experts_implementation("eager")  # the other wants rows of a multiple of 16 bytes
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        value = 1 + 0.3 * noise if "norm" in name else noise * weight.shape[-1] ** -0.5
        value = 3 * value if name.endswith("gate.weight") else value
        weight.data = value.to(dtype).float()
    return model


def make_batch(rows, length, vocabulary, seed):
    """Tokens and a mask: a whole row, then padding on the right, on the left, and on both sides."""
    tokens = np.random.default_rng(seed).integers(vocabulary, size=(rows, length))
    mask = np.ones((rows, length), np.int64)
    mask[1, length - 4 :] = 0
    mask[2, :3] = 0
    mask[3:, :2] = mask[3:, length - 1 :] = 0
    return tokens, mask


def record(model, tokens, mask):
    """What transformers computes: logits, router logits and load-balancing losses."""
    config = model.config
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    out = model(
        input_ids=torch.tensor(tokens),
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions),
        output_router_logits=True,
    )
    experts, k = config.num_local_experts, config.num_experts_per_tok
    router = torch.stack(out.router_logits).reshape(-1, *tokens.shape, experts)
    best = router.sort(dim=-1, descending=True).values
    gap = (best[..., k - 1] - best[..., k])[:, torch.tensor(mask) > 0].min()
    assert gap > 1e-3, f"rounding could choose another expert: {gap}; take another seed"
    losses = [
        load_balancing_loss_func((layer,), experts, k, torch.tensor(mask)).item()
        for layer in out.router_logits
    ]
    assert np.ptp(losses) > 0.05 or len(losses) == 1, losses
    return {
        "tokens_BL": tokens.astype(np.int32),
        "positions_BL": positions.astype(np.int32),
        "mask_BL": mask.astype(np.int32),
        "logits_BLV": out.logits.numpy(),
        "router_logits_LBLE": router.numpy(),
        "load_balance_L": np.array(losses, np.float32),
        "load_balance_pooled": np.float32(out.aux_loss.item()),
    }


# ---- Mistral's form ----------------------------------------------------------------------------


def interleave(weight, heads):
    """The rows of each head so that the two that RoPE turns together stand side by side."""
    head = weight.shape[0] // heads
    order = [i // 2 + (i % 2) * (head // 2) for i in range(head)]
    rows = [h * head + row for h in range(heads) for row in order]
    return weight[rows]


def turn_neighbours(x_LNH, theta):
    """RoPE as mistral-inference has it: neighbours are one complex number each."""
    head = x_LNH.shape[-1]
    frequency = theta ** (-torch.arange(0, head, 2).double() / head)
    angle = torch.outer(torch.arange(len(x_LNH)).double(), frequency)[:, None]
    pairs = torch.view_as_complex(x_LNH.double().reshape(*x_LNH.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def turn_halves(x_LNH, theta):
    """RoPE as transformers has it: i and i + H / 2 are one complex number."""
    head = x_LNH.shape[-1]
    order = [i // 2 + (i % 2) * (head // 2) for i in range(head)]
    return turn_neighbours(x_LNH[..., order], theta)[..., np.argsort(order)]


def check_interleaving(q, k, heads, kv_heads, theta):
    """Both forms must give the same attention scores, and the wrong rotation others."""
    x_LD = torch.randn(5, q.shape[1], generator=torch.Generator().manual_seed(0))

    def scores(q, k, turn):
        q, k = (turn((x_LD @ w.T).reshape(5, n, -1), theta) for w, n in ((q, heads), (k, kv_heads)))
        return torch.einsum("lnh,snh->nls", q, k.repeat_interleave(heads // kv_heads, dim=1))

    wanted = scores(q, k, turn_halves)
    native = interleave(q, heads), interleave(k, kv_heads)
    torch.testing.assert_close(scores(*native, turn_neighbours), wanted)
    assert not torch.allclose(scores(*native, turn_halves), wanted, atol=0.1)


def mistral_tensors(weights, config):
    """The state dict with a name for each expert, in Mistral's own form."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    ours = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    parts = {
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "block_sparse_moe.gate": "feed_forward.gate",
    }
    for expert in range(config.num_local_experts):
        for matrix in ("w1", "w2", "w3"):
            part = f"experts.{expert}.{matrix}"
            parts[f"block_sparse_moe.{part}"] = f"feed_forward.{part}"
    for layer in range(config.num_hidden_layers):
        ours |= {f"model.layers.{layer}.{a}": f"layers.{layer}.{b}" for a, b in parts.items()}
    made = {}
    for name, weight in weights.items():
        name = ours.pop(name.removesuffix(".weight")) + ".weight"
        if "wq" in name or "wk" in name:
            weight = interleave(weight, heads if "wq" in name else kv_heads)
        made[name] = weight.contiguous()
    assert not ours, f"the state dict lacks {ours}"
    return made


def params_json(config):
    return {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_parameters["rope_theta"],
        "moe": {"num_experts": config.num_local_experts, "num_experts_per_tok": 2},
    }


def per_expert(model):
    """The state dict under the names of the releases."""
    weights = {}
    for name, weight in model.state_dict().items():
        prefix, _, last = name.rpartition(".")
        prefix = prefix.replace(".mlp", ".block_sparse_moe")
        if last == "gate_up_proj":
            for expert, (w1, w3) in enumerate(w.chunk(2) for w in weight):
                weights[f"{prefix}.{expert}.w1.weight"] = w1
                weights[f"{prefix}.{expert}.w3.weight"] = w3
        elif last == "down_proj":
            weights |= {f"{prefix}.{e}.w2.weight": w2 for e, w2 in enumerate(weight)}
        else:
            weights[f"{prefix}.{last}"] = weight
    return weights


# ---- the folders -------------------------------------------------------------------------------


def three_layers():
    model = make_model(THREE_LAYERS, torch.bfloat16, seed=3)
    arrays = record(model, *make_batch(8, 11, 58, seed=4))
    np.savez_compressed(FOLDER / "three_layers.npz", **arrays)
    model.to(torch.bfloat16)
    model.save_pretrained(FOLDER / "huggingface", max_shard_size="17KB")
    model.save_pretrained(FOLDER / "fused", save_original_format=False)
    weights, config = per_expert(model), model.config
    for layer in range(config.num_hidden_layers):
        q, k = (weights[f"model.layers.{layer}.self_attn.{n}_proj.weight"].float() for n in "qk")
        check_interleaving(q, k, config.num_attention_heads, config.num_key_value_heads, 70.0)
    (FOLDER / "mistral").mkdir()
    save_file(mistral_tensors(weights, config), FOLDER / "mistral" / "consolidated.safetensors")
    (FOLDER / "mistral" / "params.json").write_text(
        json.dumps(params_json(config), indent=2) + "\n"
    )
    index = json.loads((FOLDER / "huggingface" / "model.safetensors.index.json").read_text())
    shards = {
        shard for name, shard in index["weight_map"].items() if "layers.1.block_sparse_moe" in name
    }
    assert len(shards) > 1, "one layer's experts must lie in several files"


def one_layer():
    model = make_model(ONE_LAYER, torch.float32, seed=5)
    np.savez_compressed(FOLDER / "one_layer.npz", **record(model, *make_batch(6, 7, 34, seed=6)))
    model.save_pretrained(FOLDER / "single")
    path = FOLDER / "single" / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype")
    del config["head_dim"]
    config["transformers_version"] = "4.36.0.dev0"
    path.write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    with torch.no_grad():
        three_layers()
        one_layer()
    for file in sorted(FOLDER.rglob("*")):
        print(file.relative_to(FOLDER), file.stat().st_size)
