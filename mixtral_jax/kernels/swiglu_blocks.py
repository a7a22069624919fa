"""The experts' SwiGLU for CPU: all three products of a block of rows while it lies in cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax.kernels import dot, sum_like, vary_like
from mixtral_jax.kernels.bits import bits, floats
from mixtral_jax.kernels.blocks import dot_rounded, for_each_block


@jax.custom_vjp
def swiglu_blocks(
    x_RD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    group_sizes_E: jax.Array,
) -> jax.Array:
    """What `experts` does. For the backward pass it keeps the gate and up products.

    The matrices are kept as they were given, not as they vary over the mesh here: a loop over
    layers has them already, and would copy anything else.
    """
    return _forward(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E)[0]


def _forward(*operands):
    x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E = _varying(*operands)
    rows, hidden, dtype = x_RD.shape[0], gate_EDF.shape[2], x_RD.dtype

    def body(block, carry):
        x_bD = block.take(x_RD)
        gate_bF = dot_rounded(x_bD, block.matrix(gate_EDF), 1, 0, jnp.float32)
        up_bF = dot_rounded(x_bD, block.matrix(up_EDF), 1, 0, jnp.float32)
        hidden_bF = (jax.nn.silu(gate_bF) * up_bF).astype(dtype)
        made = (gate_bF, up_bF, dot_rounded(hidden_bF, block.matrix(down_EFD), 1, 0))
        return tuple(block.put(a, bits(b.astype(dtype))) for a, b in zip(carry, made, strict=True))

    empty_RF = vary_like(bits(jnp.zeros((rows, hidden), dtype)), x_RD)
    init = (empty_RF, empty_RF, bits(jnp.zeros_like(x_RD)))
    gate_RF, up_RF, out_RD = for_each_block(group_sizes_E, rows, body, init)
    gate_RF = checkpoint_name(gate_RF, "expert_gate")
    up_RF = checkpoint_name(up_RF, "expert_up")
    return floats(out_RD, dtype), (operands, gate_RF, up_RF)


def _backward(residuals, g_RD):
    operands, gate_RF, up_RF = residuals
    x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E = _varying(*operands)
    dtype = x_RD.dtype
    # XLA:CPU is slower with a left operand that lies transposed.
    x_DR, g_DR = bits(x_RD).T, bits(g_RD).T

    def body(block, carry):
        dx_RD, d_gate_EDF, d_up_EDF, d_down_EDF = carry
        g_bD = block.take(g_RD)
        x_Db, g_Db = (floats(block.columns(a), dtype) for a in (x_DR, g_DR))
        gate_bF, up_bF = (
            floats(block.take(a), dtype).astype(jnp.float32) for a in (gate_RF, up_RF)
        )
        d_hidden_bF = dot_rounded(g_bD, block.matrix(down_EFD), 1, 1, jnp.float32)
        sigmoid_bF = jax.nn.sigmoid(gate_bF)
        silu_bF = gate_bF * sigmoid_bF
        d_up_bF = (d_hidden_bF * silu_bF).astype(dtype)
        hidden_bF = (silu_bF * up_bF).astype(dtype)
        d_gate_bF = d_hidden_bF * up_bF * (sigmoid_bF + silu_bF * (1 - sigmoid_bF))
        d_gate_bF = d_gate_bF.astype(dtype)
        dx_bD = dot_rounded(d_gate_bF, block.matrix(gate_EDF), 1, 1, jnp.float32)
        dx_bD += dot_rounded(d_up_bF, block.matrix(up_EDF), 1, 1, jnp.float32)
        return (
            block.put(dx_RD, bits(dx_bD.astype(dtype))),
            block.add(d_gate_EDF, dot(x_Db, d_gate_bF)),
            block.add(d_up_EDF, dot(x_Db, d_up_bF)),
            block.add(d_down_EDF, dot(g_Db, hidden_bF)),
        )

    dx_RD = bits(jnp.zeros_like(x_RD))
    sums = [vary_like(jnp.zeros(gate_EDF.shape, jnp.float32), x_RD)] * 3
    dx_RD, *sums = for_each_block(group_sizes_E, x_RD.shape[0], body, (dx_RD, *sums))
    # That of down was summed transposed. XLA:CPU would turn it back while it writes it among those
    # of the other layers, on one core.
    grads = (floats(dx_RD, dtype), *sums[:2], jax.lax.map(jnp.transpose, sums[2]))
    return *(sum_like(g, a).astype(a.dtype) for g, a in zip(grads, operands)), None


def _varying(x_RD, gate_EDF, up_EDF, down_EFD, group_sizes_E):
    """The operands as they are on this device, all varying over the same mesh axes."""
    arrays = (x_RD, gate_EDF, up_EDF, down_EFD)
    return (*(vary_like(a, *arrays, group_sizes_E) for a in arrays), group_sizes_E)


swiglu_blocks.defvjp(_forward, _backward)
