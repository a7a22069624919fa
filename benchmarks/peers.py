"""Beside transformers: the same model, batch and work, in one run, taking turns.

    python benchmarks/peers.py train [--steps 7]      # 4 x 512 tokens, AdamW, load-balancing loss
    python benchmarks/peers.py decode [--batch 8]     # 128 tokens after a prompt of 128

The model has hidden 512, 8 layers, 8 query and 2 kv heads of 64, 8 experts of 1792, top-2, 32,000
pieces; 214,213,120 parameters. Each contestant is a process of its own that waits while the others
work, so that a noisy machine is noisy for all. One JSON line each, medians; beside them the time
that the same floating-point work takes as plain dense products in XLA (training), or that reading
the active weights once takes (decoding), in the same turns: the limit. Wants
requirements-parity.txt, and for all contestants of `train` about 20 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = {
    **{"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1792},
    **{"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
    **{"num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 1024},
}
ROWS, LENGTH = 4, 512
PROMPT, NEW = 128, 128
COEFFICIENT = 0.02


# ---- ours --------------------------------------------------------------------------------------


def our_config(**model):
    from mixtral_jax import config_io

    return config_io.from_dict(
        {
            "model": {**SIZES, "load_balance_weight": COEFFICIENT, **model},
            "training": {"batch_size": ROWS, "sequence_length": LENGTH},
            "data": {"source": "synthetic"},
        }
    )


def our_training(arguments):
    from mixtral_jax import sharding
    from mixtral_jax.config import MeshConfig

    config = our_config()
    sharding.start(MeshConfig())
    import jax

    from mixtral_jax.data.batches import synthetic_batch
    from mixtral_jax.training import step as steps
    from mixtral_jax.training.placement import Placement

    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        state = steps.initial_state(config, mesh)
        placement = Placement(config, mesh)
        step = jax.jit(steps.make_train_step(config), donate_argnums=0)
        step = step.lower(state, placement.abstract()).compile()
        batch = placement(synthetic_batch(config, placement.rows, 0))

    def turn():
        nonlocal state
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))

    return turn


def our_decoding(arguments):
    from mixtral_jax import sharding
    from mixtral_jax.config import MeshConfig

    sharding.start(MeshConfig())
    import jax

    from mixtral_jax.generation.engine import Engine
    from mixtral_jax.generation.request import Options, Request
    from mixtral_jax.model.mixtral import initialize

    mesh = sharding.make_mesh()
    model = initialize(our_config().model, jax.random.key(0), mesh)
    engine = Engine(model, mesh, eos_id=-1)
    options = Options(max_new_tokens=NEW, temperature=0.0)
    requests = [
        Request(tuple((7 * row + i) % 31000 for i in range(PROMPT)), options)
        for row in range(arguments.batch)
    ]

    def turn():
        """Seconds of the steps after the first, which is the prefill's."""
        times = [time.perf_counter() for _ in engine.stream(requests)]
        return (times[-1] - times[0]) / (len(times) - 1)

    return turn


# ---- theirs ------------------------------------------------------------------------------------


def their_model(implementation: str):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **SIZES, output_router_logits=True, router_aux_loss_coef=COEFFICIENT
    )
    model = transformers.MixtralForCausalLM(config)
    model.set_experts_implementation(implementation)
    return torch, model


