"""Mixtral in plain NumPy and float64, to compare with: every expert runs on every token.

Parameters come as the nested dictionary that nnx.to_pure_dict gives. `xp` is NumPy; only while
`gradient` traces a function is it jax.numpy, in float64, so that the same lines give gradients too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

xp = np


def gradient(function, argnums):
    """The compiled float64 gradient of a scalar function made of those below."""

    def traced(*arguments):
        global xp
        xp = jnp
        try:
            return jax.grad(function, argnums)(*arguments)
        finally:
            xp = np

    compiled = jax.jit(traced)

    def call(*arguments):
        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            return jax.tree.map(np.asarray, compiled(*arguments))

    return call


def close(actual, expected, rel=1e-5):
    """Compare two trees of arrays: no error above rel times the largest value in that array."""
    actual_leaves, actual_tree = jax.tree.flatten_with_path(actual)
    expected_leaves, expected_tree = jax.tree.flatten_with_path(expected)
    assert actual_tree == expected_tree, f"{actual_tree} is not {expected_tree}"
    for (path, a), (_, b) in zip(actual_leaves, expected_leaves):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        name = jax.tree_util.keystr(path)
        assert a.shape == b.shape, f"{name} has shape {a.shape}, not {b.shape}"
        assert np.isfinite(b).all(), f"{name}: what is expected is not finite"
        assert np.isfinite(a).all(), f"{name} is not finite"
        worst, size = np.abs(a - b).max(initial=0), np.abs(b).max(initial=0)
        assert worst <= rel * size, f"{name} is off by {worst:.3g}; its largest is {size:.3g}"


# ---- layers ------------------------------------------------------------------------------------


def softmax(x):
    e = xp.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def logsumexp(x):
    top = x.max(axis=-1, keepdims=True)
    return (top + xp.log(xp.exp(x - top).sum(axis=-1, keepdims=True)))[..., 0]


def silu(x):
    return x / (1 + xp.exp(-x))


def rms_norm(x, weight, eps):
    return x / xp.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def rope(x_BLNH, positions_BL, theta):
    """Dimensions i and i + H / 2 are one complex number, which turns with its position."""
    half = x_BLNH.shape[-1] // 2
    frequency_h = np.array([theta ** (-i / half) for i in range(half)])
    turn = xp.exp(1j * positions_BL[:, :, None, None] * frequency_h)
    turned = (x_BLNH[..., :half] + 1j * x_BLNH[..., half:]) * turn
    return xp.concatenate([turned.real, turned.imag], axis=-1)


def may_see(segments_BL):
    """Query l sees key s if s stands at or before l in the same row and document."""
    length = segments_BL.shape[1]
    same = segments_BL[:, :, None] == segments_BL[:, None, :]
    return same & np.tril(np.ones((length, length), bool))


def attend(q_BLKGH, k_BSKH, v_BSKH, allowed_BLS):
    """softmax(q k / sqrt(H)) v, one query head after another."""
    heads = []
    for kv in range(q_BLKGH.shape[2]):
        for group in range(q_BLKGH.shape[3]):
            scores = xp.einsum("blh,bsh->bls", q_BLKGH[:, :, kv, group], k_BSKH[:, :, kv])
            scores = xp.where(allowed_BLS, scores / math.sqrt(q_BLKGH.shape[-1]), -1e300)
            heads.append(xp.einsum("bls,bsh->blh", softmax(scores), v_BSKH[:, :, kv]))
    return xp.stack(heads, axis=2).reshape(q_BLKGH.shape)


def attention(x_BLD, p, positions_BL, segments_BL, theta):
    q = xp.einsum("bld,dkgh->blkgh", x_BLD, p["wq_DKGH"])
    q = rope(q.reshape(*q.shape[:2], -1, q.shape[-1]), positions_BL, theta).reshape(q.shape)
    k = rope(xp.einsum("bld,dkh->blkh", x_BLD, p["wk_DKH"]), positions_BL, theta)
    v = xp.einsum("bld,dkh->blkh", x_BLD, p["wv_DKH"])
    return xp.einsum("blkgh,kghd->bld", attend(q, k, v, may_see(segments_BL)), p["wo_KGHD"])


# ---- experts -----------------------------------------------------------------------------------


class Statistics(NamedTuple):
    """Field for field those of model.router.RoutingStatistics."""

    assignments_E: np.ndarray
    probabilities_E: np.ndarray
    tokens: np.ndarray
    squared_logsumexp: np.ndarray
    dropped: np.ndarray


def top_k(logits_TE, k):
    """The k largest, best first; of equals the lower index first."""
    return xp.argsort(-logits_TE, axis=-1, stable=True)[:, :k]


def keep_rows(ids_TC, real_T, experts, factor, devices):
    """Which assignments are kept when a device may send ceil(factor T C / E) rows to an expert.

    Each device has an equal, consecutive share of the tokens. It serves all first choices before
    any second one, and each choice in the order of the tokens.
    """
    tokens, k = ids_TC.shape
    capacity = math.ceil(factor * (tokens // devices) * k / experts)
    return _keep(ids_TC, real_T, np.full((devices, experts), capacity))


def keep_received(ids_TC, real_T, experts, room, devices, shards, each):
    """Which assignments are kept when a device has room for so many rows (`each`: per sender).

    Devices come in groups of `shards` that exchange among themselves. Where rows do not fit, all
    runs (one from each sender for each expert) are cut to the greatest equal length that fits.
    """
    share, local = len(ids_TC) // devices, experts // shards
    most_XE = np.zeros((devices, experts), int)
    for device in range(devices):
        mine = slice(device * share, (device + 1) * share)
        ids = ids_TC[mine][real_T[mine]].reshape(-1)
        most_XE[device] = np.bincount(ids, minlength=experts)
    for first in range(0, devices, shards):
        group = range(first, first + shards)
        for owner in range(shards):
            for senders in [[s] for s in group] if each else [group]:
                runs = np.ix_(senders, range(owner * local, (owner + 1) * local))
                fits = (
                    n for n in range(room, -1, -1) if np.minimum(most_XE[runs], n).sum() <= room
                )
                most_XE[runs] = np.minimum(most_XE[runs], next(fits))
    return _keep(ids_TC, real_T, most_XE)


def _keep(ids_TC, real_T, most_XE):
    """The assignments kept when device x sends at most most_XE[x, e] rows to expert e."""
    (tokens, k), devices = ids_TC.shape, len(most_XE)
    share = tokens // devices
    keep_TC = np.zeros(ids_TC.shape, bool)
    for device in range(devices):
        sent_E = [0] * most_XE.shape[1]
        for choice in range(k):
            for token in range(device * share, (device + 1) * share):
                expert = ids_TC[token, choice]
                if real_T[token] and sent_E[expert] < most_XE[device, expert]:
                    sent_E[expert] += 1
                    keep_TC[token, choice] = True
    return keep_TC


def moe(x_TD, p, real_T, k, keep_TC=None):
    """The layer's output, and the sums over real tokens that its losses need."""
    logits_TE = x_TD @ p["router_DE"]
    ids_TC = top_k(logits_TE, k)
    weights_TC = softmax(xp.take_along_axis(logits_TE, ids_TC, axis=-1))
    keep_TC = np.ones((len(x_TD), k), bool) if keep_TC is None else keep_TC
    chosen_TCE = (ids_TC[:, :, None] == np.arange(logits_TE.shape[1])) & real_T[:, None, None]
    out_TD = 0
    for e in range(logits_TE.shape[1]):
        hidden_TF = silu(x_TD @ p["gate_EDF"][e]) * (x_TD @ p["up_EDF"][e])
        weight_T = (weights_TC * keep_TC * chosen_TCE[:, :, e]).sum(axis=1)
        out_TD = out_TD + weight_T[:, None] * (hidden_TF @ p["down_EFD"][e])
    return out_TD, Statistics(
        assignments_E=chosen_TCE.sum(axis=(0, 1)),
        probabilities_E=(softmax(logits_TE) * real_T[:, None]).sum(axis=0),
        tokens=real_T.sum(),
        squared_logsumexp=(logsumexp(logits_TE) ** 2 * real_T).sum(),
        dropped=(~keep_TC & real_T[:, None]).sum(),
    )


