import functools

import jax
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec

from mixtral_jax import sharding
from mixtral_jax.kernels import gather


@functools.cache
def run(size, axis, platform, check_vma):
    """What each device gets, and the gradient of its part when it weighs all that it got."""
    mesh = sharding.make_mesh(fsdp=size)
    spec = PartitionSpec(*["fsdp" if i == axis else None for i in range(3)])

    def device(x, g_X):
        whole, pull = jax.vjp(lambda x: gather.all_gather(x, "fsdp", axis), x)
        return whole[None], pull(g_X[0])[0]

    body = jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(spec, PartitionSpec("fsdp")),
        out_specs=(PartitionSpec("fsdp"), spec),
        check_vma=check_vma,
    )

    def call(x, g_X):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gather, "platform", lambda: platform)
            patch.setattr(gather, "STAGED_FROM", 8)
            placed = [
                jax.device_put(a, jax.NamedSharding(mesh, s))
                for a, s in ((x, spec), (g_X, PartitionSpec("fsdp")))
            ]
            jaxpr = str(jax.make_jaxpr(body)(*placed))
            return jax.jit(body)(*placed), jaxpr.count("all_gather[")

    return call


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(
    ("size", "platform", "stages"),
    [
        (1, "tpu", 0),
        (3, "cpu", 1),
        (8, "cpu", 1),
        (3, "tpu", 1),
        (8, "tpu", 2),
    ],
)
def test_parts_are_joined_in_order_and_their_gradients_summed(
    size, platform, stages, axis, check_vma
):
    rng, shape = np.random.default_rng(axis), [3, 5, 7]
    shape[axis] *= size
    x = rng.normal(size=shape).astype(np.float32)
    g_X = rng.normal(size=(size, *shape)).astype(np.float32)
    (whole_X, dx), gathers = run(size, axis, platform, check_vma)(x, g_X)
    np.testing.assert_array_equal(whole_X, np.broadcast_to(x, g_X.shape))
    oracle.close(dx, g_X.sum(axis=0, dtype=np.float64), rel=1e-6)
    assert gathers == stages
