"""The small layers: parameters, RMSNorm and rotary position embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mixtral_jax import sharding
from mixtral_jax.kernels import bits, platform


def matrix(
    key: jax.Array,
    shape: tuple[int, ...],
    logical_axes: tuple[str | None, ...],
    scale: float,
    dtype: str,
) -> nnx.Param:
    """A normally distributed parameter that knows the logical axis of each of its dimensions.

    On a mesh, where one is set, each device makes its own slice.
    """
    where = None if jax.sharding.get_abstract_mesh().empty else sharding.spec(*logical_axes)
    value = scale * jax.random.normal(key, shape, jnp.float32, out_sharding=where)
    return nnx.Param(value.astype(dtype), logical_axes=logical_axes)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), computed in float32, cast back, then times a weight."""

    def __init__(self, width: int, eps: float, dtype: str):
        self.weight = nnx.Param(jnp.ones((width,), dtype), logical_axes=(None,))
        self.eps = eps

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        wide = x_BLD.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        normed, weight_D = (a.astype(x_BLD.dtype) for a in (wide * scale, self.weight[...]))
        if platform() == "cpu":  # the same, but it adds up the weight's gradient faster
            normed, weight_D = normed.astype(jnp.float32), weight_D.astype(jnp.float32)
        return (normed * weight_D[None, None, :]).astype(x_BLD.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def product(
    x: jax.Array,
    w: jax.Array,
    over: int,
    dtype: jnp.dtype,
    out_sharding: PartitionSpec | None = None,
) -> jax.Array:
    """x times w, summed in float32 over the last dimensions of x and the first of w, on a mesh.

    Its gradients are products that take the result's gradient as it lies: those that JAX makes have
    XLA:CPU transpose it first, and multiply bfloat16 as float32.

    Args:
      over: how many dimensions are summed over.
      dtype: of the result.
      out_sharding: of the result, if one of those dimensions is split over the mesh.
    """
    dimensions = range(x.ndim - over, x.ndim), range(over)
    return _product(x, w, dimensions, dtype, out_sharding)


def _product(a, b, dimensions, dtype, out_sharding):
    out = jax.lax.dot_general(
        *(a, b, (dimensions, ((), ()))),
        preferred_element_type=jnp.float32,
        out_sharding=out_sharding,
    )
    return out.astype(dtype)


def _product_forward(x, w, *options):
    return product(x, w, *options), (x, w)


def _product_backward(over, dtype, out_sharding, residuals, g):
    x, w = residuals
    g = g.astype(x.dtype)  # as TPUs do with float32 when they multiply it
    lead = x.ndim - over
    of_x, of_w = (jax.typeof(a).sharding for a in (x, w))
    dx = _product(g, w, (range(lead, g.ndim), range(over, w.ndim)), x.dtype, of_x)
    return dx, _product(x, g, (range(lead), range(lead)), w.dtype, of_w)


product.defvjp(_product_forward, _product_backward)


def columns(
    x_BLD: jax.Array,
    ws: Sequence[jax.Array],
    axis: str,
    products: Callable[[jax.Array, list[jax.Array]], Sequence[jax.Array]] = bits.products,
) -> tuple[jax.Array, ...]:
    """x times matrices [D, ...] by a kernel that sees what lies on one device; no gradient.

    Args:
      axis: the logical one of the matrices' second dimension.
      products: of x_TD and matrices [D, F], by default of bfloat16 as bits.
    """

    def body(x_BLD, ws):
        matrices_DF = [w.reshape(w.shape[0], -1) for w in ws]
        outs_TF = products(x_BLD.reshape(-1, x_BLD.shape[-1]), matrices_DF)
        return tuple(o.reshape(*x_BLD.shape[:2], *w.shape[1:]) for o, w in zip(outs_TF, ws))

    ws = [sharding.shard(w, None, axis, *[None] * (w.ndim - 2)) for w in ws]
    specs = sharding.spec("batch"), sharding.spec(None, axis)
    out = sharding.spec("batch", None, axis)
    return jax.shard_map(body, in_specs=specs, out_specs=out, check_vma=False)(x_BLD, ws)


def rows_that_travel(table_VD: jax.Array, ids_BL: jax.Array) -> jax.Array:
    """table_VD[ids_BL] on a mesh, split as the batch: rows are sent, and the table stays.

    Each device takes what it has of the rows that all devices with other columns want. Zeros for an
    id that the table has not.
    """
    of_rows, of_columns = (
        (axes,) if isinstance(axes, str) else axes or ()
        for axes in jax.typeof(table_VD).sharding.spec
    )

    def body(table_vd, ids_BL):
        if of_columns:
            ids_BL = jax.lax.all_gather(ids_BL, of_columns, tiled=True)
        ids_BL -= jax.lax.axis_index(of_rows) * table_vd.shape[0]
        get = table_vd.at[ids_BL].get
        rows_BLd = get(mode="fill", fill_value=0, wrap_negative_indices=False)
        if of_columns:
            rows_BLd = jax.lax.all_to_all(rows_BLd, of_columns, 0, 2, tiled=True)
        return jax.lax.psum(rows_BLd, of_rows)

    batch = sharding.spec("batch")
    specs = PartitionSpec(of_rows, of_columns), batch
    return jax.shard_map(body, in_specs=specs, out_specs=batch)(table_VD, ids_BL)


def logits_of_transposed(x_BLD: jax.Array, head_VD: jax.Array) -> jax.Array:
    """float32 logits_BLV for inference on CPU, where the head's columns are given as rows.

    XLA:CPU's product of a large matrix and few columns reads it up to twice as fast as that of few
    rows and a large matrix.
    """
    logits_VBL = jnp.einsum("VD,BLD->VBL", head_VD, x_BLD, preferred_element_type=jnp.float32)
    return logits_VBL.transpose(1, 2, 0)


def rotary_angles(positions_BL: jax.Array, head_size: int, theta: float) -> jax.Array:
    """angles_BLh = position * theta^(-2i / H) for i < h = H / 2, in float32."""
    exponents_h = jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size
    return positions_BL[:, :, None].astype(jnp.float32) * (theta**-exponents_h)[None, None, :]


def rotate(x_BLNH: jax.Array, angles_BLh: jax.Array) -> jax.Array:
    """Rotary embedding in the half-rotation convention: dimension i turns with i + H / 2.

    The convention of Hugging Face's Mixtral weights; Mistral's own files interleave the pairs.
    Any number of head dimensions may stand between L and H.
    """
    heads = tuple(range(2, x_BLNH.ndim - 1))
    cos = jnp.expand_dims(jnp.cos(angles_BLh), heads)
    sin = jnp.expand_dims(jnp.sin(angles_BLh), heads)
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLNH.dtype)
