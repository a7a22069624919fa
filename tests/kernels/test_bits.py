"""bfloat16 as its bits, and rows times a matrix that lies so."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax.kernels import bits


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.int32])
def test_bits_and_back(dtype):
    x = jnp.asarray([0, 1, -3, 200], dtype)
    moved = bits.bits(x)
    assert moved.dtype == (jnp.uint16 if x.dtype.itemsize == 2 else dtype)
    back = bits.floats(moved, x.dtype)
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, x)


def operands(rows, depth, width, dtype):
    rng = np.random.default_rng([rows, depth])
    x_RD, w_DF = rng.normal(size=(rows, depth)), rng.normal(size=(depth, width))
    return jnp.asarray(x_RD, dtype), jnp.asarray(w_DF, jnp.bfloat16)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("depth", "most"), [(24, 60), (7, 20), (7, 1 << 20), (1, 1)])
def test_product(monkeypatch, depth, most, rows):
    """Blocks that fill the matrix, and a last one that overlaps the one before it."""
    monkeypatch.setattr(bits, "MOST", most)
    x_RD, w_DF = operands(rows, depth, 10, jnp.float32)
    out = jax.jit(bits.product)(x_RD, bits.bits(w_DF))
    assert out.dtype == jnp.float32
    oracle.close(out, np.float64(x_RD) @ np.float64(w_DF), rel=1e-6)


def test_an_infinity_that_two_blocks_have_stays_one(monkeypatch):
    monkeypatch.setattr(bits, "MOST", 20)
    x_RD, w_DF = operands(1, 7, 10, jnp.float32)
    out = bits.product(x_RD, bits.bits(w_DF.at[5].set(jnp.inf)))
    np.testing.assert_array_equal(out, np.sign(x_RD[:, 5:6]) * np.full((1, 10), np.inf))


@pytest.mark.parametrize("rows", [3, 9])
def test_bfloat16_rows_are_summed_in_float32(rows):
    """Few of them are multiplied in float32 and many in bfloat16."""
    x_RD, w_DF = operands(rows, 40, 6, jnp.bfloat16)
    wide = np.float64(x_RD) @ np.float64(w_DF)
    narrow, asked = (bits.product(x_RD, bits.bits(w_DF), dtype) for dtype in (None, jnp.float32))
    assert (narrow.dtype, asked.dtype) == (jnp.bfloat16, jnp.float32)
    oracle.close(asked, wide, rel=1e-6)
    np.testing.assert_array_equal(narrow, asked.astype(jnp.bfloat16))


def test_no_more_than_a_block_is_widened():
    """Of a matrix of 64 MiB; XLA:CPU would write it all in float32."""
    x_RD, w_DF = (
        jax.ShapeDtypeStruct(*a) for a in (((1, 4096), "float32"), ((4096, 8192), "uint16"))
    )
    memory = jax.jit(bits.product).lower(x_RD, w_DF).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * 4 * bits.MOST
