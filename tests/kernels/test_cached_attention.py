"""Attention to a cache, against plain attention over the same keys and values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax.kernels import cached_attention as kernel
from mixtral_jax.kernels.attention import attention
from mixtral_jax.kernels.int8 import quantize

B, L, K, G, H, S, LAYERS = 3, 4, 2, 3, 5, 48, 2
START = np.array([0, 30, 17], np.int32)


@functools.cache
def arrays():
    rng = np.random.default_rng(1)
    q = rng.normal(size=(B, L, K, G, H)).astype(np.float32)
    new = rng.normal(size=(2, B, L, K, H)).astype(np.float32)
    old = rng.normal(size=(2, LAYERS, B, K, S, H)).astype(np.float32)
    return q, new, old


def positions():
    return START[:, None] + np.arange(L, dtype=np.int32)[None]


def filled(rows):
    """[2, B, S, K, H] of layer 1, with the new keys and values of some rows in their places."""
    _, new, old = arrays()
    whole = old[:, 1].swapaxes(2, 3).copy()
    for row in rows:
        whole[:, row, START[row] : START[row] + L] = new[:, row]
    return whole


@pytest.mark.parametrize("block", [16, 20, 48, 512])
@pytest.mark.parametrize("stacked", [True, False])
def test_all_rows_equal_plain_attention(block, stacked, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", block)
    q, new, old = arrays()
    cache = kernel.Cached(*(old if stacked else old[:, 1]))
    where = kernel.Where(jnp.int32(1) if stacked else None, None)
    real = np.array([[True] * L, [True] * L, [False] * L])

    @jax.jit
    def run(q, new, cache):
        cache = kernel.write(cache, *new, positions(), real, where)
        return cache, kernel.attention(q, cache, positions(), where)

    cache, out = run(q, new, cache)
    whole = filled([0, 1])  # the third row's are not real: not written
    for got, wanted, before in zip(cache[:2], whole, old, strict=True):
        got = np.asarray(got)
        np.testing.assert_array_equal(got[1] if stacked else got, wanted.swapaxes(1, 2))
        if stacked:
            np.testing.assert_array_equal(got[0], before[0])
    expected = attention(q, *whole, positions()[:, :, None] >= np.arange(S))
    oracle.close(out, expected, rel=2e-6)


def test_a_stack_of_one_layer_is_that_layer():
    q, _, old = arrays()
    one, stack = kernel.Cached(*old[:, 1]), kernel.Cached(*old[:, 1:])
    alone = kernel.attention(q, one, positions(), kernel.Where(None, None))
    stacked = kernel.attention(q, stack, positions(), kernel.Where(jnp.int32(0), None))
    np.testing.assert_array_equal(alone, stacked)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_one_row_equals_the_same_row_of_all(row, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 16)
    q, new, old = arrays()
    where = kernel.Where(jnp.int32(1), jnp.int32(row))
    mine = slice(row, row + 1)
    cache, real = kernel.Cached(*old), np.array([[True, True, True, False]])

    @jax.jit
    def run(q, new, cache):
        cache = kernel.write(cache, *new, positions()[mine], real, where)
        return cache, kernel.attention(q, cache, positions()[mine], where)

    cache, out = run(q[mine], new[:, mine], cache)
    whole = filled([row])
    last = START[row] + L - 1  # is not real: what was there before stays
    whole[:, row, last] = old[:, 1, row, :, last]
    for got, wanted in zip(cache[:2], whole, strict=True):
        np.testing.assert_array_equal(np.asarray(got)[1], wanted.swapaxes(1, 2))
    allowed = positions()[mine, :, None] >= np.arange(S)
    oracle.close(out, attention(q[mine], *whole[:, mine], allowed), rel=2e-6)


def test_an_int8_cache_holds_each_head_to_half_a_step():
    _, new, old = arrays()
    new = new.copy()
    new[:, 0, 0, 0] = 0
    values = jnp.zeros(old[0, 0].shape, jnp.int8), jnp.ones(old[0, 0].shape[:3])
    cache = kernel.Cached(values[0], values[0], values[1], values[1])
    real = np.ones((B, L), bool)
    cache = kernel.write(cache, *new, positions(), real, kernel.Where(None, None))
    for values, scale, wanted in zip(cache[:2], cache[2:], new, strict=True):
        assert (values.dtype, int(jnp.abs(values).max())) == (jnp.int8, 127)
        for row, start in enumerate(START):
            step = np.asarray(scale)[row, :, start : start + L, None]
            held = np.float32(values)[row, :, start : start + L] * step
            assert (np.abs(held - wanted[row].swapaxes(0, 1)) <= step * 0.5001).all()
        np.testing.assert_array_equal(scale[0, 0, 0], 1)  # as of any channel of zeros


def test_attention_to_an_int8_cache_is_that_to_its_values(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 16)
    q, _, old = arrays()
    (k, k_scale), (v, v_scale) = (quantize(jnp.asarray(a), (3,)) for a in old[:, 1])
    where = kernel.Where(None, None)
    out = kernel.attention(q, kernel.Cached(k, v, k_scale, v_scale), positions(), where)
    wide = kernel.Cached(k * k_scale[..., None], v * v_scale[..., None])
    oracle.close(out, kernel.attention(q, wide, positions(), where), rel=2e-6)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("block", [16, 20, 48])
def test_what_none_sees_may_be_anything(int8, block, monkeypatch):
    """As an earlier request leaves it."""
    monkeypatch.setattr(kernel, "BLOCK", block)
    q, _, old = arrays()
    cache, where = kernel.Cached(*old[:, 1]), kernel.Where(None, None)
    if int8:
        (k, k_scale), (v, v_scale) = (quantize(jnp.asarray(a), (3,)) for a in cache[:2])
        cache = kernel.Cached(k, v, k_scale, v_scale)
    last_B11 = positions().max(axis=1)[:, None, None]
    unseen_B1S = np.arange(S)[None, None] > last_B11

    def spoil(array):
        if array is None or array.dtype == jnp.int8:
            return array
        unseen = unseen_B1S if array.ndim == 3 else unseen_B1S[..., None]
        return jnp.where(unseen, jnp.nan, array)

    spoiled = kernel.Cached(*map(spoil, cache))
    np.testing.assert_array_equal(
        kernel.attention(q, spoiled, positions(), where),
        kernel.attention(q, cache, positions(), where),
    )


def test_whole_caches_are_read_at_once_where_programs_are_priced(monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 16)
    q, _, old = arrays()
    where = kernel.Where(None, None)

    def text():
        run = jax.jit(lambda q, k, v: kernel.attention(q, kernel.Cached(k, v), positions(), where))
        return run.lower(q, *old[:, 1]).as_text()

    assert "stablehlo.while" in text()
    with kernel.whole():
        assert "stablehlo.while" not in text()
    assert "stablehlo.while" in text()
