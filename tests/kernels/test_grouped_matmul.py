import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from mixtral_jax.kernels import blocks
from mixtral_jax.kernels import grouped_matmul as module
from mixtral_jax.kernels.experts import experts
from mixtral_jax.kernels.grouped_matmul import PLATFORMS, grouped_matmul

D, F = 7, 5
ANYWHERE = [name for name, where in PLATFORMS.items() if "cpu" in where]


def expected(x_RD, w_EDF, sizes_E, g_RF):
    """Result and both gradients for an incoming gradient g_RF, one row after another."""
    out_RF, dx_RD, dw_EDF = np.zeros(g_RF.shape), np.zeros(x_RD.shape), np.zeros(w_EDF.shape)
    for row, expert in enumerate(np.repeat(np.arange(len(sizes_E)), sizes_E)):
        out_RF[row] = x_RD[row] @ w_EDF[expert]
        dx_RD[row] = w_EDF[expert] @ g_RF[row]
        dw_EDF[expert] += np.outer(x_RD[row], g_RF[row])
    return out_RF, dx_RD, dw_EDF


def operands(rows, experts, seed=0, width=D, hidden=F):
    rng = np.random.default_rng([rows, experts, seed])
    shapes = (rows, width), (experts, width, hidden), (rows, hidden)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@functools.cache
def compiled(implementation, block_rows):
    """Result and both gradients; compiled for one block size, which is read while tracing."""

    @jax.jit
    def run(x_RD, w_EDF, sizes_E, g_RF):
        def product(x_RD, w_EDF):
            return grouped_matmul(x_RD, w_EDF, sizes_E, implementation=implementation)

        out_RF, pull = jax.vjp(product, x_RD, w_EDF)
        return out_RF, *pull(g_RF)

    def call(x_RD, w_EDF, sizes_E, g_RF):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "STEP_ROWS", block_rows)
            return run(x_RD, w_EDF, jnp.asarray(sizes_E, jnp.int32), g_RF)

    return call


BODIES = [("ragged_dot", 64), ("blocks", 64), ("blocks", 4), ("blocks", 1)]
SIZES = {
    "even": [3, 3, 3, 3, 3],
    "uneven": [1, 9, 4, 2, 1],
    "full": [2, 5, 6, 1, 3],  # 17 rows: not one is left over
    "empty first": [0, 0, 5, 7, 1],
    "empty last": [8, 4, 0, 0, 0],
    "empty between": [4, 0, 4, 0, 8],
    "all to the first": [17, 0, 0, 0, 0],
    "all to the last": [0, 0, 0, 0, 17],
    "all to one between": [0, 0, 17, 0, 0],
    "one row": [0, 1, 0, 0, 0],
    "no row": [0, 0, 0, 0, 0],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("implementation", "block_rows"), BODIES)
def test_values_and_gradients_of_every_body(implementation, block_rows, sizes):
    x_RD, w_EDF, g_RF = operands(17, 5)
    out = compiled(implementation, block_rows)(x_RD, w_EDF, sizes, g_RF)
    oracle.close(out, expected(x_RD, w_EDF, sizes, g_RF), rel=1e-6)
    used = sum(sizes)
    assert not np.any(out[0][used:]), "rows past the last group must be zero"
    assert not np.any(out[1][used:]), "and so must their gradient"