def their_training(arguments):
    torch, model = their_model(arguments.experts)
    dtype = getattr(torch, arguments.dtype)
    model = model.to(dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH))

    def turn():
        optimizer.zero_grad(set_to_none=True)
        model(tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return turn


def their_decoding(arguments):
    torch, model = their_model(arguments.experts)
    model = model.to(getattr(torch, arguments.dtype)).eval()
    model.config.output_router_logits = False
    rows = [[(7 * row + i) % 31000 for i in range(PROMPT)] for row in range(arguments.batch)]

    @torch.inference_mode()
    def turn():
        out = model(torch.tensor(rows), use_cache=True)
        times = []
        for _ in range(NEW):
            token = out.logits[:, -1:].argmax(-1)
            times.append(time.perf_counter())
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return (time.perf_counter() - times[0]) / NEW

    return turn


# ---- the limits --------------------------------------------------------------------------------


def dense_products(arguments):
    """The floating-point work of a training step, as float32 products of two large matrices."""
    from mixtral_jax import sharding
    from mixtral_jax.config import MeshConfig
    from mixtral_jax.model.flops import training_flops_per_token

    sharding.start(MeshConfig())
    import jax
    import jax.numpy as jnp

    work = training_flops_per_token(our_config().model, LENGTH) * ROWS * LENGTH
    rows, width, hidden = ROWS * LENGTH, SIZES["hidden_size"], SIZES["intermediate_size"]
    x, w = jnp.ones((rows, width)), jnp.ones((width, hidden))
    product = jax.jit(lambda x, w: x @ w)
    product(x, w).block_until_ready()
    repeats = 40

    def turn():
        began = time.perf_counter()
        for _ in range(repeats):
            product(x, w).block_until_ready()
        seconds = time.perf_counter() - began
        return work * seconds / (2 * rows * width * hidden * repeats)

    return turn


def reading(arguments):
    """The active weights of one token, read once: float32, as the sum of a large array."""
    import numpy as np

    config = our_config().model
    embedding = config.vocab_size * config.hidden_size
    count = config.num_active_parameters - embedding
    array = np.ones(count, np.float32)

    from concurrent.futures import ThreadPoolExecutor

    parts = np.array_split(array, 2 * (os.cpu_count() or 1))
    pool = ThreadPoolExecutor(os.cpu_count())

    def turn():
        began = time.perf_counter()
        list(pool.map(lambda part: np.add.reduce(part.reshape(-1)), parts))
        return time.perf_counter() - began

    return turn


CONTESTANTS = {
    "train": {
        "mixtral_jax": (our_training, {}),
        "transformers float32": (their_training, {"experts": "grouped_mm", "dtype": "float32"}),
        "transformers float32 eager": (their_training, {"experts": "eager", "dtype": "float32"}),
        "transformers bfloat16": (their_training, {"experts": "grouped_mm", "dtype": "bfloat16"}),
        "dense products": (dense_products, {}),
    },
    "decode": {
        "mixtral_jax": (our_decoding, {}),
        "transformers float32": (their_decoding, {"experts": "grouped_mm", "dtype": "float32"}),
        "transformers float32 eager": (their_decoding, {"experts": "eager", "dtype": "float32"}),
        "reading active weights": (reading, {}),
    },
}


# ---- taking turns ------------------------------------------------------------------------------


def work(arguments) -> None:
    """A contestant: prepare, then take a turn whenever a line comes in."""
    make, options = CONTESTANTS[arguments.task][arguments.contestant]
    for name, value in options.items():
        setattr(arguments, name, value)
    turn = make(arguments)
    turn()
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        seconds = turn()
        seconds = time.perf_counter() - began if seconds is None else seconds
        print(json.dumps({"seconds": seconds, "peak": peak()}), flush=True)


def peak() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=list(CONTESTANTS))
    parser.add_argument("--steps", type=int, default=5, help="turns of each")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together")
    parser.add_argument("--only", nargs="*", help="contestants; all by default")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        work(arguments)
        return
    names = [n for n in CONTESTANTS[arguments.task] if not arguments.only or n in arguments.only]
    processes, results = {}, {name: [] for name in names}
    for name in names:  # one after the other: each compiles on an idle machine
        command = [sys.executable, __file__, arguments.task, "--batch", str(arguments.batch)]
        processes[name] = subprocess.Popen(
            [*command, "--contestant", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        if not processes[name].stdout.readline():
            sys.exit(f"{name} did not start")
    for _ in range(arguments.steps):
        for name, process in processes.items():
            process.stdin.write("\n")
            process.stdin.flush()
            results[name].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.stdin.close()
        process.wait()
    first = statistics.median(r["seconds"] for r in results[names[0]])
    for name, turns in results.items():
        seconds = statistics.median(r["seconds"] for r in turns)
        tokens = ROWS * LENGTH if arguments.task == "train" else arguments.batch
        line = {
            "benchmark": f"peers {arguments.task}",
            "name": name,
            "batch": ROWS if arguments.task == "train" else arguments.batch,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(tokens / seconds, 1),
            "times_of_mixtral_jax": round(seconds / first, 3),
            "peak_gigabytes": round(turns[-1]["peak"] / 1e9, 2),
            "turns": len(turns),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
