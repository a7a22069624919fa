"""The small layers: parameters, RMSNorm and rotary position embedding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax import sharding


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
        normed = (wide * scale).astype(x_BLD.dtype)
        return normed * self.weight[...].astype(x_BLD.dtype)[None, None, :]


@jax.custom_vjp
def logits_of(x_BLD: jax.Array, head_DV: jax.Array) -> jax.Array:
    """float32 logits_BLV, x times head, on the mesh that is set.

    Its gradients are products that take the logits' gradient as it lies; the one that JAX makes for
    the head has XLA:CPU transpose it first.
    """
    return jnp.einsum("BLD,DV->BLV", x_BLD, head_DV, preferred_element_type=jnp.float32)


def _logits_forward(x_BLD, head_DV):
    return logits_of(x_BLD, head_DV), (x_BLD, head_DV)


def _logits_backward(residuals, g_BLV):
    x_BLD, head_DV = residuals

    def product(a, b, contracted, like):
        out_sharding = jax.typeof(like).sharding
        out = jax.lax.dot_general(
            a,
            b,
            (contracted, ((), ())),
            preferred_element_type=jnp.float32,
            out_sharding=out_sharding,
        )
        return out.astype(like.dtype)

    g_BLV = g_BLV.astype(x_BLD.dtype)  # as TPUs do with float32 when they multiply it
    dx_BLD = product(g_BLV, head_DV, ((2,), (1,)), x_BLD)
    return dx_BLD, product(x_BLD, g_BLV, ((0, 1), (0, 1)), head_DV)


logits_of.defvjp(_logits_forward, _logits_backward)


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