@pytest.mark.parametrize("rows", [1, 3, 64, 65, 300, 1700])
def test_the_real_block_size(rows):
    """Fewer rows than a block, a block exactly, one more, and several blocks for one expert."""
    sizes = [rows // 3, 0, rows - rows // 3]
    x_RD, w_EDF, g_RF = operands(rows, 3)
    assert blocks.STEP_ROWS == 64
    out = compiled("blocks", 64)(x_RD, w_EDF, sizes, g_RF)
    oracle.close(out, expected(x_RD, w_EDF, sizes, g_RF), rel=2e-6)


def test_blocks_of_one_size_on_gpu(monkeypatch):
    """Some full, some of other experts' rows too, some moved up from past the end."""
    monkeypatch.setattr(blocks, "platform", lambda: "gpu")
    x_RD, w_EDF, g_RF = operands(17, 5)
    run = compiled.__wrapped__("blocks", 2)
    for sizes in SIZES.values():
        out = run(x_RD, w_EDF, sizes, g_RF)
        oracle.close(out, expected(x_RD, w_EDF, sizes, g_RF), rel=1e-6)
    assert [blocks._sizes(*n) for n in ((17, 5), (640, 8), (65536, 8))] == [[17], [128], [1024]]


@given(st.sampled_from([(11, 3), (13, 4), (6, 7)]), st.sampled_from([1, 2, 5]), st.data())
@settings(max_examples=150)
def test_any_sizes(shape, block_rows, data):
    rows, experts = shape
    cuts = data.draw(st.lists(st.integers(0, rows), min_size=experts, max_size=experts))
    sizes = np.diff(sorted(cuts), prepend=0)
    x_RD, w_EDF, g_RF = operands(rows, experts, seed=sum(cuts))
    out = compiled("blocks", block_rows)(x_RD, w_EDF, sizes, g_RF)
    oracle.close(out, expected(x_RD, w_EDF, sizes, g_RF), rel=2e-6)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_rows_past_the_last_group_are_not_read(implementation):
    """A receive buffer is sized for the worst case: what lies past the rows in use is arbitrary."""
    sizes = [2, 0, 3]
    x_RD, w_EDF, g_RF = operands(9, 3)
    out, dx_RD, dw_EDF = expected(x_RD, w_EDF, sizes, g_RF)
    x_RD[5:], g_RF[5:] = np.nan, np.nan
    actual = compiled(implementation, 4)(x_RD, w_EDF, sizes, g_RF)
    oracle.close(actual, (out, dx_RD, dw_EDF), rel=1e-6)


def test_what_the_kernel_leaves_past_the_last_group_is_not_seen(monkeypatch):
    """Kernels for accelerators may leave anything there, and multiply by zero what is there; no
    result and no gradient shows it, of SwiGLU neither."""
    sizes = [2, 0, 3]
    x_RD, w_EDF, g_RF = operands(9, 3)
    ragged_dot = jax.lax.ragged_dot

    def others(sizes_E):
        return jnp.arange(9)[:, None] >= sizes_E.sum()

    @jax.custom_vjp
    def leaves(out_RF, sizes_E):
        return jnp.where(others(sizes_E), jnp.nan, out_RF)

    def multiplied_by_zero(sizes_E, g_RF):
        return g_RF + 0 * jnp.where(others(sizes_E), g_RF, 0).sum(), None

    leaves.defvjp(lambda out_RF, sizes_E: (leaves(out_RF, sizes_E), sizes_E), multiplied_by_zero)

    def careless(x_RD, w_EDF, sizes_E, **options):
        return leaves(ragged_dot(x_RD, w_EDF, sizes_E, **options), sizes_E)

    def swiglu(gate_EDF, up_EDF):
        operands = x_RD, gate_EDF, up_EDF, w_EDF.swapaxes(1, 2), jnp.array(sizes, jnp.int32)
        out_RD, pull = jax.vjp(functools.partial(experts, implementation="ragged_dot"), *operands)
        in_use_R1 = jnp.arange(9)[:, None] < 5
        return jnp.where(in_use_R1, out_RD, 0), *pull(jnp.where(in_use_R1, x_RD, 0))[:4]

    wanted = jax.tree.map(np.asarray, swiglu(w_EDF, 2 * w_EDF))
    monkeypatch.setattr(module.lax, "ragged_dot", careless)
    actual = compiled.__wrapped__("ragged_dot", 64)(x_RD, w_EDF, sizes, g_RF)
    oracle.close(actual, expected(x_RD, w_EDF, sizes, g_RF), rel=1e-6)
    oracle.close(swiglu(w_EDF, 2 * w_EDF), wanted, rel=1e-6)


SHARED = {
    # mesh axes that the rows differ over, and those that the matrices differ over
    "matrices shared over data": (("data", "expert"), ("expert",)),
    "matrices shared by all": (("data", "expert"), ()),
    "rows shared over expert": (("data",), ("expert",)),
    "nothing shared": (("data", "expert"), ("data", "expert")),
}


@pytest.mark.parametrize("mesh", [(2, 1, 2, 1)], indirect=True, ids=["mesh"])
@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize(("row_axes", "matrix_axes"), SHARED.values(), ids=SHARED)
def test_operands_shared_between_devices(mesh, monkeypatch, implementation, row_axes, matrix_axes):
    """Inside shard_map the gradient of what devices share is the sum over those devices."""
    monkeypatch.setattr(blocks, "STEP_ROWS", 4)
    rng, every = np.random.default_rng(0), ("data", "expert")
    sizes_XE = np.array([[4, 0, 7], [0, 0, 11], [1, 1, 1], [0, 6, 0]])
    specs = [PartitionSpec(axes or None) for axes in (row_axes, matrix_axes, every)]
    parts = [2 ** len(axes) for axes in (row_axes, matrix_axes)]
    x_PRD = rng.normal(size=(parts[0], 11, D)).astype(np.float32)
    w_QEDF = rng.normal(size=(parts[1], 3, D, F)).astype(np.float32)
    g_XRF = rng.normal(size=(4, 11, F)).astype(np.float32)

    @jax.jit
    def run(x_PRD, w_QEDF, sizes_XE, g_XRF):
        @functools.partial(jax.shard_map, in_specs=(*specs, specs[2]), out_specs=specs[2])
        def product(x_1RD, w_1EDF, sizes_1E, _):
            out = grouped_matmul(x_1RD[0], w_1EDF[0], sizes_1E[0], implementation=implementation)
            return out[None]

        out, pull = jax.vjp(lambda x, w: product(x, w, sizes_XE, g_XRF), x_PRD, w_QEDF)
        return out, *pull(g_XRF)

    def place(array, spec):
        return jax.device_put(array, jax.NamedSharding(mesh, spec))

    args = (x_PRD, w_QEDF, sizes_XE.astype(np.int32), g_XRF)
    actual = run(*(place(a, s) for a, s in zip(args, (*specs, specs[2]))))

    out, dx, dw = np.zeros(g_XRF.shape), np.zeros(x_PRD.shape), np.zeros(w_QEDF.shape)
    for device in range(4):  # device = 2 * its place along data + its place along expert
        place = {(): 0, ("data",): device // 2, ("expert",): device % 2, every: device}
        p, q = place[row_axes], place[matrix_axes]
        o, a, b = expected(x_PRD[p], w_QEDF[q], sizes_XE[device], g_XRF[device])
        out[device] = o
        dx[p] += a
        dw[q] += b
    oracle.close(actual, (out, dx, dw), rel=1e-6)


@pytest.mark.parametrize("implementation", ANYWHERE)
def test_transposed_matrices(implementation):
    sizes = jnp.array([5, 0, 4], jnp.int32)
    x_RD, w_EDF, _ = operands(9, 3)
    product = functools.partial(grouped_matmul, implementation=implementation)
    actual = product(x_RD, w_EDF.swapaxes(1, 2), sizes, transposed=True)
    oracle.close(actual, product(x_RD, w_EDF, sizes), rel=1e-6)


def test_bfloat16_sums_in_float32():
    """The gradient of a matrix sums many blocks: in bfloat16, adding fours stalls at 1024."""
    rows = 1500
    ones = jnp.ones((rows, 3), jnp.bfloat16)
    weights = jnp.ones((2, 3, 5), jnp.bfloat16)
    g_RF = jnp.ones((rows, 5), jnp.bfloat16)
    out, dx, dw = compiled("blocks", 4)(ones, weights, [rows, 0], g_RF)
    assert {a.dtype for a in (out, dx, dw)} == {jnp.dtype("bfloat16")}
    np.testing.assert_allclose(np.float32(dw[0]), rows, rtol=2**-8)
    assert not dw[1].any()


def test_the_cpu_uses_blocks_and_an_unknown_body_is_named():
    x_RD, w_EDF, _ = operands(4, 3)
    sizes = jnp.array([1, 2, 1], jnp.int32)
    assert "ragged_dot" not in str(jax.make_jaxpr(grouped_matmul)(x_RD, w_EDF, sizes))
    with pytest.raises(ValueError, match=r"grouped_matmul='magic' is not one of .*blocks"):
        grouped_matmul(x_RD, w_EDF, sizes, implementation="magic")
