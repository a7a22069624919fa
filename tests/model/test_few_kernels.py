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
from mixtral_jax.kernels import few_heads, few_norms, few_queries, few_rows, few_tokens
from mixtral_jax.model import decoding
from mixtral_jax.model.cache import CacheUse
from mixtral_jax.model.mixtral import abstract_state
from mixtral_jax.model.quantized import quantized
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
        (few_norms, "add_norm_route"),
        (few_heads, "attention"),
    ):
        kernel = getattr(module, name)
        called = f"{module.__name__.rpartition('.')[2]}.{name}"
        watched = lambda *a, kernel=kernel, called=called: calls.add(called) or kernel(*a)  # noqa: E731
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


WHOLE = {"few_norms.add_norm_route", "few_heads.attention"}
APART = {"few_rows.products", "few_queries.attention"}


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((1, 1, 1, 1), WHOLE),
        ((1, 2, 1, 1), WHOLE),
        ((2, 1, 1, 1), WHOLE),
        ((2, 1, 1, 2), APART | {"few_tokens.experts"}),
        ((1, 1, 2, 1), APART),  # experts that are spread out take the general path
    ],
    ids=["one", "fsdp 2", "data 2", "data 2, tensor 2", "expert 2"],
)
def test_decoding_gives_what_the_portable_kernels_give(shape, taken, monkeypatch):
    mesh = sharding.make_mesh(*shape)
    with monkeypatch.context() as patch:
        portable, none = decode(mesh, patch)
    with few_on_cpu(), monkeypatch.context() as patch:
        kernels, calls = decode(mesh, patch)
    assert not none
    assert calls == taken
    oracle.close(kernels, portable, rel=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() == "cpu", reason="interpreted by the test above")
def test_on_a_gpu(monkeypatch):
    """In bfloat16, with all of it and without any."""
    mesh = sharding.make_mesh()
    with monkeypatch.context() as patch:
        patch.setattr(few_rows, "platform", lambda: "cpu")
        (portable, _), none = decode(mesh, patch)
    with monkeypatch.context() as patch:
        (kernels, _), calls = decode(mesh, patch)
    assert (none, calls) == (set(), WHOLE)
    oracle.close(
        *([logits_BLV for logits_BLV, _ in outs] for outs in (kernels, portable)), rel=0.05
    )


def test_what_takes_the_general_path():
    """All but one token of every sequence, with weights and a cache in the activations' type."""
    mesh = sharding.make_mesh(1, 1, 1, 1)
    graphdef, abstract = abstract_state(CONFIG)
    model = nnx.merge(graphdef, place(random_parameters(abstract, seed=0), mesh))
    layers, narrow = in_layers(model).layers, in_layers(quantized(model)).layers
    with jax.set_mesh(mesh), few_on_cpu():
        cache = in_layers(model).empty_cache(B, PLACES)
        x_BLD, at_BL = jnp.zeros((B, 1, CONFIG.hidden_size)), jnp.zeros((B, 1), jnp.int32)
        use = CacheUse(cache, None, None, at_BL, at_BL == 0)
        int8 = in_layers(model).empty_cache(B, PLACES, jnp.int8)
        assert decoding.fits(layers[0], x_BLD, use)
        assert not decoding.fits(narrow[0], x_BLD, use)
        assert not decoding.fits(layers[0], jnp.tile(x_BLD, (1, 2, 1)), use)
        assert not decoding.fits(layers[0], x_BLD.astype(jnp.bfloat16), use)
        assert not decoding.fits(layers[0], x_BLD, use._replace(row_B=jnp.arange(B)))
        assert not decoding.fits(layers[0], x_BLD, use._replace(cache=int8))
        assert not decoding.fits(layers[0], x_BLD, use._replace(cache=None))
    with jax.set_mesh(mesh):
        assert not decoding.fits(layers[0], x_BLD, use), "on CPU"
