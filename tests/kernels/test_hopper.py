"""The kernels for Hopper, in Pallas's interpreter or on one: values, gradients, who gets them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.kernels import grouped_matmul as module
from mixtral_jax.kernels import hopper

interpreter = pytest.importorskip(
    "jax._src.pallas.mosaic_gpu.interpret.params", reason="this JAX keeps the interpreter elsewhere"
)
pytestmark = pytest.mark.gpu
ROWS, D, F = 256, 128, 256
ON_GPU = jax.default_backend() == "gpu"
OLD = jax.__version_info__ < (0, 11) and not ON_GPU
turns = pytest.mark.skipif(OLD, reason="the interpreter of this JAX transposes no operand")


def interpreted(**options):
    return interpreter.force_gpu_interpret_mode(interpreter.InterpretGPUParams(**options))


@pytest.fixture
def kernels(monkeypatch):
    """Interpreted where there is no GPU; on two multiprocessors, so that each has several tiles."""
    monkeypatch.setattr(hopper, "_multiprocessors", lambda: 2)
    with contextlib.nullcontext() if ON_GPU else interpreted():
        yield


def operands(experts, seed=0, width=D, hidden=F):
    rng = np.random.default_rng(seed)
    shapes = (ROWS, width), (experts, width, hidden), (ROWS, hidden)
    return [jnp.bfloat16(rng.normal(size=shape)) for shape in shapes]


def expected(x_RD, w_EDF, sizes_E, g_RF):
    x_RD, w_EDF, g_RF = (np.asarray(a, np.float64) for a in (x_RD, w_EDF, g_RF))
    out_RF, dx_RD, dw_EDF = np.zeros(g_RF.shape), np.zeros(x_RD.shape), np.zeros(w_EDF.shape)
    start = 0
    for expert, size in enumerate(sizes_E):
        own = slice(start, start := start + size)
        out_RF[own] = x_RD[own] @ w_EDF[expert]
        dx_RD[own] = g_RF[own] @ w_EDF[expert].T
        dw_EDF[expert] = x_RD[own].T @ g_RF[own]
    return out_RF, dx_RD, dw_EDF


def close(actual, wanted):
    """Sums are float32, results bfloat16."""
    actual = [np.asarray(a, np.float64) for a in actual]
    oracle.close(actual, [np.asarray(a) for a in wanted], rel=2**-8)


SIZES = {
    "between tiles": [100, 0, 29, 127],
    "tiles exactly": [128, 0, 128, 0],
    "a few rows, and the rest of no expert": [0, 1, 0, 66],
    "all to one": [0, 0, 256, 0],
    "no row": [0, 0, 0, 0],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_values(kernels, sizes):
    x_RD, w_EDF, g_RF = operands(4)
    used = sum(sizes)
    x_RD = x_RD.at[used:].set(jnp.nan)
    out_RF = hopper.grouped_matmul(x_RD, w_EDF, jnp.array(sizes, jnp.int32))
    assert out_RF.dtype == jnp.bfloat16
    wanted = expected(jnp.nan_to_num(x_RD), w_EDF, sizes, g_RF)[0]
    close([out_RF], [wanted])
    assert not np.any(out_RF[used:])


@turns
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_gradients(kernels, sizes):
    """Whatever lies past the last group, in the rows and in what comes back for them."""
    x_RD, w_EDF, g_RF = operands(4, width=256, hidden=128)
    wanted = expected(x_RD, w_EDF, sizes, g_RF)[1:]
    used = sum(sizes)
    x_RD, g_RF = (a.at[used:].set(jnp.nan) for a in (x_RD, g_RF))
    product = functools.partial(hopper.grouped_matmul, group_sizes_E=jnp.array(sizes, jnp.int32))
    _, pull = jax.vjp(lambda x, w: product(x, w), x_RD, w_EDF)
    actual = pull(g_RF)
    close(actual, wanted)
    assert not np.any(actual[0][used:])


@turns
def test_transposed_matrices(kernels):
    sizes = jnp.array([100, 0, 29, 70], jnp.int32)
    x_RD, w_EDF, g_RF = operands(4)
    x_RD = x_RD.at[199:].set(jnp.nan)
    turned = w_EDF.swapaxes(1, 2)
    out_RF, pull = jax.vjp(lambda x, w: hopper.grouped_matmul(x, w, sizes, True), x_RD, turned)
    dx_RD, dw_EFD = pull(g_RF)
    wanted = expected(jnp.nan_to_num(x_RD), w_EDF, sizes.tolist(), g_RF)
    close([out_RF, dx_RD, dw_EFD.swapaxes(1, 2)], wanted)


@turns
@pytest.mark.skipif(ON_GPU, reason="the interpreter looks for races")
def test_warpgroups_do_not_race(monkeypatch):
    """Of the kernel that also writes to its operands' tiles. (The interpreter takes each copy of
    the other one's stores for a group of its own, and so sees races that are none.)"""
    monkeypatch.setattr(hopper, "_multiprocessors", lambda: 1)
    x_RD, _, g_RF = operands(2)
    sizes = jnp.array([100, 100], jnp.int32)
    with interpreted(detect_races=True):
        actual = hopper.rows_times_rows(
            x_RD, jnp.where(jnp.arange(ROWS)[:, None] < 200, g_RF, 0), sizes
        )
    close([actual], [expected(x_RD, np.zeros((2, D, F)), [100, 100], g_RF)[2]])
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found


@given(st.lists(st.integers(0, 400), min_size=1, max_size=6), st.integers(0, 300))
def test_tiles_hold_each_row_once(sizes, unused):
    rows = -(-(sum(sizes) + unused) // hopper.ROWS) * hopper.ROWS or hopper.ROWS
    blocks = [np.asarray(a) for a in hopper.blocks_of(jnp.array(sizes, jnp.int32), rows)]
    owner = np.full(rows, -1)
    for expert, block, first, count in zip(*blocks):
        assert count == 0 or first + count <= hopper.ROWS
        start = block * hopper.ROWS + first
        assert (owner[start : start + count] == -1).all()
        owner[start : start + count] = expert
    wanted = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(owner, np.pad(wanted, (0, rows - sum(sizes)), constant_values=-1))


def test_the_grid_is_as_large_as_the_gpu_of_the_mesh(monkeypatch):
    h20 = jax.sharding.AbstractDevice(device_kind="NVIDIA H20", num_cores=78, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=h20)
    with jax.sharding.use_abstract_mesh(mesh):
        assert hopper._multiprocessors() == 78


# ---- which body --------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """A function that names the GPU there is."""
    monkeypatch.setattr(module, "platform", lambda: "gpu")
    return lambda kind: monkeypatch.setattr(module, "device_kind", lambda: kind)


@pytest.mark.parametrize(
    "kind", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H100 PCIe"]
)
def test_hopper_gpus_get_them_where_they_fit(gpu, kind):
    gpu(kind)
    assert module.resolve("", 256, 384, "bfloat16") == "hopper"
    for shape in ((256, 384, "float32"), (200, 384, "bfloat16"), (256, 64, "bfloat16")):
        assert module.resolve("", *shape) == "blocks"
        with pytest.raises(ValueError, match=r"^grouped_matmul=hopper wants an H100 or H200"):
            module.resolve("hopper", *shape)


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GB200"])
def test_others_do_not(gpu, kind):
    gpu(kind)
    assert module.resolve("", 256, 384, "bfloat16") == "blocks"
    with pytest.raises(ValueError, match=rf"^grouped_matmul=hopper wants .* not {kind}, 256 into"):
        module.resolve("hopper", 256, 384, "bfloat16")
