"""Parameters in int8, and the products with those outside the experts."""

from __future__ import annotations

import jax
from flax import nnx
from jax import lax

from mixtral_jax import sharding
from mixtral_jax.kernels import int8


class Int8Param(nnx.Module):
    """Stands in the place of a matrix, an nnx.Param, whose name says what was quantised.

    The values' dimensions are those of the matrix with the ones that are summed over moved to the
    end: `head_DV` has values [V, D] and scale [V]; `gate_EDF` has [E, F, D] and [E, F].
    """

    def __init__(self, arrays: int8.Int8, values_axes: tuple, scale_axes: tuple):
        """Args: arrays, and their logical axes."""
        self.values = nnx.Param(arrays.values, logical_axes=values_axes)
        self.scale = nnx.Param(arrays.scale, logical_axes=scale_axes)

    def arrays(self) -> int8.Int8:
        return int8.Int8(self.values.get_value(), self.scale.get_value())


def columns(x_BLD: jax.Array, w: Int8Param, axis: str, dtype=None) -> jax.Array:
    """x times a matrix whose output channels, of any number of dimensions, come out behind B, L.

    Args:
      axis: the logical one of the first of those dimensions, which the result is split over.
      dtype: of the result; that of x if None.
    """
    arrays = w.arrays()
    shape = arrays.scale.shape
    rest = [None] * (len(shape) - 1)
    arrays = int8.Int8(
        sharding.shard(arrays.values, axis, *rest, None), sharding.shard(arrays.scale, axis, *rest)
    )

    def local(x_BLD, arrays):
        values_FD = arrays.values.reshape(-1, arrays.values.shape[-1])
        flat = int8.Int8(values_FD, arrays.scale.reshape(-1))
        out_TF = int8.product(x_BLD.reshape(-1, x_BLD.shape[-1]), flat, dtype)
        return out_TF.reshape(*x_BLD.shape[:2], *arrays.scale.shape)

    batch, channels = sharding.spec("batch"), sharding.spec(axis)
    out = sharding.spec("batch", None, axis)
    return jax.shard_map(local, in_specs=(batch, channels), out_specs=out)(x_BLD, arrays)


def out_of_heads(x_BLKGH: jax.Array, w: Int8Param) -> jax.Array:
    """The heads' outputs times wo_KGHD, summed over the devices that the heads are split over."""
    arrays = w.arrays()
    values_DKGH = sharding.shard(arrays.values, None, "heads", None, None)
    scale_D = sharding.shard(arrays.scale, None)

    def local(x_BLKGH, values_DKGH, scale_D):
        x_TF = x_BLKGH.reshape(x_BLKGH.shape[0] * x_BLKGH.shape[1], -1)
        flat = int8.Int8(values_DKGH.reshape(values_DKGH.shape[0], -1), scale_D)
        out_TD = lax.psum(int8.product(x_TF, flat), sharding.in_use(sharding.TENSOR))
        return out_TD.reshape(*x_BLKGH.shape[:2], -1)

    batch = sharding.spec("batch")
    specs = (sharding.spec("batch", None, "heads"), sharding.spec(None, "heads"), sharding.spec())
    return jax.shard_map(local, in_specs=specs, out_specs=batch)(x_BLKGH, values_DKGH, scale_D)
