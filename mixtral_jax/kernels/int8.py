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

from mixtral_jax.kernels import ceil, dot, platform, vary_like
from mixtral_jax.kernels.rows import starts

LARGEST = 127
STEP = np.float32(1 / LARGEST)
"""Of a channel's largest value, what one step of int8 stands for."""
LEAST_SCALE = np.finfo(np.float32).smallest_normal
"""XLA takes what is smaller as 0."""
MOST, LEAST = 1 << 20, 1 << 17
"""Values in a block at most: 4 MiB in float32, in the cache that cores share; and at least, where
that makes fewer than four blocks. XLA:CPU converts small blocks on one core."""

FEW = 256
"""Rows that every expert can multiply in less time than converting its matrices takes on a TPU,
which does some 160 operations for each byte that it reads or writes: 2 for each row and byte of
int8, of which a conversion moves 4 more."""

TPU_ROWS = 8
"""Rows that XLA for TPU gives to its matrix units; one row it multiplies by the vector units, which
takes several times as long as reading the matrix."""

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
      values, and scale without those dimensions: 1 for a channel of zeros, and where it would be
      below LEAST_SCALE; no finite number for one whose w is not finite, so that products tell.
    """
    kept = [axis for axis in range(w.ndim) if axis not in contracted]
    wide = w.transpose(*kept, *contracted).astype(jnp.float32)
    summed = tuple(range(len(kept), w.ndim))
    scale = jnp.max(jnp.abs(wide), axis=summed, keepdims=True) * STEP
    scale = jnp.where(scale < LEAST_SCALE, 1, scale)
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
        rows = x_RD.shape[0]
        if platform() == "tpu" and rows < TPU_ROWS:
            x_RD = jnp.pad(x_RD, ((0, TPU_ROWS - rows), (0, 0)))
        sums_RF = dot(x_RD, w.values.astype(x_RD.dtype), 1)[:rows]
    return (sums_RF * w.scale[None]).astype(dtype or x_RD.dtype)


def experts(
    x_RD: jax.Array, gate_EFD: Int8, up_EFD: Int8, down_EDF: Int8, group_sizes_E: jax.Array
) -> jax.Array:
    """SwiGLU of rows sorted by expert, up to FEW: each expert takes all of them, and keeps its own.

    For that it reads a matrix once, as it is; a grouped product wants it converted, which writes
    and reads it in a wider type. On TPU fewer rows than experts take one expert each.

    Returns:
      out_RD in the type of x; rows past sum(group_sizes) are zeros.
    """
    count, rows = group_sizes_E.shape[0], x_RD.shape[0]
    if platform() == "tpu" and rows < count:
        return _row_by_row(x_RD, (gate_EFD, up_EFD, down_EDF), group_sizes_E)
    place_ER = jnp.arange(rows, dtype=jnp.int32)[None] - starts(group_sizes_E)[:, None]
    mine_ER = (place_ER >= 0) & (place_ER < group_sizes_E[:, None])

    def of_all(w: Int8) -> jax.Array:
        flat = Int8(w.values.reshape(-1, w.values.shape[-1]), w.scale.reshape(-1))
        return product(x_RD, flat).reshape(rows, count, -1)

    hidden_REF = jax.nn.silu(of_all(gate_EFD)) * of_all(up_EFD)
    values_EDF = vary_like(down_EDF.values, x_RD).astype(x_RD.dtype)
    out_ERD = jnp.einsum("REF,EDF->ERD", hidden_REF, values_EDF, preferred_element_type=jnp.float32)
    out_ERD = (out_ERD * down_EDF.scale[:, None]).astype(x_RD.dtype)
    return jnp.where(mine_ER[..., None], out_ERD, 0).sum(axis=0)


def _row_by_row(x_RD, matrices: tuple[Int8, ...], group_sizes_E):
    """`experts`, where each row reads the matrices of its expert, and no others are read."""
    count, rows = group_sizes_E.shape[0], x_RD.shape[0]
    ends_E = jnp.cumsum(group_sizes_E)
    expert_R = (jnp.arange(rows)[:, None] >= ends_E[None]).sum(axis=1)

    def of_row(row):
        gate_FD, up_FD, down_DF = (
            Int8(*(lax.dynamic_index_in_dim(a, expert_R[row], keepdims=False) for a in w))
            for w in matrices
        )
        hidden_RF = jax.nn.silu(product(x_RD, gate_FD)) * product(x_RD, up_FD)
        here_R = (jnp.arange(rows) == row) & (expert_R < count)
        return jnp.where(here_R[:, None], product(hidden_RF, down_DF), 0)

    # No loop: the compiler counts the body of one once (analysis/prices.py).
    return sum(of_row(row) for row in range(rows))


def _blocks(x_RD, values_FD):
    channels, _ = values_FD.shape
    size = ceil(channels, blocks_of(values_FD.size, MOST))
    x_RD = widened_if_few(x_RD)

    def one_block(i, out_FR):
        first = jnp.minimum(i * size, channels - size)  # the last ones may be made twice
        values_fD = lax.dynamic_slice_in_dim(values_FD, first, size)
        out_fR = dot(values_fD.astype(x_RD.dtype), x_RD, 1)
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
