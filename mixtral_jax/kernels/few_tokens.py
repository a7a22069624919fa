"""The sparse experts of a few tokens, as in decoding, for GPU: two Pallas kernels by way of Triton.

The time is that of reading the matrices of the experts in use. Nothing is sorted: each such expert
runs on all tokens at once (a tensor core multiplies no fewer than 16 rows), and the weight of a
token that did not choose it is zero. Programs read apart blocks of a matrix, several on every core,
each with its next loads under way (num_stages).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mixtral_jax.kernels import platform

MOST = 32
"""Tokens at most."""
LEAST_ROWS = 16
"""Of a product on tensor cores."""
ALIGNED = 64
"""The matrices' dimensions are multiples of it."""


class Tiles(NamedTuple):
    """How a kernel reads a matrix."""

    depth: int
    """Rows of the matrix, which are summed over, in a block."""
    columns: int
    """Columns in a block."""
    parts: int = 1
    """Programs that share the rows at most, each with a sum of its own."""
    warps: int = 4
    stages: int = 4
    """Blocks under way in a program."""


INTO, OUT_OF = Tiles(64, 128), Tiles(64, 128, parts=8)


def fits(tokens: int, experts: int, width: int, hidden: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels run here, on so many tokens and matrices [experts, width, hidden]."""
    narrow = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    numbered = experts * width * hidden < 2**31  # places in an array are int32
    aligned = width % ALIGNED == hidden % ALIGNED == 0
    return platform() == "gpu" and tokens <= MOST and narrow and numbered and aligned


@jax.custom_vjp
def experts(
    x_TD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    ids_TC: jax.Array,
    weights_TC: jax.Array,
) -> jax.Array:
    """out[t] = sum over c of weights[t, c] * down(silu(gate x[t]) * (up x[t])) by expert ids[t, c].

    Matrices of experts that no token chose are not read. Arrays of one device; inside shard_map,
    whose types must not be checked. Its gradient is that of plain JAX, each expert on each token.

    Args:
      ids_TC: int32, different for a token; E for none.
      weights_TC: float32.
    Returns:
      out_TD in the type of x, rounded once.
    """
    hidden_STF = _hidden(x_TD, gate_EDF, up_EDF, ids_TC, INTO)
    return _out(hidden_STF, down_EFD, ids_TC, weights_TC, OUT_OF).sum(axis=0).astype(x_TD.dtype)


def _plain(ids_TC, x_TD, gate_EDF, up_EDF, down_EFD, weights_TC):
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    chosen_TCE = ids_TC[:, :, None] == jnp.arange(gate_EDF.shape[0])[None, None]
    weights_TE = (chosen_TCE * weights_TC[:, :, None]).sum(axis=1)
    gate_ETF, up_ETF = (product("TD,EDF->ETF", x_TD, w) for w in (gate_EDF, up_EDF))
    hidden_ETF = (jax.nn.silu(gate_ETF) * up_ETF).astype(x_TD.dtype)
    out_ETD = product("ETF,EFD->ETD", hidden_ETF, down_EFD)
    return jnp.einsum("TE,ETD->TD", weights_TE, out_ETD).astype(x_TD.dtype)


def _forward(x_TD, gate_EDF, up_EDF, down_EFD, ids_TC, weights_TC):
    operands = (x_TD, gate_EDF, up_EDF, down_EFD, weights_TC)
    return jax.vjp(partial(_plain, ids_TC), *operands)


def _backward(pull, g_TD):
    *grads, d_weights_TC = pull(g_TD)
    return *grads, None, d_weights_TC


experts.defvjp(_forward, _backward)


# ---- the kernels -------------------------------------------------------------------------------


def _interpret() -> bool:
    """Whether to run as plain JAX: in tests, on CPU."""
    return False


def _block(size: int, most: int) -> int:
    """The largest of most, most / 2, ... that divides a size."""
    while size % most:
        most //= 2
    return most


def _rows(tokens: int) -> int:
    """Rows of a block with all tokens."""
    return max(LEAST_ROWS, pl.next_power_of_2(tokens))


def _call(kernel, grid, in_specs, out_spec, shape, dtype, tiles: Tiles, name: str):
    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_spec,
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=_interpret(),
        name=name,
    )


def _all(*shape: int) -> pl.BlockSpec:
    """A whole array, or more than it: what lies beyond it must be masked."""
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _slots(ids_TC, experts: int) -> int:
    """The most experts that can be in use. Slot s is for the s-th of those that are."""
    return min(experts, ids_TC.size)


def _in_slot(ids_ref, real_T, slot, experts: int, per_token: int):
    """(expert, whether there is one) of a slot."""
    numbers_1E = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(experts)), 1)
    chosen_TE = jnp.zeros((real_T.shape[0], numbers_1E.shape[1]), jnp.int32)
    for choice in range(per_token):
        ids_T = triton.load(ids_ref.at[:, jnp.int32(choice)], mask=real_T, other=experts)
        chosen_TE += ((ids_T[:, None] == numbers_1E) & (numbers_1E < experts)).astype(jnp.int32)
    used_E = jnp.minimum(chosen_TE.max(axis=0), 1)
    here_E = (used_E > 0) & (jnp.cumsum(used_E) == slot + 1)
    expert = jnp.where(here_E, numbers_1E[0], 0).sum()
    return expert, slot < used_E.sum()


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _hidden(x_TD, gate_EDF, up_EDF, ids_TC, tiles: Tiles):
    """hidden_STF = silu(x gate) * (x up) of all tokens with the expert of each slot.

    Of slots without one, zeros.
    """
    (tokens, width), (experts, _, hidden) = x_TD.shape, gate_EDF.shape
    rows, slots, per_token = _rows(tokens), _slots(ids_TC, experts), ids_TC.shape[1]
    depth, columns = _block(width, tiles.depth), _block(hidden, tiles.columns)

    def kernel(ids_ref, x_ref, gate_ref, up_ref, hidden_ref):
        real_T = jnp.arange(rows) < tokens
        expert, found = _in_slot(ids_ref, real_T, pl.program_id(1), experts, per_token)
        here = pl.ds(pl.program_id(0) * columns, columns)

        def one_block(i, sums):
            some = pl.ds(i * depth, depth)
            x_Td = triton.load(x_ref.at[:, some], mask=real_T[:, None], other=0)
            matrices = (triton.load(w.at[expert, some, here]) for w in (gate_ref, up_ref))
            return tuple(sum_Tf + _dot(x_Td, w_df) for sum_Tf, w_df in zip(sums, matrices))

        zeros_Tf = jnp.zeros((rows, columns), jnp.float32)
        blocks = found.astype(jnp.int32) * (width // depth)
        gate_Tf, up_Tf = lax.fori_loop(0, blocks, one_block, (zeros_Tf, zeros_Tf))
        hidden_Tf = gate_Tf * jax.nn.sigmoid(gate_Tf) * up_Tf
        triton.store(hidden_ref, hidden_Tf.astype(hidden_ref.dtype), mask=real_T[:, None])

    return _call(
        kernel,
        (hidden // columns, slots),
        [_all(rows, per_token), _all(rows, width), _all(*gate_EDF.shape), _all(*up_EDF.shape)],
        pl.BlockSpec((None, rows, columns), lambda f, s: (s, 0, f)),
        (slots, tokens, hidden),
        x_TD.dtype,
        tiles,
        "experts_hidden",
    )(ids_TC, x_TD, gate_EDF, up_EDF)


def _out(hidden_STF, down_EFD, ids_TC, weights_TC, tiles: Tiles):
    """float32 out_PTD, whose sum over P, slots and parts of F, is the result."""
    (slots, tokens, hidden), (experts, _, width) = hidden_STF.shape, down_EFD.shape
    rows, per_token = _rows(tokens), ids_TC.shape[1]
    depth, columns = _block(hidden, tiles.depth), _block(width, tiles.columns)
    blocks = hidden // depth
    per_part = -(-blocks // tiles.parts)
    parts = -(-blocks // per_part)

    def kernel(ids_ref, weights_ref, hidden_ref, down_ref, out_ref):
        real_T = jnp.arange(rows) < tokens
        slot, part = pl.program_id(2), pl.program_id(1)
        expert, found = _in_slot(ids_ref, real_T, slot, experts, per_token)
        here = pl.ds(pl.program_id(0) * columns, columns)
        weight_T = jnp.zeros((rows,), jnp.float32)
        for choice in range(per_token):
            ids_T = triton.load(ids_ref.at[:, jnp.int32(choice)], mask=real_T, other=experts)
            of_choice_T = triton.load(weights_ref.at[:, jnp.int32(choice)], mask=real_T, other=0)
            weight_T += jnp.where(ids_T == expert, of_choice_T, 0)

        def one_block(i, sum_Td):
            some = pl.ds((part * per_part + i) * depth, depth)
            hidden_Tf = triton.load(hidden_ref.at[:, some], mask=real_T[:, None], other=0)
            return sum_Td + _dot(hidden_Tf, triton.load(down_ref.at[expert, some, here]))

        mine = found.astype(jnp.int32) * jnp.minimum(blocks - part * per_part, per_part)
        zeros_Td = jnp.zeros((rows, columns), jnp.float32)
        sum_Td = lax.fori_loop(0, mine, one_block, zeros_Td)
        triton.store(out_ref, sum_Td * weight_T[:, None], mask=real_T[:, None])

    return _call(
        kernel,
        (width // columns, parts, slots),
        [
            _all(rows, per_token),
            _all(rows, per_token),
            pl.BlockSpec((None, rows, hidden), lambda d, p, s: (s, 0, 0)),
            _all(*down_EFD.shape),
        ],
        pl.BlockSpec((None, rows, columns), lambda d, p, s: (s * parts + p, 0, d)),
        (slots * parts, tokens, width),
        jnp.float32,
        tiles,
        "experts_out",
    )(ids_TC, weights_TC, hidden_STF, down_EFD)
