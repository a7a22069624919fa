import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from mixtral_jax import kernels, sharding


@pytest.mark.parametrize(
    ("backend", "name"), [("cpu", "cpu"), ("tpu", "tpu"), ("gpu", "gpu"), ("cuda", "gpu")]
)
def test_without_a_mesh_the_default_backend_decides(monkeypatch, backend, name):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert kernels.platform() == name


def test_the_mesh_decides_before_the_default_backend(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with jax.set_mesh(sharding.make_mesh(expert=2)):
        assert kernels.platform() == "cpu"
        assert jax.jit(lambda: jnp.int32(kernels.platform() == "cpu"))() == 1


@pytest.mark.parametrize("mesh", [(2, 1, 2, 1)], indirect=True, ids=["2x1x2x1"])
def test_vary_like_adds_what_is_missing_and_sums_its_gradient(mesh):
    def axes(x):
        return set(jax.typeof(x).manual_axis_type.varying)

    def device(x, y):
        assert axes(kernels.vary_like(x, x)) == axes(x) == {"data"}
        assert axes(kernels.vary_like(x, y)) == {"data", "expert"}
        return kernels.vary_like(x, y) * y

    by_data, by_both = PartitionSpec("data"), PartitionSpec(("data", "expert"))
    product = jax.shard_map(device, in_specs=(by_data, by_both), out_specs=by_both)
    x, y = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0, 5.0, 6.0])
    x = jax.device_put(x, jax.NamedSharding(mesh, by_data))
    y = jax.device_put(y, jax.NamedSharding(mesh, by_both))
    gradient = jax.jit(jax.grad(lambda x: product(x, y).sum()))(x)
    assert gradient.tolist() == [3.0 + 4.0, 5.0 + 6.0]
