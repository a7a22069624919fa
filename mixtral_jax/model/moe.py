"""The sparse mixture of experts: route, exchange, experts, exchange back, combine.

One shard_map holds it all. With X devices along the expert axis, each owns e = E / X experts whole
(their model dimension is gathered over fsdp for the occasion; their hidden dimension stays split
over tensor), and the rows of tokens travel to them and back.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.kernels import apart, bits, few_tokens, grouped_matmul, int8
from mixtral_jax.kernels import exchange as exchanges
from mixtral_jax.kernels.experts import experts as experts_of
from mixtral_jax.kernels.gather import all_gather
from mixtral_jax.kernels.rows import segment_map, starts, take_rows, weighted_sum
from mixtral_jax.model.int8 import Int8Param
from mixtral_jax.model.layers import matrix
from mixtral_jax.model.router import RoutingStatistics, local_statistics, route


def exchange_of(config: ModelConfig, tokens: int) -> exchanges.Exchange:
    """The exchange of one layer, where each device of the mesh that is set has that many tokens."""
    shards = sharding.expert_shards()
    experts, per_token = config.num_local_experts, config.num_experts_per_tok
    return exchanges.make(
        exchanges.resolve(config.exchange, shards),
        sharding.EXPERT,
        shards,
        tokens=tokens,
        experts=experts,
        per_token=per_token,
        capacity=capacity_of(config.capacity_factor, tokens, per_token, experts),
        receive_factor=config.receive_factor,
    )


def grouped_matmul_of(config: ModelConfig, dtype: jnp.dtype) -> str:
    """The body of the experts' products of activations of this type, on the mesh that is set."""
    hidden = config.intermediate_size // sharding.tensor_shards()
    return grouped_matmul.resolve(config.grouped_matmul, config.hidden_size, hidden, dtype)


