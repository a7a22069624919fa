"""The losses: cross-entropy, load balancing and the two z-losses.

Load balancing follows the scale of Hugging Face's Mixtral and the statistics of the Switch paper
(arXiv 2101.03961, equations 4 to 6): per layer, E * sum_e f_e P_e, where f_e is the number of
assignments to expert e over the number of tokens (so that f sums to k) and P_e the mean router
probability. It is k when balanced and E when one expert is certain for all (k = 1). Tokens are the
real tokens of the global batch; layers are averaged.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mixtral_jax.kernels import platform
from mixtral_jax.model.router import RoutingStatistics


class TokenSums(NamedTuple):
    """Sums over the real targets of a batch."""

    cross_entropy: jax.Array
    """Nats."""
    squared_logsumexp: jax.Array
    tokens: jax.Array


@jax.custom_vjp
def token_sums(logits_BLV: jax.Array, targets_BL: jax.Array, real_BL: jax.Array) -> TokenSums:
    """Cross-entropy and squared logsumexp of float32 logits, summed where real_BL is true.

    The backward pass keeps nothing as large as the logits but the logits: softmax is made again, in
    the one pass that writes their gradient.
    """
    return _token_sums_forward(logits_BLV, targets_BL, real_BL)[0]


def _is_target(logits_BLV, targets_BL):
    return targets_BL[:, :, None] == jnp.arange(logits_BLV.shape[-1])[None, None, :]


def _target_logits(logits_BLV, targets_BL):
    """Each target's logit: by comparison, or on CPU by index where the vocabulary is not split.

    XLA:CPU does not fuse the comparison, and writes an array as large as the logits. For TPU it is
    the index that takes twice their memory.
    """
    batch, length, vocabulary = jax.typeof(logits_BLV).sharding.spec
    if vocabulary is not None or platform() != "cpu":
        chosen_BLV = jnp.where(_is_target(logits_BLV, targets_BL), logits_BLV, 0)
        return chosen_BLV.sum(axis=-1)

    def pick(logits_BLV, targets_BL):
        return jnp.take_along_axis(logits_BLV, targets_BL[..., None], axis=-1)[..., 0]

    if batch is None and length is None:
        return pick(logits_BLV, targets_BL)
    # Of each device's own tokens: a gather among split dimensions would have to say so.
    over = PartitionSpec(batch, length)
    targets_BL = jax.sharding.reshard(targets_BL, over)
    return jax.shard_map(pick, in_specs=(over, over), out_specs=over)(logits_BLV, targets_BL)


def _token_sums_forward(logits_BLV, targets_BL, real_BL):
    logsumexp_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
    target_BL = _target_logits(logits_BLV, targets_BL)
    weight_BL = real_BL.astype(jnp.float32)
    sums = TokenSums(
        cross_entropy=jnp.sum(jnp.where(real_BL, logsumexp_BL - target_BL, 0)),
        squared_logsumexp=jnp.sum(jnp.where(real_BL, logsumexp_BL**2, 0)),
        tokens=weight_BL.sum(),
    )
    return sums, (logits_BLV, targets_BL, weight_BL, logsumexp_BL)


def _token_sums_backward(residuals, g):
    logits_BLV, targets_BL, weight_BL, logsumexp_BL = residuals
    softmax_BLV = jnp.exp(logits_BLV - logsumexp_BL[:, :, None])
    target_BL = weight_BL * g.cross_entropy
    all_BL = target_BL + weight_BL * 2 * logsumexp_BL * g.squared_logsumexp
    chosen_BLV = jnp.where(_is_target(logits_BLV, targets_BL), target_BL[:, :, None], 0)
    return all_BL[:, :, None] * softmax_BLV - chosen_BLV, None, None


token_sums.defvjp(_token_sums_forward, _token_sums_backward)


def load_balance(statistics: RoutingStatistics) -> jax.Array:
    """Mean over the layers of E * sum_e f_e P_e; k when balanced. See the module's docstring."""
    experts = statistics.assignments_E.shape[-1]
    tokens = jnp.maximum(statistics.tokens, 1)[..., None]
    share_E = statistics.assignments_E / tokens
    probability_E = statistics.probabilities_E / tokens
    return experts * jnp.mean(jnp.sum(share_E * probability_E, axis=-1))


def router_z(statistics: RoutingStatistics) -> jax.Array:
    """Mean over tokens and layers of logsumexp(router logits)^2 (ST-MoE, arXiv 2202.08906)."""
    return jnp.mean(statistics.squared_logsumexp / jnp.maximum(statistics.tokens, 1))


class Losses(NamedTuple):
    """What one batch, or one microbatch's part of it, adds to each loss."""

    total: jax.Array
    """What is differentiated: all the others, weighted."""
    cross_entropy: jax.Array
    """Nats a token."""
    load_balance: jax.Array
    router_z: jax.Array
    z: jax.Array


def losses(
    sums: TokenSums,
    statistics: RoutingStatistics,
    batch_tokens: jax.Array,
    *,
    load_balance_weight: float,
    router_z_weight: float,
    z_weight: float,
) -> Losses:
    """The losses of a microbatch, scaled so that they add up to those of the whole batch.

    Sums over targets are divided by the batch's number of tokens; means over the microbatch are
    weighted by its share of them. So cutting a batch into microbatches changes neither the scale of
    the cross-entropy's gradient nor that of the auxiliary losses'.

    Args:
      batch_tokens: real tokens of the whole batch.
    """
    batch_tokens = jnp.maximum(batch_tokens, 1)
    part = sums.tokens / batch_tokens
    cross_entropy = sums.cross_entropy / batch_tokens
    z = sums.squared_logsumexp / batch_tokens
    balance, router = part * load_balance(statistics), part * router_z(statistics)
    total = cross_entropy + load_balance_weight * balance + router_z_weight * router + z_weight * z
    return Losses(total, cross_entropy, balance, router, z)
