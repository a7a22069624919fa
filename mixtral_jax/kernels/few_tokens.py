"""The sparse experts of a few tokens, as in decoding, for GPU: two kernels of the kind of few_rows.

Nothing is sorted: each expert in use runs on all tokens at once (a tensor core multiplies no fewer
than 16 rows), and the weight of a token that did not choose it is zero.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mixtral_jax.kernels import block_of, dot, few_rows
from mixtral_jax.kernels.few_rows import Tiles, call, padded, parts_of, triton, whole

INTO, OUT_OF = Tiles(32, 256, programs=100, warps=8), Tiles(64, 128, programs=512)
"""Of gate and up, and of down: programs are those of all slots. For gate and up blocks become
narrower, but not below NARROW, until there are as many."""
NARROW = 64
FEWER_STAGES = 3
"""Of gate and up, for more than LEAST tokens: four need more than the 99 KiB of shared memory that
many GPUs have."""


def fits(tokens: int, experts: int, width: int, hidden: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels run here, on so many tokens and matrices [experts, width, hidden]."""
    numbered = experts * width * hidden < 2**31  # JAX counts places of more in int64, untried here
    return numbered and few_rows.fits(tokens, dtype, width, hidden)


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
    parts_PTD = parts(x_TD, gate_EDF, up_EDF, down_EFD, ids_TC, weights_TC)
    return parts_PTD.sum(axis=0).astype(x_TD.dtype)


def parts(x_TD, gate_EDF, up_EDF, down_EFD, ids_TC, weights_TC) -> jax.Array:
    """float32 parts_PTD, whose sum over P is what `experts` gives: to be added up by what takes it.

    Without a gradient.
    """
    hidden_STF = _hidden(x_TD, gate_EDF, up_EDF, ids_TC, INTO)
    return _out(hidden_STF, down_EFD, ids_TC, weights_TC, OUT_OF)


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


def _in_slot(ids_ref, real_T, slot, experts: int, per_token: int):
    """(expert, whether there is one): slot s is for the s-th of the experts that are in use."""
    numbers_1E = lax.broadcasted_iota(jnp.int32, (1, pl.next_power_of_2(experts)), 1)
    chosen_TE = jnp.zeros((real_T.shape[0], numbers_1E.shape[1]), jnp.int32)
    for choice in range(per_token):
        ids_T = triton.load(ids_ref.at[:, jnp.int32(choice)], mask=real_T, other=experts)
        chosen_TE += ((ids_T[:, None] == numbers_1E) & (numbers_1E < experts)).astype(jnp.int32)
    used_E = jnp.minimum(chosen_TE.max(axis=0), 1)
    here_E = (used_E > 0) & (jnp.cumsum(used_E) == slot + 1)
    expert = jnp.where(here_E, numbers_1E[0], 0).sum()
    return expert, slot < used_E.sum()


