"""What stands before a layer's attention and before its experts, of a few tokens, for GPU.

Kernels of the kind of few_rows, with a program for each token: it adds up the parts of a product,
adds the product to the residual stream, and normalises the sum; before the experts it routes too.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from mixtral_jax.kernels import few_rows
from mixtral_jax.kernels.few_rows import Tiles, call, triton, whole

TILES = Tiles(0, 0, warps=16, stages=1)
LARGEST = 2**16
"""Numbers that a program holds at most, of the router's matrix."""


class Routed(NamedTuple):
    """As model.router.route has it."""

    ids_TC: jax.Array
    weights_TC: jax.Array
    logits_TE: jax.Array


def fits(tokens: int, width: int, experts: int, dtype: jnp.dtype) -> bool:
    """Whether the kernels run here, on so many tokens and a router [width, experts]."""
    size = pl.next_power_of_2(width) * pl.next_power_of_2(experts)
    return size <= LARGEST and few_rows.fits(tokens, dtype, width)


def add_norm(
    x_TD: jax.Array, parts_PTD: jax.Array | None, scale_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """(new, normed): new = x + the sum of the parts, and its RMSNorm as model.layers has it.

    Args:
      parts_PTD: float32; None for nothing to add.
    Returns:
      Arrays of the shape and the type of x. The sum of the parts is rounded to it before it is
      added, and the norm before it is scaled.
    """
    new_TD, normed_TD, _ = _call(x_TD, parts_PTD, scale_D, eps, None, 0)
    return new_TD, normed_TD


def add_norm_route(
    x_TD: jax.Array,
    parts_PTD: jax.Array,
    scale_D: jax.Array,
    eps: float,
    router_DE: jax.Array,
    real_T: jax.Array,
    per_token: int,
) -> tuple[jax.Array, jax.Array, Routed]:
    """add_norm, and the routing of the normed tokens: model.router.route, in float32.

    Args:
      real_T: false for padding, which gets E for its experts.
    """
    routing = (real_T.astype(jnp.int32), router_DE)
    return _call(x_TD, parts_PTD, scale_D, eps, routing, per_token)


def _call(x_TD, parts_PTD, scale_D, eps: float, routing, per_token: int):
    """(new_TD, normed_TD, Routed or None): routing is (real_T, router_DE) or None."""
    (tokens, width), block = x_TD.shape, pl.next_power_of_2(x_TD.shape[1])

    def kernel(x_ref, parts_ref, scale_ref, routing_refs, new_ref, normed_ref, routed_refs):
        in_use_D = jnp.arange(block) < width
        x_D, scale_D = (triton.load(ref, mask=in_use_D, other=0) for ref in (x_ref, scale_ref))
        if routing:
            real_ref, router_ref = routing_refs
            router_DE = _matrix(router_ref, in_use_D, experts)  # read first, waited for last
        if parts_ref is not None:
            x_D = _added(x_D, parts_ref, in_use_D)
        normed_D = _normed(x_D, scale_D, width, eps)
        triton.store(new_ref, x_D, mask=in_use_D)
        triton.store(normed_ref, normed_D, mask=in_use_D)
        if routing:
            real = real_ref[pl.program_id(0)] != 0
            _route(normed_D, router_DE, experts, real, per_token, routed_refs)

    def of_token(size: int):
        return pl.BlockSpec((None, pl.next_power_of_2(size)), lambda t: (t, 0))

    of_parts = of_routing = of_routed = routed = None
    if parts_PTD is not None:
        of_parts = pl.BlockSpec((parts_PTD.shape[0], None, block), lambda t: (0, t, 0))
    if routing:
        experts = routing[1].shape[1]
        of_routing = (whole(tokens), whole(block, pl.next_power_of_2(experts)))
        sizes = Routed(per_token, per_token, experts)
        of_routed = Routed(*map(of_token, sizes))
        types = Routed(jnp.int32, jnp.float32, jnp.float32)
        routed = jax.tree.map(lambda n, t: jax.ShapeDtypeStruct((tokens, n), t), sizes, types)
    like_x = jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype)
    return call(
        kernel,
        "few_norms_route" if routing else "few_norms",
        TILES,
        (tokens,),
        (of_token(width), of_parts, whole(block), of_routing),
        (of_token(width), of_token(width), of_routed),
        (like_x, like_x, routed),
    )(x_TD, parts_PTD, scale_D, routing)


# ---- inside the kernel, where all is of one token ----------------------------------------------


def _added(x_D, parts_ref, in_use_D):
    sum_D = jnp.zeros(x_D.shape, jnp.float32)
    for part in range(parts_ref.shape[0]):
        sum_D += triton.load(parts_ref.at[jnp.int32(part)], mask=in_use_D, other=0)
    return _narrow(x_D.astype(jnp.float32) + _narrow(sum_D, x_D), x_D)


def _normed(x_D, scale_D, width: int, eps: float):
    wide_D = x_D.astype(jnp.float32)
    factor = lax.rsqrt((wide_D * wide_D).sum() / width + eps)
    return _narrow(_narrow(wide_D * factor, x_D).astype(jnp.float32) * scale_D, x_D)


def _narrow(wide_D, like):
    return wide_D.astype(like.dtype)


def _matrix(router_ref, in_use_D, experts: int):
    in_use_E = jnp.arange(router_ref.shape[1]) < experts
    return triton.load(router_ref, mask=in_use_D[:, None] & in_use_E[None], other=0)


def _route(normed_D, router_DE, experts: int, real, per_token: int, refs: Routed):
    numbers_E = jnp.arange(router_DE.shape[1])
    numbers_C = jnp.arange(pl.next_power_of_2(per_token))
    products_DE = normed_D.astype(jnp.float32)[:, None] * router_DE.astype(jnp.float32)
    logits_E = products_DE.sum(axis=0)
    triton.store(refs.logits_TE, logits_E, mask=numbers_E < experts)
    left_E = jnp.where(numbers_E < experts, logits_E, -jnp.inf)
    ids_C = jnp.zeros(numbers_C.shape, jnp.int32)
    chosen_C = jnp.full(numbers_C.shape, -jnp.inf, jnp.float32)
    for choice in range(per_token):
        most = left_E.max()
        expert = jnp.where(left_E == most, numbers_E, experts).min()  # the first of equals
        ids_C = jnp.where(numbers_C == choice, expert, ids_C)
        chosen_C = jnp.where(numbers_C == choice, most, chosen_C)
        left_E = jnp.where(numbers_E == expert, -jnp.inf, left_E)
    powers_C = jnp.exp(chosen_C - chosen_C.max())
    ids_C = jnp.where(real, ids_C, experts)
    triton.store(refs.ids_TC, ids_C, mask=numbers_C < per_token)
    triton.store(refs.weights_TC, powers_C / powers_C.sum(), mask=numbers_C < per_token)
