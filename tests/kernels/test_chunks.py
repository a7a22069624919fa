"""Causal attention by chunks, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import NamedSharding

from mixtral_jax import sharding
from mixtral_jax.kernels import chunks
from mixtral_jax.kernels.attention import resolve

B, L, K, G, H = 2, 72, 3, 2, 6


def operands(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (B, L, K, G, H), (B, L, K, H), (B, L, K, H), (B, L, K, G, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def run(*operands):
    """Values and gradients of (q, k, v, g, segments), compiled anew."""

    def both(q_BLKGH, k_BLKH, v_BLKH, g_BLKGH, segments_BL):
        def attend(*arrays):
            return chunks.attention(*arrays, segments_BL)

        out, pull = jax.vjp(attend, q_BLKGH, k_BLKH, v_BLKH)
        return out, *pull(g_BLKGH)

    return jax.jit(both)(*operands)


def weighted(q_BLKGH, k_BLKH, v_BLKH, g_BLKGH, allowed_BLS):
    return (oracle.attend(q_BLKGH, k_BLKH, v_BLKH, allowed_BLS) * g_BLKGH).sum()


@pytest.mark.parametrize("most", [9, 4, 3], ids=["whole chunks", "uneven pieces", "even pieces"])
def test_values_and_gradients_of_packed_documents(monkeypatch, most):
    """Documents that end within a chunk and at its end, of one token and of many; padding."""
    monkeypatch.setattr(chunks, "MOST", most)
    segments_BL = np.repeat([[1, 2, 3, 4, 0], [1, 1, 1, 1, 2]], [9, 1, 20, 33, 9], axis=1)
    arrays, allowed_BLS = operands(), oracle.may_see(segments_BL)
    arrays64 = [np.asarray(a, np.float64) for a in arrays]
    out = oracle.attend(*arrays64[:3], allowed_BLS)
    gradients = oracle.gradient(weighted, (0, 1, 2))(*arrays64, allowed_BLS)
    oracle.close(run(*arrays, segments_BL), (out, *gradients), rel=2e-6)


def test_pieces_of_what_lies_on_several_devices(monkeypatch):
    monkeypatch.setattr(chunks, "MOST", 4)
    operands_and_segments = *operands(), np.ones((B, L), np.int32)
    mesh = sharding.make_mesh(fsdp=2, tensor=3, devices=jax.devices()[:6])
    with jax.set_mesh(mesh):
        batch, heads = sharding.spec("batch"), sharding.spec("batch", None, "heads")
        apart = jax.shard_map(run, in_specs=(*[heads] * 4, batch), out_specs=heads)
        placed = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip(operands_and_segments, (*[heads] * 4, batch))
        ]
        found = apart(*placed)
    oracle.close(found, run(*operands_and_segments), rel=2e-6)


def test_half_precision_keeps_its_type():
    segments_BL = np.ones((B, L), np.int32)
    exact = run(*operands(), segments_BL)
    rounded = run(*operands(jnp.bfloat16), segments_BL)
    assert {a.dtype for a in rounded} == {jnp.dtype(jnp.bfloat16)}
    oracle.close(rounded, exact, rel=3e-2)


def test_memory_of_the_gradient_grows_with_the_length():
    """In a loop over layers, outside of which JAX would make the masks, and keep them."""

    def summed(q_BLKGH, k_BLKH, v_BLKH, segments_BL):
        def layer(q_BLKGH, _):
            return chunks.attention(q_BLKGH, k_BLKH, v_BLKH, segments_BL), None

        return jax.lax.scan(layer, q_BLKGH, length=2)[0].sum()

    def temporaries(length):
        shapes = (1, length, 1, 2, 4), (1, length, 1, 4), (1, length, 1, 4)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        segments_BL = jax.ShapeDtypeStruct((1, length), jnp.int32)
        lowered = jax.jit(jax.grad(summed, (0, 1, 2))).lower(*arrays, segments_BL)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16384) < 2.2 * temporaries(8192)


def test_lengths_that_fit_are_the_default_on_cpu():
    chosen = [resolve(None, length, 6, jnp.float32) for length in (56, 64, 68, 72)]
    assert chosen == ["xla", "chunks", "xla", "chunks"]
    with pytest.raises(ValueError, match=r"^attention=chunks wants .* multiple of 8.*, not 68"):
        resolve("chunks", 68, 6, jnp.float32)