def _hidden(x_TD, gate_EDF, up_EDF, ids_TC, tiles: Tiles):
    """hidden_STF = silu(x gate) * (x up) of all tokens with the expert of each slot.

    Of slots without one, zeros.
    """
    (tokens, width), (experts, _, hidden) = x_TD.shape, gate_EDF.shape
    rows, per_token = padded(tokens), ids_TC.shape[1]
    if rows > few_rows.LEAST:
        tiles = tiles._replace(stages=min(tiles.stages, FEWER_STAGES))
    slots = min(experts, ids_TC.size)
    depth, columns = block_of(width, tiles.depth), block_of(hidden, tiles.columns)
    while columns > NARROW and hidden // columns * slots < tiles.programs:
        columns //= 2

    def kernel(ids_ref, x_ref, gate_ref, up_ref, hidden_ref):
        real_T = jnp.arange(rows) < tokens
        expert, found = _in_slot(ids_ref, real_T, pl.program_id(1), experts, per_token)
        here = pl.ds(pl.program_id(0) * columns, columns)

        def one_block(i, sums):
            some = pl.ds(i * depth, depth)
            x_Td = triton.load(x_ref.at[:, some], mask=real_T[:, None], other=0)
            matrices = (triton.load(w.at[expert, some, here]) for w in (gate_ref, up_ref))
            return tuple(sum_Tf + dot(x_Td, w_df) for sum_Tf, w_df in zip(sums, matrices))

        zeros_Tf = jnp.zeros((rows, columns), jnp.float32)
        blocks = found.astype(jnp.int32) * (width // depth)
        gate_Tf, up_Tf = lax.fori_loop(0, blocks, one_block, (zeros_Tf, zeros_Tf))
        hidden_Tf = gate_Tf * jax.nn.sigmoid(gate_Tf) * up_Tf
        triton.store(hidden_ref, hidden_Tf.astype(hidden_ref.dtype), mask=real_T[:, None])

    return call(
        kernel,
        "experts_hidden",
        tiles,
        (hidden // columns, slots),
        [whole(rows, per_token), whole(rows, width), whole(*gate_EDF.shape), whole(*up_EDF.shape)],
        pl.BlockSpec((None, rows, columns), lambda f, s: (s, 0, f)),
        jax.ShapeDtypeStruct((slots, tokens, hidden), x_TD.dtype),
    )(ids_TC, x_TD, gate_EDF, up_EDF)


def _out(hidden_STF, down_EFD, ids_TC, weights_TC, tiles: Tiles):
    """float32 out_PTD, whose sum over P, slots and parts of F, is the result."""
    (slots, tokens, hidden), (experts, _, width) = hidden_STF.shape, down_EFD.shape
    rows, per_token = padded(tokens), ids_TC.shape[1]
    depth, columns = block_of(hidden, tiles.depth), block_of(width, tiles.columns)
    blocks = hidden // depth
    parts, per_part = parts_of(blocks, tiles.programs // (width // columns * slots))

    def kernel(ids_ref, weights_ref, hidden_ref, down_ref, out_ref):
        real_T = jnp.arange(rows) < tokens
        slot, part = pl.program_id(2), pl.program_id(1)
        expert, found = _in_slot(ids_ref, real_T, slot, experts, per_token)
        here = pl.ds(pl.program_id(0) * columns, columns)
        weight_T = jnp.zeros((rows,), jnp.float32)
        for choice in range(per_token):
            of_choice = (slice(None), jnp.int32(choice))
            ids_T = triton.load(ids_ref.at[of_choice], mask=real_T, other=experts)
            of_choice_T = triton.load(weights_ref.at[of_choice], mask=real_T, other=0)
            weight_T += jnp.where(ids_T == expert, of_choice_T, 0)

        def one_block(i, sum_Td):
            some = pl.ds((part * per_part + i) * depth, depth)
            hidden_Tf = triton.load(hidden_ref.at[:, some], mask=real_T[:, None], other=0)
            return sum_Td + dot(hidden_Tf, triton.load(down_ref.at[expert, some, here]))

        mine = found.astype(jnp.int32) * jnp.minimum(blocks - part * per_part, per_part)
        zeros_Td = jnp.zeros((rows, columns), jnp.float32)
        sum_Td = lax.fori_loop(0, mine, one_block, zeros_Td)
        chose_T1 = (weight_T != 0)[:, None]  # of others the hidden rows may have overflowed
        out_Td = jnp.where(chose_T1, sum_Td * weight_T[:, None], 0)
        triton.store(out_ref, out_Td, mask=real_T[:, None])

    return call(
        kernel,
        "experts_out",
        tiles,
        (width // columns, parts, slots),
        [
            whole(rows, per_token),
            whole(rows, per_token),
            pl.BlockSpec((None, rows, hidden), lambda d, p, s: (s, 0, 0)),
            whole(*down_EFD.shape),
        ],
        pl.BlockSpec((None, rows, columns), lambda d, p, s: (s * parts + p, 0, d)),
        jax.ShapeDtypeStruct((slots * parts, tokens, width), jnp.float32),
    )(ids_TC, weights_TC, hidden_STF, down_EFD)
