"""bfloat16 as its bits, for CPU, and rows times a matrix that lies so, for inference.

XLA:CPU widens narrow floats before all that it does, if it only moves them: to take a block out of
a matrix it would write the whole of it in float32, and to write some rows so all of an array.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import NARROW, ceil, vary_like
from mixtral_jax.kernels.int8 import blocks_of, widened_if_few

BITS = jnp.dtype(jnp.uint16)
"""A matrix of this type is one of bfloat16, as its bits."""
MOST = 1 << 21
"""Values in a block at most: 8 MiB in float32, in the cache that cores share."""


def bits(x: jax.Array) -> jax.Array:
    """The bits of an array of a narrow type; any other as it is."""
    return lax.bitcast_convert_type(x, BITS) if x.dtype in NARROW else x


def floats(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What `bits` was given: an array of this type."""
    return lax.bitcast_convert_type(x, dtype) if dtype in NARROW else x


def converted(w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A matrix in the type that is computed in; bits stay, for `product` to convert."""
    return w if w.dtype == BITS else w.astype(dtype)


def product(x_RD: jax.Array, w_DF: jax.Array, dtype: jnp.dtype | None = None) -> jax.Array:
    """x times a matrix of bfloat16 given as its bits, summed in float32; no gradient.

    A block of the matrix's rows is widened, if need be, and multiplied while it lies in cache.
    Inside shard_map, or on one device.

    Args:
      dtype: of the result; that of x if None.
    """
    depth, width = w_DF.shape
    size = ceil(depth, blocks_of(w_DF.size, MOST))
    dtype = dtype or x_RD.dtype
    x_RD, w_DF = widened_if_few(vary_like(x_RD, w_DF)), vary_like(w_DF, x_RD)

    def one_block(i, out_RF):
        first = jnp.minimum(i * size, depth - size)
        new_d = first + jnp.arange(size, dtype=jnp.int32) >= i * size  # the last ones come twice
        x_Rd = jnp.where(new_d[None], lax.dynamic_slice_in_dim(x_RD, first, size, axis=1), 0)
        # Of both, as 0 times an infinity is NaN.
        w_dF = jnp.where(new_d[:, None], lax.dynamic_slice_in_dim(w_DF, first, size), 0)
        w_dF = floats(w_dF, jnp.bfloat16)
        return out_RF + jnp.matmul(
            x_Rd, w_dF.astype(x_Rd.dtype), preferred_element_type=jnp.float32
        )

    out_RF = vary_like(jnp.zeros((x_RD.shape[0], width), jnp.float32), x_RD, w_DF)
    out_RF = lax.fori_loop(0, ceil(depth, size), one_block, out_RF)
    return out_RF.astype(dtype)


def products(
    x_RD: jax.Array, matrices_DF: Sequence[jax.Array], dtype: jnp.dtype | None = None
) -> tuple[jax.Array, ...]:
    """`product` with each of them."""
    return tuple(product(x_RD, w_DF, dtype) for w_DF in matrices_DF)
