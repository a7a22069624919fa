"""Decoding with the kernels for few tokens, interpreted, on one device and on several."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from emulation import few_on_cpu
from flax import nnx
from harness import place, random_parameters
from whole import make_config

from mixtral_jax import sharding
from mixtral_jax.kernels import few_queries, few_rows, few_tokens
from mixtral_jax.model.mixtral import abstract_state
from mixtral_jax.model.unstacked import in_layers

CONFIG = make_config(
    hidden_size=128,
    intermediate_size=128,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
)
B, PLACES = 4, 16


def decode(mesh, monkeypatch):
    """Logits, statistics and cache after two steps, of which a row sits out the second; and the
    kernels that were traced."""
    calls = set()
    for module, name in (
        (few_rows, "products"),
        (few_queries, "attention"),
        (few_tokens, "experts"),
    ):
        kernel = getattr(module, name)
        watched = lambda *a, kernel=kernel, name=name: calls.add(name) or kernel(*a)  # noqa: E731
        monkeypatch.setattr(module, name, watched)
    graphdef, abstract = abstract_state(CONFIG)
    state = place(random_parameters(abstract, seed=0, spread=0.1), mesh)
    model = in_layers(nnx.merge(graphdef, state))
    with jax.set_mesh(mesh):

        @jax.jit
        def steps(state):
            whole = nnx.merge(nnx.split(model)[0], state)
            cache, outs = whole.empty_cache(B, PLACES), []
            for i, real in enumerate(([1, 1, 1, 1], [1, 0, 1, 1])):
                tokens_B1 = np.int32([[3], [5], [7], [9]]) + i
                positions_B1 = jnp.full((B, 1), i, jnp.int32)
                inputs = (tokens_B1, positions_B1, np.int32(real)[:, None])
                inputs = [sharding.shard(jnp.asarray(a), "batch", None) for a in inputs]
                out = whole.forward(*inputs, cache)
                cache, real_B11 = out.cache, np.bool_(real)[:, None, None]
                outs.append((jnp.where(real_B11, out.logits_BLV, 0), out.statistics))
            return outs, cache

        return jax.tree.map(np.asarray, steps(nnx.state(model))), calls


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 1, 1), (1, 1, 2, 1)], ids=str)
def test_decoding_gives_what_the_portable_kernels_give(shape, monkeypatch):
    mesh = sharding.make_mesh(*shape)
    with monkeypatch.context() as patch:
        portable, none = decode(mesh, patch)
    with few_on_cpu(), monkeypatch.context() as patch:
        kernels, calls = decode(mesh, patch)
    assert not none
    experts = {"experts"} if shape[2] == 1 else set()  # spread out, they take the general path
    assert calls == {"products", "attention"} | experts
    oracle.close(kernels, portable, rel=2e-5)
