"""cuDNN's attention where no GPU is: its call's meaning, by XLA, and that it is lowered to."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.export import DisabledSafetyCheck

from mixtral_jax.kernels import attention as kernels
from mixtral_jax.kernels import cudnn

B, L, K, G, H = 2, 6, 3, 4, 8
SEGMENTS = {
    "packed": np.array([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 0, 0]]),
    "one document in a row": np.array([[1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 0, 0]]),
}
CALLS = [
    f"__cudnn$fmha{kind}{way}"
    for kind in ("ScaleBiasSoftmax", "Softmax")  # with a mask, and without
    for way in ("", "Backward")
]


def with_gradients(q_BLKGH, k_BLKH, v_BLKH, g_BLKGH, segments_BL, **options):
    body = functools.partial(cudnn.attention, segments_BL=segments_BL, **options)
    out, pull = jax.vjp(body, q_BLKGH, k_BLKH, v_BLKH)
    return out, *pull(g_BLKGH)


@pytest.mark.parametrize("segments_BL", SEGMENTS.values(), ids=SEGMENTS)
def test_values_and_gradients_of_packed_documents(segments_BL):
    rng = np.random.default_rng(0)
    q = (B, L, K, G, H)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in (q, q[:3] + q[4:])]
    arrays += [rng.normal(size=a.shape).astype(np.float32) for a in arrays[::-1]]  # v and g
    padding_BL = segments_BL == 0
    arrays[3][padding_BL] = 0  # nobody looks at it
    allowed_BLS = oracle.may_see(segments_BL)
    allowed_BLS |= np.tril(padding_BL[:, :, None] & padding_BL[:, None])  # the oracle forbids it

    def weighted(q, k, v, g):
        return (oracle.attend(q, k, v, allowed_BLS) * g).sum()

    wide = [np.asarray(a, np.float64) for a in arrays]
    expected = oracle.attend(*wide[:3], allowed_BLS), *oracle.gradient(weighted, (0, 1, 2))(*wide)
    run = jax.jit(functools.partial(with_gradients, implementation="xla"))
    out_BLKGH, *gradients = run(*arrays, jnp.asarray(segments_BL))
    real = [np.where(padding_BL[..., None, None, None], 0, a) for a in (out_BLKGH, expected[0])]
    oracle.close((real[0], *gradients), (real[1], *expected[1:]), rel=2e-6)


def test_a_row_of_one_document_needs_no_mask():
    packed, whole = (jnp.asarray(segments_BL) for segments_BL in SEGMENTS.values())
    assert cudnn.one_document(whole)
    assert not cudnn.one_document(packed)
    assert not cudnn.one_document(jnp.array([[1, 1, 0, 1]]))  # it would see the padding before it


@pytest.fixture
def cudnn_is_there(monkeypatch):
    """As far as tracing and lowering ask; nothing can run."""
    versions = types.SimpleNamespace(cudnn_get_version=lambda: 91002)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", versions)


def shapes():
    q, k = ((B, L, K, G, H), (B, L, K, H))
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q, k, k, q)]


def test_it_is_lowered_to_cudnn(cudnn_is_there):
    segments = jax.ShapeDtypeStruct((B, L), jnp.int32)
    allowed = [DisabledSafetyCheck.custom_call(name) for name in CALLS]
    lower = jax.export.export(jax.jit(with_gradients), platforms=["cuda"], disabled_checks=allowed)
    text = lower(*shapes(), segments).mlir_module()
    assert sorted(re.findall(r"custom_call @(\S+)\(", text)) == sorted(CALLS)
    assert "CAUSAL" in text
    assert f"tensor<{B}x{L}x{K * G}x{H}xbf16>" in text  # query heads as they are, and ...
    assert f"tensor<{B}x{K * G}x{L}x{L}x" not in text  # ... no scores


@pytest.mark.parametrize(("keep", "times"), [(True, 2), (False, 4)])  # with a mask, and without
def test_a_policy_keeps_what_the_backward_pass_wants(cudnn_is_there, keep, times):
    policy = cudnn.kept if keep else jax.checkpoint_policies.nothing_saveable

    def loss(q, k, v):
        return cudnn.attention(2 * q, k, v, jnp.ones((B, L), jnp.int32)).astype(float).sum()

    gradient = jax.grad(jax.checkpoint(loss, policy=policy))
    text = str(jax.make_jaxpr(gradient)(*shapes()[:3]))
    assert len(re.findall(cudnn.FORWARD, text)) == times


# ---- which body --------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(cudnn, "installed", lambda: True)


@pytest.mark.parametrize(
    ("length", "head", "dtype", "body"),
    [
        (6, 8, "bfloat16", "cudnn"),
        (4096, 128, "float16", "cudnn"),
        (6, 8, "float32", "xla"),
        (7, 8, "bfloat16", "xla"),
        (6, 12, "bfloat16", "xla"),
        (6, 256, "bfloat16", "xla"),
    ],
)
def test_gpus_use_cudnn_where_it_fits(gpu, monkeypatch, length, head, dtype, body):
    assert kernels.resolve("", length, head, dtype) == body
    assert kernels.resolve("xla", length, head, dtype) == "xla"
    if body == "xla":
        with pytest.raises(
            ValueError, match=rf"^attention=cudnn wants .*{length}, {head} and {dtype}"
        ):
            kernels.resolve("cudnn", length, head, dtype)
    else:
        assert kernels.resolve("cudnn", length, head, dtype) == "cudnn"
    monkeypatch.setattr(cudnn, "installed", lambda: False)
    assert kernels.resolve("", length, head, dtype) == "xla"


def test_cudnn_is_for_gpus():
    with pytest.raises(ValueError, match=r"^attention=cudnn does not run on cpu \(only on gpu\)"):
        kernels.resolve("cudnn", 6, 8, jnp.bfloat16)
