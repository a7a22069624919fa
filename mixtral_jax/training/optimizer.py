"""AdamW and its learning-rate schedules, from optax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

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