def runs_few(config: ModelConfig, tokens: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels for a few tokens do all that follows the routing, of so many on each
    device of the mesh that is set and with matrices that are arrays."""
    hidden = config.intermediate_size // sharding.tensor_shards()
    shape = (config.num_local_experts, config.hidden_size, hidden)
    whole = exchange_of(config, tokens).implementation == "local" and config.capacity_factor is None
    return whole and not config.grouped_matmul and few_tokens.fits(tokens, *shape, dtype)


class Ranked(NamedTuple):
    """Assignments (choice, token) by expert; A = C * T, numbered best choices first."""

    order_A: jax.Array
    """All of them, stably sorted by expert."""
    rank_CT: jax.Array
    """The rank of each within its expert."""
    counts_E: jax.Array
    """How many chose each expert."""
    wanted_E: jax.Array
    """How many of them are below the capacity: what is to go, if there is room for it."""


class Dispatch(NamedTuple):
    """Which token goes where in the send buffer, of S rows."""

    token_S: jax.Array
    """For each row of the send buffer, its token; T where the row is empty."""
    assignment_S: jax.Array
    """For each row of the send buffer, its assignment; A where the row is empty."""
    row_CT: jax.Array
    """For each choice of each token, its row in the send buffer; S where dropped or padding."""


def capacity_of(capacity_factor: float | None, tokens: int, per_token: int, experts: int):
    """Rows that one device may send to one expert: ceil(factor * T * C / E); None if dropless."""
    if capacity_factor is None:
        return None
    return math.ceil(capacity_factor * tokens * per_token / experts)


def rank_assignments(ids_TC: jax.Array, experts: int, capacity: int | None) -> Ranked:
    """The assignments in the order of their experts, and how many of each are below the capacity.

    Assignments are ranked best choices first, then in the order of the tokens: when an expert is
    over capacity, second choices are dropped before any first choice, later tokens before earlier.
    """
    ids_A = ids_TC.T.reshape(-1)
    # Counting: a comparison sort takes XLA 16 s to compile for TPU. Padding sorts behind the last.
    numbers_A = jnp.arange(ids_A.size, dtype=jnp.int32)
    chosen_EA = (ids_A[None] == jnp.arange(experts + 1)[:, None]).astype(jnp.int32)
    rank_EA = jnp.cumsum(chosen_EA, axis=1) - chosen_EA
    rank_A = (rank_EA * chosen_EA).sum(axis=0)
    counts_E = chosen_EA.sum(axis=1)
    position_A = (starts(counts_E)[:, None] * chosen_EA).sum(axis=0) + rank_A
    places_A = jnp.zeros_like(ids_A).at[position_A]
    order_A = places_A.set(numbers_A, unique_indices=True, mode="promise_in_bounds")
    counts_E = counts_E[:experts]
    wanted_E = counts_E if capacity is None else jnp.minimum(counts_E, capacity)
    return Ranked(order_A, rank_A.reshape(ids_TC.T.shape), counts_E, wanted_E)


def lay_out(ids_TC, ranked: Ranked, plan: exchanges.Plan, send_rows: int) -> Dispatch:
    """Lay out in the plan's send buffer the assignments that it keeps."""
    (tokens, _), assignments = ids_TC.shape, ids_TC.size
    kept_E, offsets_E = plan.kept_E, plan.offsets_E
    sorted_S = segment_map(offsets_E, starts(ranked.counts_E), kept_E, send_rows, assignments)
    assignment_S = ranked.order_A.at[sorted_S].get(mode="fill", fill_value=assignments)
    token_S = jnp.where(assignment_S < assignments, assignment_S % tokens, tokens)
    ids_CT = ids_TC.T
    kept_CT = ranked.rank_CT < kept_E.at[ids_CT].get(mode="fill", fill_value=0)
    row_CT = offsets_E.at[ids_CT].get(mode="fill", fill_value=0) + ranked.rank_CT
    return Dispatch(token_S, assignment_S, jnp.where(kept_CT, row_CT, send_rows))


class MoE(nnx.Module):
    """Sparse SwiGLU experts: sum over the k chosen experts of weight * w2(silu(w1 x) * (w3 x)).

    Each parameter of the experts is one array, or, after `unstacked.unstacked`, a tuple of arrays:
    that of number i holds the i-th expert of each device along the expert axis.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        experts, width, hidden = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        keys = jax.random.split(key, 4)
        make = partial(matrix, scale=config.initializer_range, dtype=config.param_dtype)
        into = ("experts", "expert_model", "expert_hidden")
        out_of = ("experts", "expert_hidden", "expert_model")
        self.router_DE = make(keys[0], (width, experts), ("model", None))
        self.gate_EDF = make(keys[1], (experts, width, hidden), into)
        self.up_EDF = make(keys[2], (experts, width, hidden), into)
        self.down_EFD = make(keys[3], (experts, hidden, width), out_of)
        self.config = config

    def __call__(self, x_BLD: jax.Array, real_BL: jax.Array) -> tuple[jax.Array, RoutingStatistics]:
        """Args: activations, and a mask that is false for padding (no expert sees it).

        Returns:
          out_BLD (zeros where padding, and nothing from a dropped assignment: the weights of the
          others stay as they are), and the statistics of the global batch.
        """
        tokens = real_BL.size // sharding.batch_shards()
        exchange = exchange_of(self.config, tokens)
        dtype = x_BLD.dtype
        grouped = grouped_matmul_of(self.config, dtype)
        into = sharding.spec("experts", "expert_model", "expert_hidden")
        out_of = sharding.spec("experts", "expert_hidden", "expert_model")
        weights = [self.gate_EDF, self.up_EDF, self.down_EFD]
        if isinstance(self.gate_EDF, Int8Param):  # converted when they are whole
            weights = [w.arrays() for w in weights]
            scale_EF, scale_ED = (
                sharding.spec("experts", axis) for axis in ("expert_hidden", "expert_model")
            )
            # The other way round: of an Int8Param what is summed over lies last, of gate [E, F, D].
            into, out_of = int8.Int8(out_of, scale_EF), int8.Int8(into, scale_ED)
        else:
            weights = [p.get_value() for p in weights]
            if grouped != "blocks" or isinstance(weights[0], tuple):  # blocks converts them itself
                weights = jax.tree.map(partial(bits.converted, dtype=dtype), weights)
        batch = sharding.spec("batch")
        body = partial(_sparse_experts, config=self.config, exchange=exchange, grouped=grouped)
        arrays = all(isinstance(w, jax.Array) for w in weights)
        few = arrays and runs_few(self.config, tokens, dtype)
        if few:
            body = partial(_few_tokens, per_token=self.config.num_experts_per_tok)
        body = jax.shard_map(
            body,
            in_specs=(batch, batch, sharding.spec(None, None), into, into, out_of),
            out_specs=(batch, sharding.spec()),
            check_vma=not few and grouped not in grouped_matmul.PALLAS,
        )
        router_DE = sharding.shard(self.router_DE[...], None, None)
        return body(x_BLD, real_BL, router_DE, *weights)

    def chosen(self, x_BLD: jax.Array, real_BL: jax.Array) -> jax.Array:
        """ids_BLC of the experts that each token chooses, best first; E where it is padding."""

        def body(x_BLD, real_BL, router_DE):
            x_TD, real_T = x_BLD.reshape(-1, x_BLD.shape[-1]), real_BL.reshape(-1)
            routing = route(x_TD, router_DE, real_T, self.config.num_experts_per_tok)
            return routing.ids_TC.reshape(*real_BL.shape, -1)

        batch = sharding.spec("batch")
        router_DE = sharding.shard(self.router_DE[...], None, None)
        specs = (batch, batch, sharding.spec(None, None))
        run = jax.shard_map(body, in_specs=specs, out_specs=batch)
        return run(x_BLD, real_BL, router_DE)


def _sparse_experts(
    x_BLD, real_BL, router_DE, gate_edf, up_edf, down_efd, *, config, exchange, grouped
):
    """One device's part of MoE.__call__; the five numbered steps of the data flow."""
    x_TD, real_T = x_BLD.reshape(-1, x_BLD.shape[-1]), real_BL.reshape(-1)
    tokens, experts, per_token = x_TD.shape[0], config.num_local_experts, config.num_experts_per_tok

    with jax.named_scope("route"):  # 1. choose experts; 2. sort the assignments by expert
        routing = route(x_TD, router_DE, real_T, per_token)
        capacity = capacity_of(config.capacity_factor, tokens, per_token, experts)
        ranked = jax.tree.map(
            lambda a: checkpoint_name(a, "routing"),
            rank_assignments(routing.ids_TC, experts, capacity),
        )

    with jax.named_scope("exchange"):  # 3. rows to their experts
        plan = exchanges.plan(exchange, ranked.wanted_E)
        dropped = (ranked.counts_E - plan.kept_E).sum()
        statistics = over_batch(local_statistics(routing, real_T, dropped))
        dispatch = lay_out(routing.ids_TC, ranked, plan, exchange.send_rows)
        sent_SD = take_rows(x_TD, dispatch.token_S, dispatch.row_CT)
        received_RD = exchanges.send(exchange, plan, sent_SD)
        received_RD = checkpoint_name(received_RD, "expert_in")

    with jax.named_scope("experts"):  # 4. SwiGLU over the experts that live here
        matrices = _gathered(gate_edf, up_edf, down_efd, received_RD)
        if isinstance(matrices[0], int8.Int8):
            done_RD = int8.experts(received_RD, *matrices, plan.group_sizes_e)
        elif isinstance(matrices[0], list):
            done_RD = apart.experts(received_RD, *matrices, plan.group_sizes_e)
        else:
            done_RD = experts_of(
                *(received_RD, *matrices, plan.group_sizes_e),
                implementation=grouped,
                gathered=bool(sharding.in_use(sharding.FSDP)),
            )

    with jax.named_scope("exchange"):  # 5. and back, where the weighted sum ends it
        returned_SD = exchanges.send_back(exchange, plan, done_RD)
        returned_SD = checkpoint_name(returned_SD, "expert_out")
    with jax.named_scope("combine"):
        parts_AD = take_rows(returned_SD, dispatch.row_CT.reshape(-1), dispatch.assignment_S[None])
        parts_CTD = parts_AD.reshape(per_token, tokens, -1)
        out_TD = weighted_sum(routing.weights_TC, parts_CTD)
        out_TD = lax.psum(out_TD, sharding.in_use(sharding.TENSOR))
    return out_TD.reshape(x_BLD.shape), statistics


def _few_tokens(x_BLD, real_BL, router_DE, gate_Edf, up_Edf, down_Efd, *, per_token):
    """_sparse_experts where the kernels for a few tokens do all but the routing."""
    x_TD, real_T = x_BLD.reshape(-1, x_BLD.shape[-1]), real_BL.reshape(-1)
    with jax.named_scope("route"):
        routing = route(x_TD, router_DE, real_T, per_token)
        statistics = over_batch(local_statistics(routing, real_T, jnp.int32(0)))
    with jax.named_scope("experts"):
        matrices = _whole(gate_Edf, 1), _whole(up_Edf, 1), _whole(down_Efd, 2)
        out_TD = few_tokens.experts(x_TD, *matrices, routing.ids_TC, routing.weights_TC)
        out_TD = lax.psum(out_TD, sharding.in_use(sharding.TENSOR))
    return out_TD.reshape(x_BLD.shape), statistics


def over_batch(statistics: RoutingStatistics) -> RoutingStatistics:
    """Those of the global batch, of each device's; inside shard_map."""
    over = sharding.in_use(*sharding.BATCH_AXES)
    return jax.tree.map(lambda s: lax.psum(s, over), statistics)


def _gathered(gate_edf, up_edf, down_efd, x_RD: jax.Array) -> list:
    """The experts' matrices, whole in D, for these rows: arrays, or lists if experts lie apart.

    Those in int8 stay so for few rows, or if they lie apart.
    """
    if isinstance(gate_edf, int8.Int8):
        down_eDf = int8.Int8(_whole(down_efd.values, 1), _whole(down_efd.scale, 1))
        into = (w._replace(values=_whole(w.values, 2)) for w in (gate_edf, up_edf))
        matrices = [*into, down_eDf]
        few = not isinstance(down_eDf.values, tuple) and x_RD.shape[0] <= int8.FEW
        return matrices if few else [_matrices(w, x_RD.dtype) for w in matrices]
    matrices = [_whole(gate_edf, 1), _whole(up_edf, 1), _whole(down_efd, 2)]
    if isinstance(gate_edf, tuple):
        return [[w_1Df[0] for w_1Df in of_all] for of_all in matrices]
    return matrices


def _matrices(w: int8.Int8, dtype: jnp.dtype) -> jax.Array | list[int8.Int8]:
    """Experts' matrices in int8 for what multiplies with them: one by one if they lie apart."""
    if isinstance(w.values, tuple):
        pairs = zip(w.values, w.scale, strict=True)
        return [int8.Int8(values_1FD[0], scale_1F[0]) for values_1FD, scale_1F in pairs]
    return int8.dequantize(w, dtype).swapaxes(1, 2)


def _whole(w, axis: int):
    """Expert matrices gathered in their model dimension, which is split over fsdp."""
    return jax.tree.map(lambda w: all_gather(w, sharding.FSDP, axis), w)
