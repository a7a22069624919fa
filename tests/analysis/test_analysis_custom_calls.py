"""Kernels in compiled programs: what the compiler makes of them, and what is put right."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from mixtral_jax.analysis import custom_calls, prices, topology
from mixtral_jax.analysis.chips import CHIPS
from mixtral_jax.kernels import megablox, splash

compiles = pytest.mark.tpu_compile
BATCH, LENGTH, KV_HEADS, GROUPS, HEAD = 2, 384, 2, 3, 128
ROWS, WIDTH, HIDDEN, EXPERTS = 8192, 1024, 2048, 2


@pytest.fixture(scope="module")
def target():
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")
    return topology.get_slice("v5p:2x2x1")


def price_alone(target, body, *shapes, share=1.0):
    """The price of what each of four devices does alone."""
    mesh = jax.make_mesh((4,), ("all",), devices=target.devices)
    whole = NamedSharding(mesh, PartitionSpec())
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]
    alone = jax.shard_map(
        body, mesh=mesh, in_specs=whole.spec, out_specs=whole.spec, check_vma=False
    )
    compiled = jax.jit(alone).lower(*inputs).compile(compiler_options=prices.PRICED_WITH)
    return prices.price_of(compiled, mesh, target, share)


@compiles
@pytest.mark.parametrize(("fused", "backward"), [(3, 5), (2, 3 + 4)])
def test_attention_is_priced_as_nothing_and_its_arithmetic_is_added(
    target, optimized, monkeypatch, fused, backward
):
    monkeypatch.setattr(splash, "BLOCKS", (128,))
    monkeypatch.setattr(splash, "FUSED", fused)

    def both_ways(q, k, v, segments, g):
        _, back = jax.vjp(lambda q, k, v: splash.attention(q, k, v, segments), q, k, v)
        return back(g)

    queries = ((BATCH, LENGTH, KV_HEADS, GROUPS, HEAD), jnp.bfloat16)
    keys = ((BATCH, LENGTH, KV_HEADS, HEAD), jnp.bfloat16)
    segments = ((BATCH, LENGTH), jnp.int32)
    found = price_alone(target, both_ways, queries, keys, keys, segments, queries)
    # Of 3 x 3 blocks of 128, six are computed, forward for two products.
    product = 2 * BATCH * KV_HEADS * GROUPS * LENGTH**2 * HEAD
    assert found.unpriced.flops == pytest.approx((2 + backward) * product * 6 / 9)
    assert found.unpriced.seconds == pytest.approx(found.unpriced.flops / (0.5 * 459e12))
    assert found.compiled.flops < product / 4
    assert found.surplus == (0, 0, 0)


@compiles
def test_the_surplus_is_what_the_compiler_asks_for_more_rows(target, optimized):
    def price_of_rows(rows, share):
        matrices, sizes = ((EXPERTS, WIDTH, HIDDEN), jnp.bfloat16), ((EXPERTS,), jnp.int32)
        given = ((rows, WIDTH), jnp.bfloat16), matrices, sizes
        return price_alone(target, megablox.grouped_matmul, *given, share=share)

    whole, half = price_of_rows(ROWS, 0.5), price_of_rows(ROWS // 2, 1.0)
    assert half.surplus == (0, 0, 0)
    assert whole.surplus.flops == ROWS * WIDTH * HIDDEN
    more = whole.compiled.seconds - half.compiled.seconds
    masking = 2 * (ROWS // 2) * HIDDEN * 2 / target.chip.priced_bytes  # of rows not in use: stays
    assert whole.surplus.seconds == pytest.approx(more - masking, rel=0.02)
    assert whole.unpriced == (0, 0, 0)


PROGRAM = """
  %gmm.10 = bf16[40,384]{1,0:T(8,128)} custom-call(%a, /*index=5*/%x, %w), custom_call_target="tpu_custom_call", operand_layout_constraints={s32[], s32[5]{0}, bf16[40,256]{1,0}, bf16[4,256,384]{2,1,0}}, frontend_attributes={kernel_metadata={}}, backend_config={"custom_call_config":{"body":"bf16[7]","cost_estimate":{"flops":"800","transcendentals":"0","bytes_accessed":"90","remote_bytes_transferred":"0"}}}
  ROOT %transpose_jvp_jit_tgmm___.6 = bf16[4,384,256]{2,1,0} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[40,384]{1,0}}, backend_config={"cost_estimate":{"flops":"600","transcendentals":"0","bytes_accessed":"900"}}
  %other.1 = f32[3]{0} custom-call(%x), custom_call_target="tpu_custom_call", operand_layout_constraints={f32[3]{0}}, backend_config={"cost_estimate":{"flops":"77","transcendentals":"0","bytes_accessed":"9"}}
  %splash_mha_fwd_segmented_residuals.3 = (f32[2,512,128]{2,1,0}, bf16[2,4,512,128]{3,2,1,0}) custom-call(%c, %d, %q), custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,4,4]{2,1,0}, s8[1,4,4]{2,1,0}, bf16[2,3,512,128]{3,2,1,0}, bf16[2,1,512,128]{3,2,1,0}}, frontend_attributes={kernel_metadata={
  %custom-call.4 = bf16[2,8]{1,0} custom-call(%s, %t), custom_call_target="ConcatBitcast"
  %custom-call.5 = u32[4]{0:T(128)} custom-call(), custom_call_target="AllocateBuffer", backend_config={}
"""  # noqa: E501


def test_calls_are_read_from_a_program():
    calls = custom_calls.read_calls(PROGRAM)
    assert [(c.name, c.flops, c.bytes) for c in calls] == [
        ("gmm", 800, 90),
        ("transpose_jvp_jit_tgmm___", 600, 900),
        ("other", 77, 9),
        ("splash_mha_fwd_segmented_residuals", 0, 0),
    ]
    assert custom_calls.missing_seconds(PROGRAM) == 1
    assert calls[0].operands == ((), (5,), (40, 256), (4, 256, 384))


def test_surplus_of_grouped_products_alone():
    chip = CHIPS["v5p"]
    found = custom_calls.surplus(custom_calls.read_calls(PROGRAM), 0.25, chip)
    assert found.flops == 0.75 * 1400
    assert found.bytes == 0.75 * 990
    # By arithmetic the one, by memory traffic the other: whichever takes longer.
    assert found.seconds == pytest.approx(0.75 * (90 / 2350e9 + 900 / 2350e9))


def test_few_rows_read_once_the_matrices_of_the_experts_that_they_visit():
    (call, *_) = custom_calls.read_calls(PROGRAM)
    assert call.matrices == 2 * 4 * 256 * 384
    call = call._replace(bytes=call.matrices + 100)
    found = custom_calls.surplus([call], 0.5, CHIPS["v5p"], visited=0.25)
    assert found.flops == 400
    assert found.bytes == 50 + 0.75 * call.matrices
    assert found.seconds == pytest.approx(found.bytes / 2350e9)


@pytest.mark.parametrize(
    ("kind", "fused", "products"),
    [("fwd", True, 2), ("dkv", True, 5), ("dkv", False, 4), ("dq", False, 3)],
)
def test_flops_of_attention(kind, fused, products):
    call = custom_calls.read_calls(PROGRAM)[-1]
    computed = 512**2 * 10 / 16  # ten of 4 x 4 blocks
    found = custom_calls.attention_flops(kind, call, fused)
    assert found == products * 2 * 2 * 3 * computed * 128
