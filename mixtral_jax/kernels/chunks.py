"""Causal attention for CPU, a chunk of queries at a time.

Scores above the diagonal are not computed, those of one chunk and kv head lie in cache, and none
are kept: the backward pass makes them again from the sum of their exponentials. Of a long sequence
the scores of a piece of a chunk exist at a time, so that memory grows with the length alone.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax.kernels import dot, vary_like
from mixtral_jax.kernels.blocks import dot_rounded

KEPT = "attention_chunks"
"""Name, for checkpoint policies, of what the backward pass wants: the output and the logsumexp."""
CHUNKS = 8
"""A sequence in so many chunks does 1 / 2 + 1 / (2 CHUNKS) of the work of all pairs."""
MOST = 256
"""Queries of a chunk whose scores exist at a time; of more, a loop takes as many."""
SHORTEST = 64
"""Shorter sequences' scores are too few to be worth a loop over heads."""


def fits(length: int) -> bool:
    """Whether sequences of this length divide into chunks that are worth the trouble."""
    return length % CHUNKS == 0 and length >= SHORTEST


def _chunks(length: int):
    """(first, last + 1) of the queries of each chunk; its keys end where they do."""
    size = length // CHUNKS
    return [(first, first + size) for first in range(0, length, size)]


def _in_pieces(one, sums, first: int, *queries):
    """`one` of a chunk, what is [l, ...] of it, with no more than MOST of its queries at a time.

    Args:
      one: of (sums, number of the first query, *queries) gives the sums with what it adds, and
        arrays of so many rows for each query.
      first: the number of the chunk's first query.
    """
    size = queries[0].shape[0]
    count = -(-size // MOST)
    if count == 1:
        return one(sums, first, *queries)
    length = -(-size // count)

    def pieces(a):  # padded with zeros, which add nothing to a gradient
        a = jnp.pad(a, [(0, count * length - size), *[(0, 0)] * (a.ndim - 1)])
        return a.reshape(count, length, *a.shape[1:])

    def body(sums, piece):  # the barrier: or JAX makes all masks, which are of no layer, in advance
        return one(sums, *lax.optimization_barrier(piece))

    xs = first + length * jnp.arange(count), *map(pieces, queries)
    sums, results = lax.scan(body, sums, xs)
    rows = [(a.shape[1] // length, a.reshape(-1, *a.shape[2:])) for a in results]
    return sums, [a[: size * each] for each, a in rows]


def _scores(q_lGH, k_SH, segments_l, segments_S, first):
    """scores_rS of the queries from first on, r = (query, group), and of the first keys."""
    length, groups, head = q_lGH.shape
    keys = k_SH.shape[0]
    scores_rS = dot(q_lGH.reshape(-1, head), k_SH, 1) * head**-0.5
    rows_l, keys_S = first + jnp.arange(length), jnp.arange(keys)
    allowed_lS = rows_l[:, None] >= keys_S[None]
    allowed_lS &= segments_l[:, None] == segments_S[None]
    scores_lGS = scores_rS.reshape(-1, groups, keys)
    return jnp.where(allowed_lS[:, None], scores_lGS, -jnp.inf).reshape(-1, keys)


def _forward_piece(keys, _, first, q_lGH, segments_l):
    """Of some queries: out_rH, and logsumexp_r1 of the scores."""
    k_SH, v_SH, segments_S = keys
    scores_rS = _scores(q_lGH, k_SH, segments_l, segments_S, first)
    most_r1 = scores_rS.max(axis=1, keepdims=True)
    weights_rS = jnp.exp(scores_rS - most_r1)
    sum_r1 = weights_rS.sum(axis=1, keepdims=True)
    out_rH = dot(weights_rS.astype(v_SH.dtype), v_SH) / sum_r1
    return None, (out_rH, most_r1 + jnp.log(sum_r1))


def _forward_one(operands):
    """Of one sequence and kv head: out_LGH, and logsumexp_LG of the scores."""
    q_LGH, k_LH, v_LH, segments_L = operands
    results = []
    for first, last in _chunks(q_LGH.shape[0]):
        piece = partial(_forward_piece, tuple(a[:last] for a in (k_LH, v_LH, segments_L)))
        queries = (a[first:last] for a in (q_LGH, segments_L))
        results.append(_in_pieces(piece, None, first, *queries)[1])
    out_RH, logsumexp_R1 = (jnp.concatenate(parts) for parts in zip(*results))
    out_LGH = out_RH.reshape(q_LGH.shape).astype(q_LGH.dtype)
    return out_LGH, logsumexp_R1.reshape(q_LGH.shape[:2])


def _backward_piece(keys, sums, first, q_lGH, segments_l, logsumexp_lG, dot_lG, g_lGH):
    """Of some queries: dq_rH; and the sums dk_LH and dv_LH with theirs."""
    (k_SH, v_SH, segments_S), (dk_LH, dv_LH) = keys, sums
    (last, head), dtype = k_SH.shape, q_lGH.dtype
    q_rH, g_rH = (a.reshape(-1, head) for a in (q_lGH, g_lGH))
    sum_r1, dot_r1 = (a.reshape(-1, 1) for a in (logsumexp_lG, dot_lG))
    weights_rS = jnp.exp(_scores(q_lGH, k_SH, segments_l, segments_S, first) - sum_r1)
    d_weights_rS = dot(g_rH, v_SH, 1)
    d_scores_rS = (weights_rS * (d_weights_rS - dot_r1) * head**-0.5).astype(dtype)
    dq_rH = dot(d_scores_rS, k_SH)
    dk_LH = dk_LH.at[:last].add(dot_rounded(d_scores_rS, q_rH, 0, 0, jnp.float32))
    dv_LH = dv_LH.at[:last].add(dot_rounded(weights_rS.astype(dtype), g_rH, 0, 0, jnp.float32))
    return (dk_LH, dv_LH), (dq_rH,)


def _backward_one(operands):
    """Gradients of q_LGH, k_LH and v_LH of one sequence and kv head."""
    q_LGH, k_LH, v_LH, segments_L, out_LGH, logsumexp_LG, g_LGH = operands
    dot_LG = (out_LGH.astype(jnp.float32) * g_LGH.astype(jnp.float32)).sum(axis=-1)
    dqs, sums = [], tuple(vary_like(jnp.zeros(a.shape), *operands) for a in (k_LH, v_LH))
    for first, last in _chunks(q_LGH.shape[0]):
        piece = partial(_backward_piece, tuple(a[:last] for a in (k_LH, v_LH, segments_L)))
        queries = (a[first:last] for a in (q_LGH, segments_L, logsumexp_LG, dot_LG, g_LGH))
        sums, (dq_rH,) = _in_pieces(piece, sums, first, *queries)
        dqs.append(dq_rH)
    dq_LGH = jnp.concatenate(dqs).reshape(q_LGH.shape)
    return tuple(a.astype(q_LGH.dtype) for a in (dq_LGH, *sums))


def _of_each_head(one, *operands):
    """`one` on the slices [b, k] of the operands, [B, K, ...]."""
    lead = operands[0].shape[:2]
    results = lax.map(one, tuple(a.reshape(-1, *a.shape[2:]) for a in operands))
    return tuple(a.reshape(*lead, *a.shape[1:]) for a in results)


def _heads_first(*arrays):
    return tuple(jnp.moveaxis(a, 2, 1) for a in arrays)


def _segments(segments_BL, k_BLKH):
    shape = (k_BLKH.shape[0], k_BLKH.shape[2], k_BLKH.shape[1])
    return jnp.broadcast_to(segments_BL[:, None], shape)


@jax.custom_vjp
def attention(
    q_BLKGH: jax.Array, k_BLKH: jax.Array, v_BLKH: jax.Array, segments_BL: jax.Array
) -> jax.Array:
    """What attention.self_attention does, with its arguments, for lengths that fit."""
    return _forward(q_BLKGH, k_BLKH, v_BLKH, segments_BL)[0]


def _forward(q_BLKGH, k_BLKH, v_BLKH, segments_BL):
    heads = (*_heads_first(q_BLKGH, k_BLKH, v_BLKH), _segments(segments_BL, k_BLKH))
    out_BKLGH, logsumexp_BKLG = _of_each_head(_forward_one, *heads)
    (out_BLKGH,) = _heads_first(out_BKLGH)
    out_BLKGH, logsumexp_BKLG = (checkpoint_name(a, KEPT) for a in (out_BLKGH, logsumexp_BKLG))
    return out_BLKGH, (q_BLKGH, k_BLKH, v_BLKH, segments_BL, out_BLKGH, logsumexp_BKLG)


def _backward(residuals, g_BLKGH):
    q_BLKGH, k_BLKH, v_BLKH, segments_BL, out_BLKGH, logsumexp_BKLG = residuals
    heads = (*_heads_first(q_BLKGH, k_BLKH, v_BLKH), _segments(segments_BL, k_BLKH))
    out_BKLGH, g_BKLGH = _heads_first(out_BLKGH, g_BLKGH)
    grads = _of_each_head(_backward_one, *heads, out_BKLGH, logsumexp_BKLG, g_BKLGH)
    return (*_heads_first(*grads), None)


attention.defvjp(_forward, _backward)