# ---- the whole ---------------------------------------------------------------------------------


def mixtral(p, tokens_BL, positions_BL, segments_BL, config):
    """Logits, and the statistics of each layer stacked."""
    x_BLD = p["embedding_VD"][tokens_BL]
    real_T = (segments_BL > 0).reshape(-1)
    eps, statistics = config.rms_norm_eps, []
    for i in range(config.num_hidden_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        normed = rms_norm(x_BLD, layer["attention_norm"]["weight"], eps)
        x_BLD = x_BLD + attention(
            normed, layer["attention"], positions_BL, segments_BL, config.rope_theta
        )
        normed = rms_norm(x_BLD, layer["moe_norm"]["weight"], eps)
        flat_TD = normed.reshape(-1, normed.shape[-1])
        out_TD, sums = moe(flat_TD, layer["moe"], real_T, config.num_experts_per_tok)
        x_BLD = x_BLD + out_TD.reshape(x_BLD.shape)
        statistics.append(sums)
    logits_BLV = rms_norm(x_BLD, p["norm"]["weight"], eps) @ p["head_DV"]
    return logits_BLV, Statistics(*(xp.stack(sums) for sums in zip(*statistics)))


def losses(logits_BLV, statistics, targets_BL, real_BL):
    """Cross-entropy, load balance, router z and z, each a mean over the real tokens."""
    tokens = real_BL.sum()
    total = logsumexp(logits_BLV)
    chosen = xp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]
    share = statistics.assignments_E / tokens
    probability = statistics.probabilities_E / tokens
    experts = share.shape[-1]
    return (
        ((total - chosen) * real_BL).sum() / tokens,
        (experts * (share * probability).sum(axis=-1)).mean(),
        (statistics.squared_logsumexp / tokens).mean(),
        (total**2 * real_BL).sum() / tokens,
    )
