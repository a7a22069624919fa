"""Prefill and decode compile for a slice of TPUs, with none at hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import NamedSharding
from tiny import MODEL

from mixtral_jax import sharding
from mixtral_jax.generation.engine import Rows, programs
from mixtral_jax.generation.sampling import Parameters
from mixtral_jax.model.mixtral import abstract_state

pytestmark = pytest.mark.tpu_compile
BATCH, LENGTH, SLOTS = 8, 16, 48


@pytest.fixture(scope="module")
def tpu_mesh():
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    devices = topologies.get_topology_desc("v5p:2x2x2", platform="tpu").devices
    return sharding.make_mesh(expert=4, tensor=2, devices=devices)


def test_prefill_and_decode_compile_for_tpu(tpu_mesh):
    graphdef, state = abstract_state(MODEL)
    shardings = sharding.param_shardings(state, tpu_mesh)
    params = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
    )

    def batch(dtype, *shape):
        where = NamedSharding(tpu_mesh, sharding.spec("batch"))
        return jax.ShapeDtypeStruct((BATCH, *shape), dtype, sharding=where)

    whole, real = batch(jnp.int32), batch(jnp.float32)
    rows = Rows(whole, whole, batch(jnp.uint32), Parameters(real, whole, *[real] * 5))
    tokens = batch(jnp.int32, LENGTH)
    prefill, decode = programs(graphdef, 2)
    with jax.set_mesh(tpu_mesh):
        lowered = prefill.lower(params, tokens, rows, slots=SLOTS)
        progress, _ = jax.eval_shape(partial(prefill, slots=SLOTS), params, tokens, rows)
        lowered.compile()
        lowered = decode.lower(params, progress, rows)
        compiled = lowered.compile()
    assert "ragged_all_to_all" in lowered.as_text()
    cache = progress.cache.k_BSKH
    assert cache.shape == (2, BATCH, SLOTS, 2, 6)
    assert cache.dtype == jnp.bfloat16
    assert cache.sharding.spec == sharding.spec("layers", "batch", None, "heads", None)
    # The cache, its largest argument, is updated in place.
    per_device = 2 * cache.size * cache.dtype.itemsize // tpu_mesh.size
    assert compiled.memory_analysis().alias_size_in_bytes >= per_device
