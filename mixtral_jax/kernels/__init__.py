"""Arrays in, arrays out: no modules, no config. Each kernel picks its platform's best body.

experts           SwiGLU of rows sorted by expert; on CPU by swiglu_blocks
grouped_matmul    its products: megablox (TPU), hopper (H100), blocks (CPU, other GPUs), ragged_dot
differentiable    the gradients of megablox and hopper
attention         of whole sequences: splash (TPU), cudnn (GPU), chunks (CPU), xla
cached_attention  to a cache of keys and values, which it writes too
exchange          rows to the devices of their experts, and back: local, padded, ragged
gather, rows      what is split over a mesh axis made whole; rows moved within a device
few_*             decoding on GPU, by Triton: rows (times matrices, and what all share), queries
                  (one, to a cache), heads (from products to attention), norms (add, normalise,
                  route), tokens (the experts)
int8, apart, bits inference: matrices in int8; on CPU each expert's apart, and bfloat16 as bits
"""

import math
import re

import jax
import jax.numpy as jnp

NARROW = (jnp.bfloat16, jnp.float16)
"""What the matrix units of GPUs multiply at full speed."""
MASKED = -1e30
"""The score of a key that a query may not see: finite, so that all else is where it sees none."""


def dot(a: jax.Array, b: jax.Array, b_axis: int = 0) -> jax.Array:
    """The product of two matrices over the last axis of a and one of b, in float32."""
    axes = (((1,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def ceil(size: int, part: int) -> int:
    """Parts that hold it all."""
    return -(-size // part)


def block_of(size: int, most: int) -> int:
    """The largest of most, most / 2, ... that divides a size."""
    while size % most:
        most //= 2
    return most


def platform() -> str:
    """'cpu', 'gpu' or 'tpu': that of the mesh in use, else of the default backend.

    The mesh decides so that a program compiled ahead of time for a TPU gets the TPU's kernels on a
    host that has none.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device is not None else jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def device_kind() -> str:
    """What JAX calls the chips of the mesh in use, such as 'TPU v6 lite'."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def compute_capability() -> float:
    """That of the NVIDIA GPU at hand, such as 8.9; infinity for a device that is only described and
    for those of others."""
    device = jax.devices()[0]
    known = device.device_kind == device_kind() and getattr(device, "compute_capability", "")
    return float(known) if known and re.fullmatch(r"\d+\.\d+", known) else math.inf


def interpret() -> bool:
    """Whether Pallas's kernels run as plain JAX: in tests, on CPU."""
    return False


def check_body(
    key: str, name: str, here: str, platforms: dict[str, tuple[str, ...]], instead: str
) -> None:
    """Refuse a kernel's body that does not exist, or not on this platform.

    Args:
      key: the config's, under model; here: the platform; platforms: where each body runs; instead:
        the one to use.
    Raises:
      ValueError: in one line that begins with the key.
    """
    if name not in platforms:
        raise ValueError(f"{key}={name!r} is not one of {tuple(platforms)}")
    if here not in platforms[name]:
        raise ValueError(
            f"{key}={name} does not run on {here} (only on {' and '.join(platforms[name])}): "
            f"use {instead}, or leave it empty"
        )


def vary_like(x: jax.Array, *others: jax.Array) -> jax.Array:
    """x, marked inside shard_map as differing over every mesh axis that the others differ over.

    Its transpose sums the gradient over the axes that were added: what an operand shared by several
    devices needs before it meets a custom_vjp, which must return gradients typed like its operands.
    """
    wanted = frozenset().union(*(_varying(other) for other in others))
    missing = tuple(wanted - _varying(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def sum_like(g: jax.Array, x: jax.Array) -> jax.Array:
    """The gradient of what vary_like made of x, summed over the axes that it added."""
    added = tuple(_varying(g) - _varying(x))
    return jax.lax.psum(g, added) if added else g


def _varying(x: jax.Array) -> frozenset[str]:
    """The manual mesh axes that x differs over, by its type."""
    return jax.typeof(x).manual_axis_type.varying
