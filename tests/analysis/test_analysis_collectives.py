"""Collectives of compiled programs, and the time that they take on the links of a slice."""

import itertools
import types

import pytest

from mixtral_jax.analysis import collectives, topology
from mixtral_jax.analysis.chips import CHIPS
from mixtral_jax.config import InputError, MeshConfig

PROGRAM = """
%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
}

%all-reduce-scatter.7 (x: bf16[6,10]) -> bf16[3,10] {
  %all-reduce.9 = bf16[6,10]{1,0} all-reduce(%x), channel_id=9, replica_groups=[2,2]<=[2,2]T(1,0)
}

%start (x: f32[5,3]) -> (f32[5,3], f32[5,6]) {
  %g.1 = f32[5,6]{1,0} all-gather(%x), channel_id=3, replica_groups={{0,2},{1,3}}, a={chain_id="0"}
  ROOT %n = (f32[5,3], f32[5,6]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.1 (x: f32[5,3]) -> f32[5,6] {
  %g.2 = f32[5,6]{1,0} all-gather(%x), channel_id=3, replica_groups={{0,2},{1,3}}, a={chain_id="0"}
}

ENTRY %main (a: f32[5,3]) -> f32[5,12] {
  %b = bf16[40,7]{1,0:T(8,128)(2,1)} parameter(1)
  %c = bf16[90,7]{1,0} parameter(2)
  %g = f32[5,12]{1,0} all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={1}
  %s = (f32[5,3]{1,0}, f32[5,6]{1,0}) all-gather-start(%a), replica_groups={{0,2},{1,3}}
  %r = f32[5,3]{1,0} reduce-scatter(%g), replica_groups=mesh['x'=2,'y'=2] {'y'}, to_apply=%add
  %t = (f32[], pred[3]{0}) all-reduce(%u, %v), replica_groups=mesh['x'=4,'y'=1] {'y'}
  %m = bf16[90,7]{1,0} ragged-all-to-all(%b, %c), replica_groups={{0,1},{2,3}}
  %k = s32[8]{0} collective-permute(%z), source_target_pairs={{1,3},{3,1}}
  %d = f32[3]{0} all-reduce-done(%t)
  %o = f32[3]{0} all-reduce(%q), replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}
}
"""


def test_collectives_are_read_from_a_program():
    found = collectives.read_collectives(PROGRAM, 4)
    assert [(c.kind, c.buffer_bytes, c.group) for c in found] == [
        ("reduce-scatter", 120, (0, 2)),
        ("all-gather", 120, (0, 2)),
        ("all-gather", 240, (0, 1, 2, 3)),
        ("all-gather", 120, (0, 2)),
        ("reduce-scatter", 120, (0, 1)),
        ("ragged-all-to-all", 560, (0, 1)),
        ("collective-permute", 32, (1, 3)),
        ("all-reduce", 12, (0, 2)),
    ]
    assert [c.sent_bytes for c in found] == [60, 60, 180, 60, 60, 280, 32, 12]


def fake_slice(kind, *shape, slices=1):
    """Slices of a shape, of things that have only places."""
    devices = tuple(
        types.SimpleNamespace(coords=place, slice_index=number)
        for number in range(slices)
        for place in itertools.product(*map(range, shape))
    )
    return topology.Slice(f"{kind}:x", CHIPS[kind], devices)


@pytest.mark.parametrize(
    ("kind", "shape", "group", "links"),
    [
        ("v5p", (4, 4, 4), range(64), [(4, 2), (4, 2), (4, 2)]),
        ("v5p", (4, 4, 4), range(4), [(4, 2)]),
        ("v5p", (4, 4, 4), range(2), [(2, 1)]),
        ("v5p", (2, 2, 1), range(4), [(2, 1), (2, 1)]),
        ("v5e", (4, 16), range(16), [(16, 2)]),
        ("v5e", (4, 16), range(0, 64, 16), [(4, 1)]),
        ("v6e", (4, 4), range(1), []),
    ],
)
def test_links_of_a_group(kind, shape, group, links):
    target = fake_slice(kind, *shape)
    assert target.links([target.devices[place] for place in group]) == links


def test_seconds_on_the_links():
    target = fake_slice("v5p", 4, 4, 4)
    assert target.chip.link_bytes_per_second == 100e9
    ring, whole = tuple(range(4)), tuple(range(64))
    of = lambda kind, group: collectives.Collective(kind, 64e9, group).seconds(  # noqa: E731
        target, target.devices
    )
    assert of("all-gather", ring) == pytest.approx(64 * 3 / 4 / 200)
    assert of("reduce-scatter", whole) == pytest.approx(63 / 600)
    assert of("all-reduce", whole) == pytest.approx(2 * 63 / 600)
    assert of("all-to-all", ring) == pytest.approx(64 / 2 / 100)
    assert of("ragged-all-to-all", (0, 1)) == pytest.approx(64 / 2 / 100)
    assert of("collective-permute", (0, 1)) == pytest.approx(64 / 100)


def test_seconds_between_slices():
    """Two slices of v5p, of eight chips each: 6.25 GB/s a chip between them."""
    target = fake_slice("v5p", 2, 2, 2, slices=2)
    target_text = '_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type='
    program = "".join(
        f"  %send.{n} = (f32[4,8]{{1,0}}, u32[], token[]) send(%x, %y), channel_id={n}, "
        f'frontend_attributes={{{target_text}"{kind}"}}\n'
        for n, kind in enumerate(("ALL_REDUCE", "ALL_GATHER", "REDUCE_SCATTER", "ONE_TO_ONE"))
    )
    found = collectives.read_collectives(program + "  %s = (f32[4]{0}) send(%x, %y)\n", 16)
    assert [(c.kind, c.buffer_bytes, c.group) for c in found] == [
        ("all-reduce", 128, (0, 8)),
        ("all-gather", 256, (0, 8)),
        ("reduce-scatter", 128, (0, 8)),
        ("collective-permute", 128, (0, 8)),
    ]
    sent = [c.seconds(target, target.devices) * 6.25e9 for c in found]
    assert sent == pytest.approx([128, 128, 64, 128])


def test_a_slice_must_have_the_meshs_devices():
    with pytest.raises(InputError, match="has 8 devices and v5p:x has 4: set"):
        topology.make_mesh(MeshConfig(fsdp=8), fake_slice("v5p", 2, 2, 1))


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("name", "slices", "mesh", "chips"),
    [
        ("v4:2x2x2", 1, {"fsdp": 4, "expert": 2}, 8),
        ("v5e:1x1", 1, {}, 1),
        ("v6e:4x4", 3, {"data": 3, "fsdp": 8, "tensor": 2}, 48),
        ("v5p:2x2x1", 2, {"fsdp": 4, "expert": 2}, 8),
        ("tpu7x:2x2x1", 1, {"fsdp": 2, "expert": 4}, 4),
    ],
)
def test_meshes_on_slices_of_every_chip(name, slices, mesh, chips):
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")
    target = topology.get_slice(name, slices)
    made = topology.make_mesh(MeshConfig(**mesh), target)
    assert target.chips == chips
    assert made.size == chips * target.chip.per_chip
    assert topology.slices_of(target.devices) == slices
    outer = made.devices.reshape(slices, -1)
    assert all(topology.slices_of(part) == 1 for part in outer)  # slices lie one after another


@pytest.mark.tpu_compile
def test_an_axis_that_does_not_span_the_slices_is_refused():
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")
    target = topology.get_slice("v5p:2x2x1", 2)
    with pytest.raises(InputError, match="fsdp=1 does not split over 2 slices"):
        topology.make_mesh(MeshConfig(expert=8), target)
