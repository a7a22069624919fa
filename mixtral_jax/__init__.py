"""Mixtral of Experts (arXiv 2401.04088) in JAX and Flax, with expert parallelism.

import mixtral_jax
from mixtral_jax.sharding import make_mesh

model, tokenizer = mixtral_jax.load_model("Mixtral-8x7B-v0.1", mesh=make_mesh(expert=8))
logits_BLV = model(token_ids_BL)
mixtral_jax.save_model(model, tokenizer, "copy", "huggingface")
"""

import importlib.util
import sys

if importlib.util.find_spec("jax") is None:
    raise ModuleNotFoundError(
        f"{sys.executable} has no jax: activate the project's environment (make setup; "
        "source .venv/bin/activate), or pip install -r requirements.txt"
    )

__all__ = ["load_model", "save_model"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mixtral_jax.interop import models  # only when asked: it loads JAX

    return getattr(models, name)
