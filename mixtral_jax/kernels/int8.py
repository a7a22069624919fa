"""Matrices in int8 with a scale for each output channel, and rows times such a matrix.

Output channels come first and what is summed over last: w[f, d] is about values[f, d] * scale[f].
Paper: arXiv 2208.07339, section 2 (symmetric absmax quantisation, by vector).

Bodies of the product, with one meaning:
  xla     one product of converted values: TPU and GPU fuse the conversion into it.
  blocks  a loop over blocks of channels, converted and multiplied while they lie in cache, for CPU:
          XLA:CPU writes all of a converted matrix to memory first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mixtral_jax.kernels import platform, vary_like

LARGEST = 127
STEP = np.float32(1 / LARGEST)
MOST, LEAST = 1 << 20, 1 << 17
"""Values in a block at most: 4 MiB in float32, in the cache that cores share; and at least, where
that makes fewer than four blocks. XLA:CPU converts small blocks on one core."""

MANY = 8
"""Rows that XLA:CPU multiplies in bfloat16 as fast as in float32, or faster; fewer take longer."""


class Int8(NamedTuple):
    """A matrix, or one of each expert: then both arrays have a dimension of experts in front.

    In place of an array each may be a tuple of arrays, one an expert.
    """

    values: jax.Array | tuple[jax.Array, ...]
    """int8, [..., F, D]."""
    scale: jax.Array | tuple[jax.Array, ...]
    """float32, [..., F]."""


def quantize(w: jax.Array, contracted: tuple[int, ...]) -> Int8:
    """The nearest int8 to w / scale, half to even, with scale = max|w| / 127 of each channel.

    Args:
      w: of any float type; computed in float32.
      contracted: its dimensions that a product sums over; they go last, in their order.
    Returns:
      values, and scale without those dimensions; 1 for a channel of zeros.
    """
    kept = [axis for axis in range(w.ndim) if axis not in contracted]
    wide = w.transpose(*kept, *contracted).astype(jnp.float32)
    summed = tuple(range(len(kept), w.ndim))
    scale = jnp.max(jnp.abs(wide), axis=summed, keepdims=True) * STEP
    scale = jnp.where(scale > 0, scale, 1)
    values = jnp.clip(jnp.round(wide * (1 / scale)), -LARGEST, LARGEST).astype(jnp.int8)
    return Int8(values, scale.squeeze(summed))


def dequantize(w: Int8, dtype: jnp.dtype) -> jax.Array:
    """values * scale, rounded once to a type; output channels first, one dimension summed over."""
    return (w.values.astype(jnp.float32) * w.scale[..., None]).astype(dtype)


def product(x_RD: jax.Array, w: Int8, dtype=None, implementation: str | None = None) -> jax.Array:
    """out[r, f] = scale[f] * sum over d of x[r, d] values[f, d]; no gradient.

    Inside shard_map, or on one device.

    Args:
      w: one matrix.
      dtype: of the result; that of x if None.
      implementation: xla or blocks; None is the platform's best.
    """
    body = implementation or ("blocks" if platform() == "cpu" else "xla")
    x_RD = vary_like(x_RD, *w)
    if body == "blocks":
        sums_RF = _blocks(x_RD, vary_like(w.values, x_RD))
    else:
        sums_RF = _dot(x_RD, w.values.astype(x_RD.dtype))
    return (sums_RF * w.scale[None]).astype(dtype or x_RD.dtype)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """a times b transposed, in float32."""
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _blocks(x_RD, values_FD):
    channels, _ = values_FD.shape
    size = ceil(channels, blocks_of(values_FD.size, MOST))
    x_RD = widened_if_few(x_RD)

    def one_block(i, out_FR):
        first = jnp.minimum(i * size, channels - size)  # the last ones may be made twice
        values_fD = lax.dynamic_slice_in_dim(values_FD, first, size)
        out_fR = _dot(values_fD.astype(x_RD.dtype), x_RD)
        return lax.dynamic_update_slice_in_dim(out_FR, out_fR, first, axis=0)

    out_FR = vary_like(jnp.zeros((channels, x_RD.shape[0]), jnp.float32), x_RD, values_FD)
    return lax.fori_loop(0, ceil(channels, size), one_block, out_FR).T


def widened_if_few(x_RD: jax.Array) -> jax.Array:
    """Rows in the type in which XLA:CPU multiplies them faster."""
    return x_RD.astype(jnp.float32) if x_RD.shape[0] < MANY else x_RD


def blocks_of(values: int, most: int) -> int:
    """In how many blocks to convert a matrix of so many values: at least two, or XLA:CPU, which
    runs no loop then, would write all of it to memory."""
    return max(2, ceil(values, most), min(4, ceil(values, LEAST)))


def ceil(size: int, part: int) -> int:
    """Parts that hold it all."""
    return -(-size // part)
