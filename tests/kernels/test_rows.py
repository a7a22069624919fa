import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.kernels import rows as rows_


@st.composite
def segments(draw):
    """Six segments in two buffers, anywhere but never overlapping, listed in any order."""
    sizes = draw(st.lists(st.integers(0, 5), min_size=6, max_size=6))
    starts = []
    for _ in range(2):
        order = draw(st.permutations(range(6)))
        gaps = draw(st.lists(st.integers(0, 2), min_size=6, max_size=6))
        start_P, at = [0] * 6, 0
        for p, gap in zip(order, gaps):
            start_P[p] = at + gap
            at += gap + sizes[p]
        starts.append(start_P)
    return starts[0], starts[1], sizes


@given(segments())
def test_segment_map(drawn):
    to_P, from_P, sizes_P = drawn
    rows, missing = 40, 99
    expected = np.full(rows, missing)
    for to, source, size in zip(*drawn):
        expected[to : to + size] = np.arange(source, source + size)
    run = jax.jit(rows_.segment_map, static_argnums=(3, 4))
    actual = run(*(jnp.asarray(a, jnp.int32) for a in (to_P, from_P, sizes_P)), rows, missing)
    np.testing.assert_array_equal(actual, expected)
    assert actual.dtype == jnp.int32


def test_segments_that_reach_past_the_rows_asked_for_are_cut():
    arrays = (jnp.array(a, jnp.int32) for a in ([3, 0], [7, 20], [9, 2]))
    actual = rows_.segment_map(*arrays, 5, -9)
    np.testing.assert_array_equal(actual, [20, 21, -9, 7, 8])


@pytest.mark.parametrize("copies", [1, 2, 3])
@pytest.mark.parametrize(("platform", "width"), [("cpu", 3), ("tpu", 3), ("tpu", 256)])
def test_take_rows_has_the_gradient_of_a_gather(monkeypatch, platform, width, copies):
    """Rows that nobody takes, rows taken up to `copies` times, and places that take none."""
    monkeypatch.setattr(rows_, "platform", lambda: platform)
    source, places = 7, 23
    rng = np.random.default_rng(copies)
    inverse_CS = np.full((copies, source), places)
    index_R = np.full(places, source)
    for place in rng.permutation(places)[:15]:
        free = np.argwhere(inverse_CS == places)
        if len(free):
            choice, row = free[rng.integers(len(free))]
            inverse_CS[choice, row], index_R[place] = place, row
    x_SD = jnp.asarray(rng.normal(size=(source, width)), jnp.float32)
    g_RD = jnp.asarray(rng.normal(size=(places, width)), jnp.float32)

    def gather(x_SD):
        padded = jnp.concatenate([x_SD, jnp.zeros((1, width))])
        return padded[index_R]

    expected, pull = jax.vjp(gather, x_SD)
    index_R, inverse_CS = jnp.asarray(index_R, jnp.int32), jnp.asarray(inverse_CS, jnp.int32)
    actual, own_pull = jax.vjp(lambda x: rows_.take_rows(x, index_R, inverse_CS), x_SD)
    np.testing.assert_array_equal(actual, expected)
    oracle.close(own_pull(g_RD), pull(g_RD), rel=1e-6)
    jaxpr = str(jax.make_jaxpr(own_pull)(g_RD))
    assert "scatter" not in jaxpr, "the gradient of take_rows must gather"


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_weighted_sum_and_its_gradients(monkeypatch, platform):
    monkeypatch.setattr(rows_, "platform", lambda: platform)
    rng = np.random.default_rng(3)
    weights, parts, g = (rng.normal(size=s) for s in ((7, 3), (3, 7, 5), (7, 5)))
    wanted = (
        np.einsum("TC,CTD->TD", weights, parts),
        np.einsum("TD,CTD->TC", g, parts),
        np.einsum("TC,TD->CTD", weights, g),
    )
    weights, parts, g = (jnp.asarray(a, jnp.float32) for a in (weights, parts, g))
    out, pull = jax.vjp(rows_.weighted_sum, weights, parts)
    oracle.close((out, *pull(g)), wanted, rel=1e-6)


def test_bfloat16_rows_are_added_in_float32_and_rounded_once(monkeypatch):
    """1 + 2^-8 + 2^-8 is a bfloat16, and 1 + 2^-8 is not."""
    monkeypatch.setattr(rows_, "platform", lambda: "cpu")
    parts = jnp.full((3, 1, 2), 2.0**-8, jnp.bfloat16).at[0].set(1)
    assert rows_.weighted_sum(jnp.ones((1, 3)), parts)[0, 0] == 1 + 2**-7
    inverse_CS = jnp.arange(3, dtype=jnp.int32)[:, None]
    taken = jax.vjp(lambda x: rows_.take_rows(x, jnp.zeros(3, jnp.int32), inverse_CS), parts[0])
    (grad,) = taken[1](parts[:, 0])
    assert grad[0, 0] == 1 + 2**-7
