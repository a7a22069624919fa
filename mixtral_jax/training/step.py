"""One optimizer step as one compiled program: state in, state out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.config import Config
from mixtral_jax.data.packing import Batch
from mixtral_jax.kernels import platform
from mixtral_jax.model.mixtral import Mixtral, abstract_state, chosen_kernels
from mixtral_jax.model.router import RoutingStatistics
from mixtral_jax.training import losses as loss_terms
from mixtral_jax.training.optimizer import learning_rate, make_optimizer, rounded


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: jax.Array
    """Steps taken, skipped ones included."""
    skipped: jax.Array
    """Steps skipped because the loss or the gradient was not finite."""
    skipped_in_a_row: jax.Array
    params: nnx.State
    optimizer: Any


class StepMetrics(NamedTuple):
    """What a step reports; all replicated."""

    losses: loss_terms.Losses
    grad_norm: jax.Array
    learning_rate: jax.Array
    tokens: jax.Array
    """Real tokens of the batch."""
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    statistics: RoutingStatistics
    """Summed over the microbatches; a layer dimension in front."""


def make_state(config: Config, key: jax.Array) -> TrainState:
    """A fresh state; call it under jit, with the shardings of `abstract_train_state`."""
    params = nnx.state(Mixtral(config.model, key))
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, zero, zero, params, make_optimizer(config.training).init(params))


def abstract_train_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """Shapes, types and shardings of a TrainState on a mesh."""
    state = jax.eval_shape(partial(make_state, config), jax.random.key(0))

    def with_sharding(leaf):
        if isinstance(leaf, nnx.Variable):
            return sharding.placed_shapes(leaf, mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh))

    return jax.tree.map(with_sharding, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def kernels_of_step(config: Config) -> dict[str, str]:
    """Of the training step, on the mesh that is set; see model.mixtral.chosen_kernels."""
    training = config.training
    batch = training.batch_size // training.gradient_accumulation
    return chosen_kernels(config.model, batch, training.sequence_length)


def shardings_of(abstract: Any) -> Any:
    """The shardings of a tree of ShapeDtypeStructs."""
    return jax.tree.map(lambda a: a.sharding, abstract)


def initial_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """A fresh TrainState made in place on the mesh; the same on every mesh."""
    shardings = shardings_of(abstract_train_state(config, mesh))
    with jax.set_mesh(mesh):
        make = jax.jit(partial(make_state, config), out_shardings=shardings)
        return make(jax.random.key(config.run.seed))


def state_from(params: nnx.State, config: Config, mesh: jax.sharding.Mesh) -> TrainState:
    """The TrainState before the first step of a model that has been loaded; takes its arrays."""
    shardings = shardings_of(abstract_train_state(config, mesh).optimizer)
    with jax.set_mesh(mesh):
        optimizer = jax.jit(make_optimizer(config.training).init, out_shardings=shardings)(params)
        zero = jax.device_put(np.int32(0), sharding.replicated(mesh))
        return TrainState(zero, zero + 0, zero + 0, params, optimizer)


def _forward(graphdef, params, batch: Batch):
    model = nnx.merge(graphdef, params)
    out = model.forward(batch.tokens_BL, batch.positions_BL, batch.segments_BL)
    sums = loss_terms.token_sums(out.logits_BLV, batch.targets_BL, batch.segments_BL > 0)
    return sums, out.statistics


def _in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _gradients(config: Config, graphdef, params, batch_MBL: Batch):
    """Gradients, losses and statistics of a batch, summed over its microbatches by a scan.

    Gradients of bfloat16 weights are bfloat16, their sums over microbatches float32.
    """
    batch_tokens = (batch_MBL.segments_BL > 0).sum().astype(jnp.float32)
    weights = {
        "load_balance_weight": config.model.load_balance_weight,
        "router_z_weight": config.model.router_z_weight,
        "z_weight": config.training.z_loss_weight,
    }

    def loss(params, batch):
        sums, statistics = _forward(graphdef, params, batch)
        losses = loss_terms.losses(sums, statistics, batch_tokens, **weights)
        return losses.total, (losses, statistics)

    def one(params, batch):
        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        return grads, aux

    def term(params, batch):
        grads, aux = one(params, batch)
        return _in_float32(grads), aux

    first = jax.tree.map(lambda x: x[0], batch_MBL)
    if config.training.gradient_accumulation == 1:
        grads, aux = one(params, first)
    else:
        shapes = jax.eval_shape(term, params, first)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes)
        add = partial(jax.tree.map, jnp.add)
        (grads, aux), _ = jax.lax.scan(
            lambda total, batch: (add(total, term(params, batch)), None), zeros, batch_MBL
        )
    return grads, *aux, batch_tokens


def _choose(finite, update, old):
    """What update() gives if finite, else the old."""
    if platform() == "cpu":  # a select of each array has XLA:CPU copy the old one first
        return jax.lax.cond(finite, update, lambda: old)
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), update(), old)


def make_train_step(
    config: Config,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """The step as a plain function of (state, batch_MBL), to be jitted with the state donated.

    A step whose loss or gradient is not finite leaves parameters and optimizer as they were, and is
    counted. Statistics of the routing cover the whole batch; the load-balancing loss is taken per
    microbatch and averaged by its tokens.
    """
    graphdef, _ = abstract_state(config.model)
    optimizer, schedule = make_optimizer(config.training), learning_rate(config.training)
    key = jax.random.key(config.run.seed)

    def train_step(state: TrainState, batch_MBL: Batch) -> tuple[TrainState, StepMetrics]:
        grads, losses, statistics, tokens = _gradients(config, graphdef, state.params, batch_MBL)
        with jax.named_scope("optimizer"):
            grad_norm = optax.tree.norm(_in_float32(grads))
            finite = jnp.isfinite(losses.total) & jnp.isfinite(grad_norm)
            old = state.params, state.optimizer

            def update():
                # Of float32 gradients the optimizer makes float32, of bfloat16 state too. They are
                # converted here, where it fuses, and not kept for it twice as large.
                updates, changed = optimizer.update(
                    _in_float32(grads), state.optimizer, state.params, norm=grad_norm
                )
                new = jax.tree.map(jnp.add, state.params, updates), changed
                return rounded(new, old, jax.random.fold_in(key, state.step))

            params, changed = _choose(finite, update, old)
        bad = jnp.where(finite, 0, 1)
        skipped, row = state.skipped + bad, jnp.where(finite, 0, state.skipped_in_a_row + 1)
        rate = jnp.asarray(schedule(state.step - state.skipped), jnp.float32)
        metrics = StepMetrics(losses, grad_norm, rate, tokens, skipped, row, statistics)
        return TrainState(state.step + 1, skipped, row, params, changed), metrics

    return train_step


def make_validation_step(
    config: Config,
) -> Callable[[nnx.State, Batch], tuple[loss_terms.TokenSums, jax.Array]]:
    """A function of (params, batch_MBL) that gives the sums over all real targets, and how many
    assignments were dropped."""
    graphdef, _ = abstract_state(config.model)

    def one(params: nnx.State, batch: Batch):
        sums, statistics = _forward(graphdef, params, batch)
        return sums, statistics.dropped

    def validation_step(params: nnx.State, batch_MBL: Batch):
        return jax.tree.map(jnp.sum, jax.lax.map(partial(one, params), batch_MBL))

    return validation_step
