"""Models into int8 while they are read: bit for bit those that are read and then quantised."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from harness import describe, parameter_bytes, place, plain, random_parameters
from whole import make_config

import mixtral_jax
from mixtral_jax import sharding
from mixtral_jax.interop import loading, models, quantizing
from mixtral_jax.kernels.int8 import quantize
from mixtral_jax.model.mixtral import abstract_state
from mixtral_jax.model.quantized import quantized

FORMS = ("orbax", "huggingface", "mistral")
MESHES = [(1, 1, 1, 1), (2, 1, 4, 1), (1, 2, 2, 2)]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def saved(request, tmp_path_factory):
    """(the model in int8, its folders)."""
    graphdef, state = abstract_state(make_config(param_dtype=request.param))
    drawn = random_parameters(state, seed=3)
    drawn = jax.tree.map(lambda a: a.astype(jnp.dtype(request.param)), drawn)
    model = nnx.merge(graphdef, place(drawn, sharding.make_mesh()))
    folder = tmp_path_factory.mktemp("saved")
    for form in FORMS:
        mixtral_jax.save_model(model, None, folder / form, form)
    return quantized(model), folder


def assert_same_bits(model, other):
    expected, got = (jax.tree.leaves_with_path(plain(nnx.state(m))) for m in (model, other))
    for (path, array), (other_path, other) in zip(expected, got, strict=True):
        assert path == other_path
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array.view(np.uint8), other.view(np.uint8), str(path))


@pytest.mark.parametrize("sizes", MESHES, ids=describe)
@pytest.mark.parametrize("form", FORMS)
def test_it_is_that_of_the_loaded_model(saved, form, sizes):
    expected, folder = saved
    got, _ = models.load_model(folder / form, sharding.make_mesh(*sizes), int8=True)
    assert_same_bits(expected, got)


def test_into_the_memory_of_accelerators(saved, monkeypatch):
    expected, folder = saved
    monkeypatch.setattr(loading, "make_buffer", loading.DeviceBuffer)
    got, _ = models.load_model(folder / "huggingface", sharding.make_mesh(1, 2, 2, 2), int8=True)
    assert_same_bits(expected, got)


def test_what_is_held_is_int8(saved, monkeypatch):
    """Buffers are all that is as large as the model."""
    expected, folder = saved
    made = []

    def make_buffer(share, dtype):
        made.append(int(np.prod(share.shape)) * dtype.itemsize)
        return loading.HostBuffer(share, dtype)

    monkeypatch.setattr(loading, "make_buffer", make_buffer)
    models.load_model(folder / "mistral", int8=True)
    assert sum(made) == parameter_bytes(expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_quantizing_in_blocks_is_that_of_the_kernel(dtype, monkeypatch):
    monkeypatch.setattr(quantizing, "BLOCK", 100)
    w = np.random.default_rng(0).normal(size=(7, 5, 6, 3)).astype(dtype)
    w[2, 3] = 0
    for actual, wanted in zip(quantizing.quantize(w, 2), quantize(w, (2, 3)), strict=True):
        assert actual.dtype == wanted.dtype
        np.testing.assert_array_equal(actual, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-37, 1.2e-36, 1.6e-36])
def test_what_no_scale_fits_is_that_of_the_kernel(value):
    """Not finite stays so; a scale that float32 holds with few bits, or none, is that of zeros."""
    w = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    w[1] = 0
    w[1, 2], w[3] = value, 0
    values, scale = quantizing.quantize(w, 1)
    for actual, wanted in zip((values, scale), quantize(jnp.asarray(w), (1,)), strict=True):
        np.testing.assert_array_equal(actual, wanted)
    assert np.isfinite(scale).tolist() == [True, bool(np.isfinite(value)), True, True]
    assert (scale[1] == 1, scale[3]) == (value < 1.5e-36, 1)


def test_no_format_holds_it(saved, tmp_path):
    for form in FORMS:
        with pytest.raises(ValueError, match="in int8, which no format holds"):
            mixtral_jax.save_model(saved[0], None, tmp_path / form, form)
