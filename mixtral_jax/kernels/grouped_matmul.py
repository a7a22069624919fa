"""Rows sorted by expert, times that expert's matrix.

Two bodies with one meaning:
  ragged_dot  jax.lax.ragged_dot: TPU and GPU kernels; on CPU it runs every expert on every row.
  blocks      a loop over each expert's rows in blocks: work in proportion to the rows in use.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax.kernels import platform, vary_like
from mixtral_jax.kernels.blocks import blocks

IMPLEMENTATIONS = ("ragged_dot", "blocks")


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """out[r] = x[r] @ w[expert of r], where the first group_sizes[0] rows belong to expert 0 etc.

    Rows past sum(group_sizes) come out as zeros and receive zero gradient. Differentiable in x
    and w.

    Args:
      x_RD: rows, sorted by expert.
      w_EDF: one matrix per expert.
      group_sizes_E: int32 rows of each expert; zero is fine, and so is all of them.
      implementation: one of IMPLEMENTATIONS; None is the platform's best.
    Returns:
      out_RF in the type of x.
    """
    if implementation is None:
        implementation = "blocks" if platform() == "cpu" else "ragged_dot"
    x_RD, w_EDF = vary_like(x_RD, w_EDF), vary_like(w_EDF, x_RD)
    if implementation == "blocks":
        return blocks(x_RD, w_EDF, group_sizes_E)
    if implementation == "ragged_dot":
        out_RF = lax.ragged_dot(x_RD, w_EDF, group_sizes_E, preferred_element_type=x_RD.dtype)
        in_use_R = jnp.arange(x_RD.shape[0]) < group_sizes_E.sum()
        return jnp.where(in_use_R[:, None], out_RF, 0)
    raise ValueError(f"implementation={implementation!r} is not one of {IMPLEMENTATIONS}")
