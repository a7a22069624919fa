import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax.model.layers import RMSNorm, product, rotary_angles, rotate

B, L, N, H, D = 2, 5, 3, 6, 7
THETA = 1e6


def positions():
    return np.array([[0, 1, 2, 3, 4], [0, 1, 0, 31, 4095]])


def weighted_rope(x_BLNH, g_BLNH, positions_BL):
    return (oracle.rope(x_BLNH, positions_BL, THETA) * g_BLNH).sum()


def test_rotation_against_complex_numbers():
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, B, L, N, H))

    def turn(x):
        return rotate(x, rotary_angles(jnp.asarray(positions()), H, THETA))

    out, pull = jax.vjp(turn, jnp.asarray(x, jnp.float32))
    # Angles are float32: of 4095 radians the last digit is 2.4e-4.
    small = np.arange(B * L).reshape(B, L) != B * L - 1
    oracle.close(out[small], oracle.rope(x, positions(), THETA)[small], rel=3e-6)
    oracle.close(out, oracle.rope(x, positions(), THETA), rel=5e-4)
    (dx,) = pull(jnp.asarray(g, jnp.float32))
    expected = oracle.gradient(weighted_rope, 0)(x, g, positions())
    oracle.close(dx[small], expected[small], rel=3e-6)


def test_rotation_depends_on_the_distance_only():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(a, jnp.float32) for a in rng.normal(size=(2, 1, 1, 1, H)))

    def score(query_at, key_at):
        angles = [rotary_angles(jnp.array([[at]]), H, THETA) for at in (query_at, key_at)]
        return float((rotate(q, angles[0]) * rotate(k, angles[1])).sum())

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    assert abs(score(9, 4) - score(4, 9)) > 1e-2


def test_rotation_is_the_half_rotation_of_the_released_weights():
    """At position 1 with H = 4: dimension 0 turns with 2 by one radian, 1 with 3 by theta^-1/2."""
    x = jnp.asarray([1.0, 10.0, 100.0, 1000.0]).reshape(1, 1, 1, 4)
    out = rotate(x, rotary_angles(jnp.array([[1]]), 4, THETA)).reshape(-1)
    c, s, c2, s2 = np.cos(1), np.sin(1), np.cos(1e-3), np.sin(1e-3)
    expected = [c - 100 * s, 10 * c2 - 1000 * s2, 100 * c + s, 1000 * c2 + 10 * s2]
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_rotation_takes_any_head_dimensions_and_keeps_the_type():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(B, L, 2, N, H)), jnp.bfloat16)
    angles = rotary_angles(jnp.asarray(positions()), H, THETA)
    out = rotate(x, angles)
    assert out.dtype == jnp.bfloat16
    flat = rotate(x.reshape(B, L, 2 * N, H), angles).reshape(x.shape)
    np.testing.assert_array_equal(out, flat)
    assert angles.dtype == jnp.float32


def weighted_norm(x, weight, g):
    return (oracle.rms_norm(x, weight, 1e-5) * g).sum()


@pytest.mark.parametrize("scale", [1.0, 1e-3], ids=["usual", "small enough for eps"])
def test_rms_norm_values_and_gradients(scale):
    rng = np.random.default_rng(3)
    x, g = scale * rng.normal(size=(B, L, D)), rng.normal(size=(B, L, D))
    weight = rng.normal(size=D)

    def apply(x, weight):
        norm = RMSNorm(D, 1e-5, "float32")
        norm.weight[...] = weight
        return norm(x)

    wanted = oracle.rms_norm(x, weight, 1e-5), *oracle.gradient(weighted_norm, (0, 1))(x, weight, g)
    x, weight, g = (jnp.asarray(a, jnp.float32) for a in (x, weight, g))
    out, pull = jax.vjp(apply, x, weight)
    oracle.close((out, *pull(g)), wanted, rel=2e-6)


def test_rms_norm_is_float32_inside_and_casts_before_the_weight():
    """As the released code does: with a weight of 3, casting afterwards rounds differently."""
    x = jnp.asarray(np.random.default_rng(4).normal(size=(1, 9, 129)), jnp.bfloat16)
    norm = RMSNorm(129, 1e-5, "float32")
    norm.weight[...] = jnp.full(129, 3.0)
    wide = oracle.rms_norm(np.asarray(x, np.float64), 1.0, 1e-5)
    expected = jnp.asarray(wide, jnp.float32).astype(jnp.bfloat16) * jnp.bfloat16(3)
    out = norm(x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, expected)
    assert (expected != (3 * jnp.asarray(wide, jnp.float32)).astype(jnp.bfloat16)).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("out", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("x", "w", "letters"),
    [
        ((D,), (D, 4), "BLD,DV->BLV"),
        ((D,), (D, 3, 2), "BLD,DKH->BLKH"),
        ((3, 2), (3, 2, D), "BLKH,KHD->BLD"),
    ],
    ids=["logits", "into heads", "out of heads"],
)
def test_products_and_their_gradients(x, w, letters, out, dtype):
    """Small whole numbers: products and sums are exact in every type."""
    rng = np.random.default_rng(5)
    of_x, rest = letters.split(",")
    of_w, of_g = rest.split("->")
    over = len(set(of_x) & set(of_w))
    shapes = (B, L, *x), w, (B, L, *w[over:])
    x, w, g = (rng.integers(-3, 4, size=shape).astype(np.float32) for shape in shapes)
    made, pull = jax.vjp(
        lambda x, w: product(x, w, over, out), *(jnp.asarray(a, dtype) for a in (x, w))
    )
    grads = pull(jnp.asarray(g, out))
    wanted = (
        np.einsum(letters, x, w),
        np.einsum(f"{of_g},{of_w}->{of_x}", g, w),
        np.einsum(f"{of_x},{of_g}->{of_w}", x, g),
    )
    assert [a.dtype for a in (made, *grads)] == [out, dtype, dtype]
    oracle.close((made, *grads), wanted, rel=0)
