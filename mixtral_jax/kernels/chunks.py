"""Causal attention for CPU, a chunk of queries at a time.

Scores above the diagonal are not computed, those of one chunk and kv head lie in cache, and none
are kept: the backward pass makes them again from the sum of their exponentials.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax.kernels import dot
from mixtral_jax.kernels.blocks import dot_rounded

KEPT = "attention_chunks"
"""Name, for checkpoint policies, of what the backward pass wants: the output and the logsumexp."""
CHUNKS = 8
"""A sequence in so many chunks does 1 / 2 + 1 / (2 CHUNKS) of the work of all pairs."""
SHORTEST = 64
"""Shorter sequences' scores are too few to be worth a loop over heads."""


def fits(length: int) -> bool:
    """Whether sequences of this length divide into chunks that are worth the trouble."""
    return length % CHUNKS == 0 and length >= SHORTEST


def _chunks(length: int):
    """(first, last + 1) of the queries of each chunk; its keys end where they do."""
    size = length // CHUNKS
    return [(first, first + size) for first in range(0, length, size)]


def _scores(q_LGH, k_SH, segments_L, first: int, last: int):
    """scores_rS of the queries first .. last, r = (query, group), and of the keys before last."""
    groups, head = q_LGH.shape[1:]
    scores_rS = dot(q_LGH[first:last].reshape(-1, head), k_SH[:last], 1) * head**-0.5
    rows_l, keys_S = jnp.arange(first, last), jnp.arange(last)
    allowed_lS = rows_l[:, None] >= keys_S[None]
    allowed_lS &= segments_L[first:last, None] == segments_L[None, :last]
    scores_lGS = scores_rS.reshape(-1, groups, last)
    return jnp.where(allowed_lS[:, None], scores_lGS, -jnp.inf).reshape(-1, last)


def _forward_one(operands):
    """Of one sequence and kv head: out_LGH, and logsumexp_LG of the scores."""
    q_LGH, k_LH, v_LH, segments_L = operands
    outs, logsumexps = [], []
    for first, last in _chunks(q_LGH.shape[0]):
        scores_rS = _scores(q_LGH, k_LH, segments_L, first, last)
        most_r1 = scores_rS.max(axis=1, keepdims=True)
        weights_rS = jnp.exp(scores_rS - most_r1)
        sum_r1 = weights_rS.sum(axis=1, keepdims=True)
        outs.append(dot(weights_rS.astype(v_LH.dtype), v_LH[:last]) / sum_r1)
        logsumexps.append(most_r1 + jnp.log(sum_r1))
    out_LGH = jnp.concatenate(outs).reshape(q_LGH.shape).astype(q_LGH.dtype)
    return out_LGH, jnp.concatenate(logsumexps).reshape(q_LGH.shape[:2])


def _backward_one(operands):
    """Gradients of q_LGH, k_LH and v_LH of one sequence and kv head."""
    q_LGH, k_LH, v_LH, segments_L, out_LGH, logsumexp_LG, g_LGH = operands
    head, dtype = q_LGH.shape[-1], q_LGH.dtype
    dot_LG = (out_LGH.astype(jnp.float32) * g_LGH.astype(jnp.float32)).sum(axis=-1)
    dqs, dk_LH, dv_LH = [], jnp.zeros(k_LH.shape), jnp.zeros(v_LH.shape)
    for first, last in _chunks(q_LGH.shape[0]):
        q_rH, g_rH = (a[first:last].reshape(-1, head) for a in (q_LGH, g_LGH))
        sum_r1, dot_r1 = (a[first:last].reshape(-1, 1) for a in (logsumexp_LG, dot_LG))
        weights_rS = jnp.exp(_scores(q_LGH, k_LH, segments_L, first, last) - sum_r1)
        d_weights_rS = dot(g_rH, v_LH[:last], 1)
        d_scores_rS = (weights_rS * (d_weights_rS - dot_r1) * head**-0.5).astype(dtype)
        dqs.append(dot(d_scores_rS, k_LH[:last]))
        dk_LH = dk_LH.at[:last].add(dot_rounded(d_scores_rS, q_rH, 0, 0, jnp.float32))
        dv_LH = dv_LH.at[:last].add(dot_rounded(weights_rS.astype(dtype), g_rH, 0, 0, jnp.float32))
    dq_LGH = jnp.concatenate(dqs).reshape(q_LGH.shape)
    return tuple(a.astype(dtype) for a in (dq_LGH, dk_LH, dv_LH))


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
