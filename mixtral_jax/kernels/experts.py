"""SwiGLU of rows sorted by expert, each row by its own expert's matrices."""

from __future__ import annotations

from functools import partial

import jax
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax.kernels.grouped_matmul import grouped_matmul, resolve
from mixtral_jax.kernels.swiglu_blocks import swiglu_blocks


def experts(
    x_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str | None = None,
    gathered: bool = True,
) -> jax.Array:
    """out[r] = down(silu(gate x[r]) * (up x[r])) with the matrices of row r's expert.

    Arguments as for grouped_matmul, but rows past sum(group_sizes) come out as anything: whoever
    takes rows from here knows which are in use. What the backward pass may keep is named
    `expert_gate` and `expert_up`. The matrices may be of another type for `blocks`, which converts
    one at a time and gives gradients in that type.

    Args:
      gathered: whether the matrices have been gathered in their model dimension: XLA for TPU then
        has all in the layout [E, D, F], and would copy down and its gradient into another.

    Returns:
      out_RD in the type of x.
    """
    body = resolve(implementation, *gate_EDF.shape[1:], x_RD.dtype)
    if body == "blocks":
        return swiglu_blocks(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E)
    product = partial(
        grouped_matmul, group_sizes_E=group_sizes_E, implementation=implementation, zeros=False
    )
    gate_RF = checkpoint_name(product(x_RD, gate_EDF), "expert_gate")
    up_RF = checkpoint_name(product(x_RD, up_EDF), "expert_up")
    hidden_RF = jax.nn.silu(gate_RF) * up_RF
    if not (gathered and body == "megablox"):
        return product(hidden_RF, down_EFD)
    return product(hidden_RF, down_EFD.swapaxes(1, 2), transposed=True)
