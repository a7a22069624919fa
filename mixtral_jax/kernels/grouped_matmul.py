"""Rows sorted by expert, times that expert's matrix.

Bodies with one meaning:
  megablox    JAX's Pallas kernels for TPU, whose work is in proportion to the rows in use, that of
              the matrices' gradient included (of ragged_dot's the compiler makes every expert over
              every row).
  hopper      our Pallas kernels for H100 and H200, in proportion to the rows in use too.
  ragged_dot  jax.lax.ragged_dot: a kernel on TPU. On GPU and CPU, XLA multiplies every row with
              every expert.
  blocks      a loop over each expert's rows in blocks, for CPU, and for GPUs and matrices that
              hopper does not take.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import NARROW, check_body, device_kind, megablox, platform, vary_like
from mixtral_jax.kernels.blocks import blocks

PLATFORMS = {
    "megablox": ("tpu",),
    "ragged_dot": ("cpu", "gpu", "tpu"),
    "hopper": ("gpu",),
    "blocks": ("cpu", "gpu", "tpu"),
}
PALLAS = ("megablox", "hopper")
"""Kernels that do not say what they vary over: inside shard_map, its types must not be checked."""

TILE = 128
"""What megablox and hopper want rows, and both sides of the matrices, to be a multiple of."""
HOPPER = re.compile(r"\bG?H(100|200|800|20)\b")
"""What the names of such GPUs hold."""


def resolve(implementation: str | None, width: int, hidden: int, dtype: jnp.dtype) -> str:
    """The body for matrices [width, hidden] of this type: that asked for, or the best.

    Raises:
      ValueError: if the one asked for cannot run on this platform, or on these matrices.
    """
    here, aligned = platform(), megablox.fits(width, hidden)
    if not implementation:
        if here == "tpu":
            return "megablox" if aligned else "ragged_dot"
        return "hopper" if here == "gpu" and _fits_hopper(width, hidden, dtype) else "blocks"
    check_body("grouped_matmul", implementation, here, PLATFORMS, instead="ragged_dot")
    if implementation == "megablox" and not aligned:
        raise ValueError(
            f"grouped_matmul=megablox wants multiples of {megablox.LANES}, not {width} into "
            f"{hidden}: use ragged_dot, or leave it empty"
        )
    if implementation == "hopper" and not _fits_hopper(width, hidden, dtype):
        raise ValueError(
            "grouped_matmul=hopper wants an H100 or H200, multiples of 128 and a compute_dtype of "
            f"bfloat16, not {device_kind()}, {width} into {hidden} and {jnp.dtype(dtype)}: "
            "use ragged_dot, or leave it empty"
        )
    return implementation


def _fits_hopper(width: int, hidden: int, dtype: jnp.dtype) -> bool:
    narrow = jnp.dtype(dtype) in NARROW
    aligned = width % TILE == hidden % TILE == 0
    return narrow and aligned and HOPPER.search(device_kind()) is not None


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    transposed: bool = False,
    zeros: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """out[r] = x[r] @ w[expert of r], where the first group_sizes[0] rows belong to expert 0 etc.

    Rows past sum(group_sizes) are not read, come out as zeros and receive zero gradient.
    Differentiable in x and w.

    Args:
      x_RD: rows, sorted by expert.
      w_EDF: one matrix per expert.
      group_sizes_E: int32 rows of each expert; zero is fine, and so is all of them.
      transposed: the matrices are given as [E, F, D], which is how a TPU wants those whose F is
        split over devices: neither they nor their gradient are copied into another layout.
      zeros: false if rows past the last group may come out as anything: megablox and hopper save a
        pass.
      implementation: one of PLATFORMS; None is the platform's best.
    Returns:
      out_RF in the type of x.
    """
    implementation = resolve(implementation, *w_EDF.shape[1:], x_RD.dtype)
    if implementation in ("megablox", "hopper"):
        kernels = megablox if implementation == "megablox" else _import_hopper()
        operands = _pad(x_RD, TILE), w_EDF, group_sizes_E
        return kernels.grouped_matmul(*operands, transposed, zeros)[: x_RD.shape[0]]
    if transposed:
        w_EDF = w_EDF.swapaxes(1, 2)
    x_RD, w_EDF = vary_like(x_RD, w_EDF), vary_like(w_EDF, x_RD)
    if implementation == "blocks":
        return blocks(x_RD, w_EDF, group_sizes_E)
    in_use_R1 = jnp.arange(x_RD.shape[0])[:, None] < group_sizes_E.sum()
    x_RD = jnp.where(in_use_R1, x_RD, 0)  # these may read the others and multiply by zero
    out_RF = lax.ragged_dot(x_RD, w_EDF, group_sizes_E, preferred_element_type=x_RD.dtype)
    return jnp.where(in_use_R1, out_RF, 0)


def _pad(x_RD, step: int):
    """x with rows of zeros behind it, so that they are a multiple of `step`."""
    return jnp.pad(x_RD, ((0, -x_RD.shape[0] % step), (0, 0)))


def _import_hopper():
    """Where they are wanted: what they are made of is there for Linux alone, and takes 0.15 s."""
    from mixtral_jax.kernels import hopper

    return hopper
