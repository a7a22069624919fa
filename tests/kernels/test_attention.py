import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax.kernels.attention import attention, causal_mask

B, L, S, K, G, H = 2, 5, 7, 3, 4, 6


def operands(queries=L, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, queries, K, G, H), (B, S, K, H), (B, S, K, H), (B, queries, K, G, H)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


@jax.jit
def run(q_BLKGH, k_BSKH, v_BSKH, g_BLKGH, allowed_BLS):
    out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, allowed_BLS), q_BLKGH, k_BSKH, v_BSKH)
    return out, *pull(g_BLKGH)


def weighted(q_BLKGH, k_BSKH, v_BSKH, g_BLKGH, allowed_BLS):
    return (oracle.attend(q_BLKGH, k_BSKH, v_BSKH, allowed_BLS) * g_BLKGH).sum()


def compare(arrays, allowed_BLS):
    arrays64 = [np.asarray(a, np.float64) for a in arrays]
    out = oracle.attend(*arrays64[:3], allowed_BLS)
    gradients = oracle.gradient(weighted, (0, 1, 2))(*arrays64, allowed_BLS)
    oracle.close(run(*arrays, allowed_BLS), (out, *gradients), rel=2e-6)


def test_values_and_gradients_with_any_mask():
    """More keys than queries, and a mask without any pattern in which each query sees something."""
    rng = np.random.default_rng(1)
    allowed_BLS = rng.random((B, L, S)) < 0.4
    allowed_BLS[:, np.arange(L), rng.integers(S, size=L)] = True
    compare(operands(), allowed_BLS)


SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 3], [1, 1, 1, 1, 1, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 0, 1, 0, 1], [0, 1, 2, 3, 4, 0, 1]])


def test_values_and_gradients_of_packed_documents():
    allowed_BLS = causal_mask(POSITIONS, SEGMENTS)
    np.testing.assert_array_equal(allowed_BLS, oracle.may_see(SEGMENTS))
    compare(operands(queries=S), allowed_BLS)


def test_documents_do_not_see_each_other():
    q, k, v, g = operands(queries=S)
    allowed_BLS = oracle.may_see(SEGMENTS)
    before = run(q, k, v, g, allowed_BLS)[0]
    k, v = (a.at[0, 2:4].set(99.0) for a in (k, v))  # the end of document 1, the start of 2
    after = run(q, k, v, g, allowed_BLS)[0]
    same = np.asarray((before == after).all(axis=(2, 3, 4)))
    np.testing.assert_array_equal(same, [[1, 1, 0, 0, 0, 1, 1], [1] * 7])


def test_a_query_that_sees_nothing_stays_finite():
    allowed_BLS = np.ones((B, L, S), bool)
    allowed_BLS[0, 2] = False
    q, k, v, g = operands()
    out, *gradients = run(q, k, v, g, allowed_BLS)
    assert all(np.isfinite(a).all() for a in (out, *gradients))
    g = g.at[0, 2].set(0)  # what it gives is not used: nothing else may feel it
    _, *unused = run(q, k, v, g, allowed_BLS)
    assert not unused[0][0, 2].any()


def test_large_scores_do_not_overflow():
    q, k, v, g = operands()
    allowed_BLS = np.ones((B, L, S), bool)
    out, *gradients = run(q * 1e3, k * 1e3, v, g, allowed_BLS)
    assert all(np.isfinite(a).all() for a in (out, *gradients))
    assert np.abs(out).max() <= np.abs(v).max() * (1 + 1e-6)


def test_bfloat16_keeps_its_type_and_its_scores_in_float32():
    """Scores near 60 differ by less than bfloat16 can tell apart: rounded, they would all tie."""
    q = jnp.full((1, 1, 1, 1, 64), 8.0, jnp.bfloat16)
    k = jnp.stack([jnp.full((64,), 1.0), jnp.full((64,), 1.0).at[0].set(1.125)])
    k = k[None, :, None].astype(jnp.bfloat16)
    v = jnp.stack([jnp.zeros(64), jnp.ones(64)])[None, :, None].astype(jnp.bfloat16)
    out = attention(q, k, v, jnp.ones((1, 1, 2), bool))
    assert out.dtype == jnp.bfloat16
    expected = 1 / (1 + np.exp(-0.125))  # the scores are 64 and 64.125
    np.testing.assert_allclose(np.float32(out), expected, rtol=2**-8)


@pytest.mark.parametrize("length", [1, 2])
def test_one_token(length):
    """A query that sees one key returns its value."""
    q, k, v, g = operands(queries=length)
    allowed_BLS = np.zeros((B, length, S), bool)
    allowed_BLS[:, :, 4] = True
    out = run(q, k, v, g, allowed_BLS)[0]
    expected = jnp.broadcast_to(v[:, None, 4, :, None], out.shape)
    oracle.close(out, expected, rel=1e-6)
