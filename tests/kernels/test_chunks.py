"""Causal attention by chunks, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax.kernels import chunks
from mixtral_jax.kernels.attention import resolve

B, L, K, G, H = 2, 72, 3, 2, 6


def operands(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (B, L, K, G, H), (B, L, K, H), (B, L, K, H), (B, L, K, G, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@jax.jit
def run(q_BLKGH, k_BLKH, v_BLKH, g_BLKGH, segments_BL):
    def attend(*arrays):
        return chunks.attention(*arrays, segments_BL)

    out, pull = jax.vjp(attend, q_BLKGH, k_BLKH, v_BLKH)
    return out, *pull(g_BLKGH)


def weighted(q_BLKGH, k_BLKH, v_BLKH, g_BLKGH, allowed_BLS):
    return (oracle.attend(q_BLKGH, k_BLKH, v_BLKH, allowed_BLS) * g_BLKGH).sum()


def test_values_and_gradients_of_packed_documents():
    """Documents that end within a chunk and at its end, of one token and of many; padding."""
    segments_BL = np.repeat([[1, 2, 3, 4, 0], [1, 1, 1, 1, 2]], [9, 1, 20, 33, 9], axis=1)
    arrays, allowed_BLS = operands(), oracle.may_see(segments_BL)
    arrays64 = [np.asarray(a, np.float64) for a in arrays]
    out = oracle.attend(*arrays64[:3], allowed_BLS)
    gradients = oracle.gradient(weighted, (0, 1, 2))(*arrays64, allowed_BLS)
    oracle.close(run(*arrays, segments_BL), (out, *gradients), rel=2e-6)


def test_half_precision_keeps_its_type():
    segments_BL = np.ones((B, L), np.int32)
    exact = run(*operands(), segments_BL)
    rounded = run(*operands(jnp.bfloat16), segments_BL)
    assert {a.dtype for a in rounded} == {jnp.dtype(jnp.bfloat16)}
    oracle.close(rounded, exact, rel=3e-2)


def test_lengths_that_fit_are_the_default_on_cpu():
    chosen = [resolve(None, length, 6, jnp.float32) for length in (56, 64, 68, 72)]
    assert chosen == ["xla", "chunks", "xla", "chunks"]
    with pytest.raises(ValueError, match=r"^attention=chunks wants .* multiple of 8.*, not 68"):
        resolve("chunks", 68, 6, jnp.float32)
