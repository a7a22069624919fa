"""AdamW and its learning-rate schedules, from optax; and bfloat16 state that loses no update."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from mixtral_jax.config import TrainingConfig


def learning_rate(config: TrainingConfig) -> optax.Schedule:
    """Linear warm-up from 0, then the schedule's way to final_learning_rate_ratio of the peak."""
    peak, warmup = config.learning_rate, config.warmup_steps
    last = peak * config.final_learning_rate_ratio
    rest = max(config.steps - warmup, 1)
    ramp = optax.linear_schedule(0.0, peak, max(warmup, 1))
    if config.schedule == "warmup_stable_decay":
        decay = round(config.decay_fraction * config.steps)
        start = max(config.steps - decay, warmup)
        decay = optax.linear_schedule(peak, last, max(config.steps - start, 1))
        pieces = [ramp, optax.constant_schedule(peak), decay]
        return optax.join_schedules(pieces, [warmup, start])
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_learning_rate_ratio),
        "linear": optax.linear_schedule(peak, last, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    return optax.join_schedules([ramp, after], [warmup])


def is_matrix(params: Any) -> Any:
    """True for every parameter of two or more dimensions, not counting that of the layers."""

    def dimensions(param: nnx.Variable) -> Any:
        axes = [a for a in param.get_metadata("logical_axes") if a != "layers"]
        return jax.tree.map(lambda _: len(axes) >= 2, param)

    return jax.tree.map(dimensions, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def clip_to_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """optax's clip_by_global_norm given the norm; a factor, which fuses into the rest."""

    def clip(grads: Any, state: Any, params: Any = None, *, norm: jax.Array, **_: Any) -> Any:
        factor = jnp.minimum(1, limit / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, clip)


def make_optimizer(config: TrainingConfig) -> optax.GradientTransformationExtraArgs:
    """Clipping by the global norm, `norm` of update(); then AdamW that decays matrices only."""
    clip = clip_to_norm(config.clip_norm) if config.clip_norm else optax.identity()
    adamw = optax.adamw(
        learning_rate(config),
        b1=config.adam_beta1,
        b2=config.adam_beta2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        mask=is_matrix,
    )
    return optax.with_extra_args_support(optax.chain(clip, adamw))


def rounded(new: Any, old: Any, key: jax.Array) -> Any:
    """What a step makes of a state, in the types of the old one: bfloat16 by stochastic rounding.

    To the nearest, a weight would stand still whose update is less than half of bfloat16's step at
    its size, 1/512: at usual learning rates most of them. Paper: arXiv 2010.06192.

    Args:
      new, old: trees of the same structure; what is bfloat16 in old is float32 in new.
      key: of this step. The same gives the same on every mesh.
    """
    number = itertools.count()

    def one(new: jax.Array, old: jax.Array) -> jax.Array:
        if new.dtype == old.dtype:
            return new
        return stochastically_rounded(new, jax.random.fold_in(key, next(number)))

    return jax.tree.map(one, new, old)


def stochastically_rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to one of the two nearest values of bfloat16, whose mean is x."""
    noisy = lax.bitcast_convert_type(x, jnp.uint32) + random_16_bits(key, x)  # carries upwards
    up_or_down = lax.bitcast_convert_type((noisy >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), up_or_down, x.astype(jnp.bfloat16))


def random_16_bits(key: jax.Array, like: jax.Array) -> jax.Array:
    """16 bits in uint32 for each number of an array, sharded as it is; the same on every mesh.

    jax.random draws a seed for each row (along the last axis) only, as its bits cost more than all
    else in an update. A number's are its place in the row and the seed, mixed as MurmurHash3 ends.
    """
    sharding = jax.typeof(like).sharding
    rows = sharding.update(spec=sharding.spec[:-1])
    seeds = jax.random.bits(key, like.shape[:-1], jnp.uint32, out_sharding=rows)
    place = lax.broadcasted_iota(jnp.uint32, like.shape, like.ndim - 1, out_sharding=sharding)
    bits = place * np.uint32(0x9E3779B9) + seeds[..., None]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> shift)) * np.uint32(factor)
    return bits >> 16
