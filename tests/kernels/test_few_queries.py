"""The kernel for one query of each sequence, interpreted, against the general cached attention."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax import kernels
from mixtral_jax.kernels import cached_attention, few_queries, few_rows
from mixtral_jax.kernels.cached_attention import Cached, Where

B, K, G, H, S = 3, 2, 4, 16, 80


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "interpret", lambda: jax.default_backend() == "cpu")


def operands(positions):
    rng = np.random.default_rng(0)
    shapes = (B, 1, K, G, H), (B, K, S, H), (B, K, S, H)
    q_BLKGH, k_BKSH, v_BKSH = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    for row, position in enumerate(positions):
        k_BKSH[row, :, position + 1 :], v_BKSH[row, :, position + 1 :] = 1e4, 1e4
    return 3 * q_BLKGH, Cached(k_BKSH, v_BKSH), np.int32(positions)


@pytest.mark.parametrize("positions", [[0, 15, 79], [16, 47, 48]], ids=str)
@pytest.mark.parametrize("programs", [1, 12, 1000])
def test_what_the_general_path_gives(monkeypatch, positions, programs):
    """Parts of one block and of more, of which some lie past the query; an incomplete last block"""
    q_BLKGH, cache, positions_B = operands(positions)
    wanted = cached_attention.attention(q_BLKGH, cache, positions_B[:, None], Where(None, None))
    monkeypatch.setattr(few_rows, "platform", lambda: "gpu")
    monkeypatch.setattr(few_queries, "TILES", few_rows.Tiles(32, 0, programs=programs))
    q_BKGH = q_BLKGH[:, 0] * np.float32(H**-0.5)
    actual = jax.jit(few_queries.attention)(q_BKGH, *cache[:2], positions_B)
    oracle.close(actual, np.asarray(wanted)[:, 0], rel=2e-6)


def test_what_it_takes(monkeypatch):
    q_BLKGH, (k_BKSH, *_), _ = jax.tree.map(jnp.bfloat16, operands([0, 0, 0]))
    assert not few_queries.fits(q_BLKGH, k_BKSH), "on CPU"
    monkeypatch.setattr(few_rows, "platform", lambda: "gpu")
    assert few_queries.fits(q_BLKGH, k_BKSH)
    assert not few_queries.fits(jnp.tile(q_BLKGH, (1, 2, 1, 1, 1)), k_BKSH)
    assert not few_queries.fits(q_BLKGH[..., :12], k_BKSH[..., :12])
    assert not few_queries.fits(jnp.tile(q_BLKGH, 16), jnp.tile(k_BKSH, 16)), "heads of 256"
    assert not few_queries.fits(q_BLKGH, k_BKSH.astype(jnp.int8))
    assert not few_queries.fits(q_BLKGH, k_BKSH[None])
    long = jax.ShapeDtypeStruct((B, K, 2**25, H), k_BKSH.dtype)
    assert not few_queries.fits(q_BLKGH, long)
