"""The worked example of docs/design.md, number by number."""

import jax
import jax.numpy as jnp
import numpy as np

from mixtral_jax import sharding
from mixtral_jax.kernels import exchange
from mixtral_jax.model.moe import lay_out, rank_assignments

CHOICES = np.array([[[2, 0], [2, 3], [1, 2]], [[3, 2], [0, 2], [2, 1]]], np.int32)
NONE = -1


def one_device(ids_1TC):
    """What is sent, received (device 1's assignments plus 10) and where token 0's rows are."""
    ids_TC = ids_1TC[0]
    ranked = rank_assignments(ids_TC, 4, None)
    body = exchange.make("padded", sharding.EXPERT, 2, tokens=3, experts=4, per_token=2)
    plan = exchange.plan(body, ranked.wanted_E)
    dispatch = lay_out(ids_TC, ranked, plan, body.send_rows)
    name_S = dispatch.assignment_S + 10 * jax.lax.axis_index(sharding.EXPERT)
    sent_S = jnp.where(dispatch.assignment_S < 6, name_S, NONE)
    received_RD = exchange.send(body, plan, (sent_S[:, None] - NONE).astype(jnp.float32))
    out = (
        ranked.order_A,
        sent_S,
        received_RD[:, 0] + NONE,
        plan.group_sizes_e,
        dispatch.row_CT[:, 0],
    )
    return jax.tree.map(lambda a: a[None], out)


def test_the_worked_example():
    mesh = sharding.make_mesh(expert=2)
    by_device = jax.P(sharding.EXPERT)
    with jax.set_mesh(mesh):
        ids = jax.device_put(CHOICES, jax.NamedSharding(mesh, by_device))
        run = jax.shard_map(one_device, in_specs=by_device, out_specs=by_device)
        order, sent, received, sizes, token_0 = (np.asarray(a).tolist() for a in jax.jit(run)(ids))
    none = NONE
    assert order == [[3, 2, 0, 1, 5, 4], [1, 5, 2, 3, 4, 0]]
    assert sent == [
        [3, 2, none, none, none, none, 0, 1, 5, 4, none, none],
        [11, 15, none, none, none, none, 12, 13, 14, 10, none, none],
    ]
    assert received == [
        [3, 11, 2, 15] + 8 * [none],
        [0, 1, 5, 12, 13, 14, 4, 10] + 4 * [none],
    ]
    assert sizes == [[2, 2], [6, 2]]
    assert token_0[0] == [6, 0]
