"""The experts' fused SwiGLU for CPU against plain NumPy, alone and inside shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec

from mixtral_jax.kernels import blocks
from mixtral_jax.kernels.experts import experts
from mixtral_jax.kernels.swiglu_blocks import swiglu_blocks

D, F = 7, 5


def expected(x_RD, gate_EDF, up_EDF, down_EFD, sizes_E, g_RD):
    """Result and the gradients of all but the sizes, one row after another, in float64."""
    out, dx = np.zeros(x_RD.shape), np.zeros(x_RD.shape)
    d_gate, d_up, d_down = (np.zeros(w.shape) for w in (gate_EDF, up_EDF, down_EFD))
    for row, e in enumerate(np.repeat(np.arange(len(sizes_E)), sizes_E)):
        x, g = x_RD[row].astype(np.float64), g_RD[row]
        gate, up = x @ gate_EDF[e], x @ up_EDF[e]
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden = gate * sigmoid * up
        out[row] = hidden @ down_EFD[e]
        d_hidden = down_EFD[e] @ g
        d_gate_F = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
        d_up_F = d_hidden * gate * sigmoid
        dx[row] = gate_EDF[e] @ d_gate_F + up_EDF[e] @ d_up_F
        d_gate[e] += np.outer(x, d_gate_F)
        d_up[e] += np.outer(x, d_up_F)
        d_down[e] += np.outer(hidden, g)
    return out, dx, d_gate, d_up, d_down


def operands(rows, count, lead=((), ())):
    """x, gate, up, down and an incoming gradient; lead: dimensions before rows and matrices."""
    rng = np.random.default_rng([rows, count])
    shapes = [(rows, D), (count, D, F), (count, D, F), (count, F, D), (rows, D)]
    leads = [lead[0], lead[1], lead[1], lead[1], lead[0]]
    return [rng.normal(size=(*a, *b)).astype(np.float32) for a, b in zip(leads, shapes)]


@functools.cache
def compiled(implementation):
    @jax.jit
    def run(x, gate, up, down, sizes, g):
        def product(*arrays):
            return experts(*arrays, sizes, implementation=implementation)

        out, pull = jax.vjp(product, x, gate, up, down)
        return out, *pull(g)

    return run


@pytest.mark.parametrize("implementation", ["blocks", "ragged_dot"])
@pytest.mark.parametrize(
    "sizes", [[4, 0, 7, 1], [0, 0, 12, 0], [0, 5, 0, 0], [0, 0, 0, 0]], ids=str
)
def test_values_and_gradients(monkeypatch, implementation, sizes):
    """One block and several an expert (of 1 to 8 rows), experts and rows that nobody uses."""
    monkeypatch.setattr(blocks, "STEP_ROWS", 1)
    *arrays, g_RD = operands(12, 4)
    used = sum(sizes)
    arrays[0][used:], g_RD[used:] = 1e4, 1e4
    actual = compiled(implementation)(*arrays, np.int32(sizes), g_RD)
    oracle.close(actual, expected(*arrays, sizes, g_RD), rel=2e-6)
    assert not np.any(actual[0][used:]), "rows past the last group must be zero"
    assert not np.any(actual[1][used:]), "and so must their gradient"


def test_rows_past_the_last_group_are_not_read():
    *arrays, g_RD = operands(90, 2)
    sizes = [5, 66]
    wanted = expected(*arrays, sizes, g_RD)
    arrays[0][71:], g_RD[71:] = np.nan, np.nan
    oracle.close(compiled("blocks")(*arrays, np.int32(sizes), g_RD), wanted, rel=2e-6)


def test_what_is_not_finite_stays_with_its_expert():
    """Though it lies in a block of another's rows."""
    *arrays, g_RD = operands(90, 2)
    sizes = [5, 66]
    wanted = expected(*arrays, sizes, g_RD)[2:]
    arrays[0][10] = np.nan
    actual = compiled("blocks")(*arrays, np.int32(sizes), g_RD)[2:]
    oracle.close([w[0] for w in actual], [w[0] for w in wanted], rel=2e-6)
    assert all(np.isnan(w[1]).any() for w in actual)


