"""JAX's splash kernel, in interpret mode, against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from mixtral_jax import kernels
from mixtral_jax.kernels import splash
from mixtral_jax.kernels.attention import resolve

B, K, G, H = 2, 2, 3, 128


def packed(length, ends):
    """Segments 1, 2, ... of a row that end where `ends` says, then padding."""
    return np.searchsorted(ends, np.arange(length), side="right") + 1


def weighted(q_BLKGH, k_BLKH, v_BLKH, g_BLKGH, allowed_BLS):
    return (oracle.attend(q_BLKGH, k_BLKH, v_BLKH, allowed_BLS) * g_BLKGH).sum()


@pytest.mark.parametrize(
    ("length", "blocks", "fused"),
    [(128, (128,), 8), (384, (128,), 8), (384, (128,), 2), (384, (256, 128), 1)],
    ids=["one block", "three", "two kernels backward", "and padded"],
)
def test_values_and_gradients_of_packed_documents(monkeypatch, length, blocks, fused):
    """Documents that end inside a block, at its edge, and one that is a single token."""
    monkeypatch.setattr(splash, "BLOCKS", blocks)
    monkeypatch.setattr(splash, "FUSED", fused)
    rng = np.random.default_rng(length)
    segments_BL = np.stack([packed(length, [1, 50, 128]), packed(length, [length])])
    shapes = (B, length, K, G, H), (B, length, K, H), (B, length, K, H), (B, length, K, G, H)
    q, k, v, g = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    monkeypatch.setattr(kernels, "interpret", lambda: True)
    out, pull = jax.jit(jax.vjp, static_argnums=0)(
        lambda q, k, v: splash.attention(q, k, v, jnp.asarray(segments_BL)), q, k, v
    )
    arrays64 = [a.astype(np.float64) for a in (q, k, v, g)]
    allowed_BLS = oracle.may_see(segments_BL)
    wanted = oracle.attend(*arrays64[:3], allowed_BLS)
    gradients = oracle.gradient(weighted, (0, 1, 2))(*arrays64, allowed_BLS)
    oracle.close((out, *pull(g)), (wanted, *gradients), rel=1e-5)


def test_blocks_are_few_or_large():
    lengths = (128, 640, 1152, 4096, 4224, 8192, 16384, 32640)
    found = [splash.blocks(length) for length in lengths]
    sizes = [(128, 1), (128, 5), (256, 5), (1024, 4), (1024, 5), (1024, 8), (1024, 16), (1024, 32)]
    assert found == sizes
    assert [cut.fused for cut in found] == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("platform", "asked", "length", "head", "body"),
    [
        ("tpu", None, 4096, 128, "splash"),
        ("tpu", "", 4096, 64, "xla"),
        ("tpu", "", 100, 128, "xla"),
        ("tpu", "xla", 4096, 128, "xla"),
        ("cpu", "", 4096, 128, "chunks"),
    ],
)
def test_the_best_body_of_each_platform_and_shape(monkeypatch, platform, asked, length, head, body):
    monkeypatch.setattr("mixtral_jax.kernels.attention.platform", lambda: platform)
    assert resolve(asked, length, head, "float32") == body


@pytest.mark.parametrize(
    ("platform", "asked", "length", "words"),
    [
        ("cpu", "splash", 128, ["attention=splash does not run on cpu", "tpu", "use xla"]),
        ("tpu", "splash", 100, ["attention=splash", "multiples of 128", "100", "use xla"]),
        ("tpu", "flash", 128, ["attention='flash' is not one of"]),
    ],
)
def test_a_body_that_cannot_run_is_refused_in_one_line(monkeypatch, platform, asked, length, words):
    monkeypatch.setattr("mixtral_jax.kernels.attention.platform", lambda: platform)
    with pytest.raises(ValueError, match=r"^.+$") as error:
        resolve(asked, length, 128, "float32")
    assert all(word in str(error.value) for word in words), error.value
