"""From products' parts to attention, interpreted, against rotation, cache and attention apart."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax import kernels
from mixtral_jax.kernels import cached_attention, few_heads, few_queries, few_rows
from mixtral_jax.kernels.cached_attention import Cached, Where
from mixtral_jax.model.layers import rotary_angles, rotate

B, K, G, H, S, P, THETA = 3, 2, 3, 32, 80, 4, 1e4
NOWHERE = Where(None, None)


TYPES = [(jnp.float32, 3e-6), pytest.param(jnp.bfloat16, 2**-6, marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "interpret", lambda: jax.default_backend() == "cpu")


def operands(positions, dtype):
    """parts, caches with large numbers from each position on, positions"""
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(P, B, f)).astype(np.float32) for f in (K * G * H, K * H, K * H)]
    caches = rng.normal(size=(2, B, K, S, H))
    for row, position in enumerate(positions):
        caches[:, row, :, position:] = 1e4
    return parts, tuple(jnp.asarray(caches, dtype)), jnp.int32(positions)


def plain(parts, caches, positions_B, real_B):
    q_BF, *kv_BF = (p.sum(axis=0).astype(caches[0].dtype) for p in parts)
    angles = rotary_angles(positions_B[:, None], H, THETA)
    q_BLKGH, k_BLKH = rotate(q_BF.reshape(B, 1, K, G, H), angles), kv_BF[0].reshape(B, 1, K, H)
    k_BLKH, v_BLKH = rotate(k_BLKH, angles), kv_BF[1].reshape(B, 1, K, H)
    positions_BL = positions_B[:, None]
    real_BL = jnp.asarray(real_B)[:, None]
    cache = cached_attention.write(Cached(*caches), k_BLKH, v_BLKH, positions_BL, real_BL, NOWHERE)
    out_BLKGH = cached_attention.attention(q_BLKGH, cache, positions_BL, NOWHERE)
    return out_BLKGH[:, 0], cache.k_BKSH, cache.v_BKSH


@pytest.mark.parametrize(("dtype", "rel"), TYPES)
@pytest.mark.parametrize("positions", [[0, 15, 79], [16, 47, 48]], ids=str)
@pytest.mark.parametrize("programs", [1, 12, 1000])
def test_what_the_general_path_gives(monkeypatch, programs, positions, dtype, rel):
    """Parts of one block and of more, of which some lie past the query; one row is not real."""
    parts, caches, positions_B = operands(positions, dtype)
    real_B = np.array([True, True, False])
    wanted = plain(parts, caches, positions_B, real_B)
    monkeypatch.setattr(few_queries, "TILES", few_rows.Tiles(32, 0, programs=programs))
    angles_Bh = rotary_angles(positions_B[:, None], H, THETA)[:, 0]
    turn = jnp.cos(angles_Bh), jnp.sin(angles_Bh)
    actual = jax.jit(few_heads.attention)(parts, turn, caches, positions_B, real_B)
    assert all(a.dtype == dtype for a in actual)
    actual, wanted = (
        jax.tree.map(lambda a: np.asarray(a, np.float64), arrays) for arrays in (actual, wanted)
    )
    oracle.close(actual[0][real_B], wanted[0][real_B], rel)
    for cache, before, after in zip(actual[1:], caches, wanted[1:], strict=True):
        changed_BKSH = after != np.asarray(before, np.float64)
        assert not changed_BKSH[~real_B].any()
        np.testing.assert_array_equal(cache[~changed_BKSH], after[~changed_BKSH])
        oracle.close(cache[changed_BKSH], after[changed_BKSH], rel)


def test_what_it_takes(monkeypatch):
    k_BKSH = jnp.zeros((B, K, S, H), jnp.bfloat16)
    assert not few_heads.fits(G, k_BKSH, jnp.bfloat16), "on CPU"
    monkeypatch.setattr(few_rows, "platform", lambda: "gpu")
    assert few_heads.fits(G, k_BKSH, jnp.bfloat16)
    assert not few_heads.fits(G, k_BKSH[..., : H // 2], jnp.bfloat16)
    assert not few_heads.fits(G, k_BKSH, jnp.float16)
    assert not few_heads.fits(G, k_BKSH.astype(jnp.int8), jnp.bfloat16)
    assert not few_heads.fits(few_rows.MOST + 1, k_BKSH, jnp.bfloat16)