@pytest.mark.parametrize("mesh", [(2, 1, 1, 2)], indirect=True, ids=["mesh"])
def test_operands_shared_between_devices(mesh):
    """Rows differ over data, matrices over tensor: gradients are summed over the other axis."""
    sizes = np.int32([3, 0, 2])
    x, gate, up, down, _ = operands(6, 3, lead=((2,), (2,)))
    g = np.random.default_rng(1).normal(size=(2, 2, 6, D)).astype(np.float32)
    rows, matrices = PartitionSpec("data"), PartitionSpec("tensor")
    both, shared = PartitionSpec("data", "tensor"), PartitionSpec()

    @jax.jit
    def run(x, gate, up, down, sizes, g):
        @functools.partial(
            jax.shard_map, in_specs=(shared, rows, matrices, matrices, matrices), out_specs=both
        )
        def product(sizes, *arrays):
            return swiglu_blocks(*(a[0] for a in arrays), sizes)[None, None]

        out, pull = jax.vjp(functools.partial(product, sizes), x, gate, up, down)
        return out, *pull(g)

    specs = (rows, matrices, matrices, matrices, shared, both)
    arrays = (x, gate, up, down, sizes, g)
    placed = [jax.device_put(a, jax.NamedSharding(mesh, s)) for a, s in zip(arrays, specs)]
    actual = run(*placed)
    wanted = [np.zeros((2, 2, 6, D)), *(np.zeros(a.shape) for a in (x, gate, up, down))]
    for d in range(2):
        for t in range(2):
            out, dx, *dw = expected(x[d], gate[t], up[t], down[t], sizes, g[d, t])
            wanted[0][d, t] = out
            wanted[1][d] += dx
            for total, part in zip(wanted[2:], dw):
                total[t] += part
    oracle.close(actual, tuple(wanted), rel=2e-6)


def test_bfloat16_is_rounded_where_it_is_multiplied_only():
    """Within two roundings, each of 2^-9, of what float64 makes of the same numbers."""
    sizes = [70, 0, 21]
    *arrays, g_RD = (jnp.asarray(a, jnp.bfloat16) for a in operands(91, 3))
    actual = compiled("blocks")(*arrays, np.int32(sizes), g_RD)
    assert all(a.dtype == jnp.bfloat16 for a in actual)
    wanted = expected(*(np.float64(a) for a in arrays), sizes, np.float64(g_RD))
    oracle.close(actual, wanted, rel=2**-8)


def test_bfloat16_sums_in_float32():
    """The gradient of a matrix sums many blocks: in bfloat16, adding to 1024 stalls."""
    rows, ones = 1500, jnp.bfloat16(1)
    x_RD, g_RD = jnp.full((rows, D), ones), jnp.full((rows, D), ones)
    gate, up, down = (jnp.full(s, ones / 4) for s in [(2, D, F), (2, D, F), (2, F, D)])
    _, _, _, _, d_down = compiled("blocks")(x_RD, gate, up, down, np.int32([rows, 0]), g_RD)
    assert d_down.dtype == jnp.bfloat16
    hidden = 1.75 * 1.75 / (1 + np.exp(-1.75))
    np.testing.assert_allclose(np.float32(d_down[0]), rows * hidden, rtol=2**-6)
    assert not d_down[1].any()


def test_float32_matrices_of_bfloat16_rows_have_float32_gradients():
    """Not rounded to bfloat16 on the way; everything else as with matrices in bfloat16."""
    rows, ones = 513, jnp.bfloat16(1)
    x_RD, g_RD = jnp.full((rows, D), ones), jnp.full((rows, D), ones)
    matrices = [np.ones(s, np.float32) for s in [(2, D, F), (2, D, F), (2, F, D)]]
    out, dx, *grads = compiled("blocks")(x_RD, *matrices, np.int32([rows, 0]), g_RD)
    assert [a.dtype for a in (out, dx, *grads)] == [jnp.bfloat16] * 2 + [jnp.float32] * 3
    rounded = compiled("blocks")(x_RD, *map(jnp.bfloat16, matrices), np.int32([rows, 0]), g_RD)
    oracle.close((out, dx), rounded[:2], rel=0)
    for wide, narrow in zip(grads, rounded[2:], strict=True):
        np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)
    assert grads[2][0, 0, 0] != rounded[4][0, 0, 0]
