"""Our reader and writer of safetensors against the library's, and how much memory they use."""

import os
import resource
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save
from tensor_files import BF16, MIB, build, ours, raw, tensor, values

from mixtral_jax.config import InputError
from mixtral_jax.interop.safetensors import SafetensorsFile, write_safetensors
from mixtral_jax.interop.safetensors_header import DTYPES, PACKED

# ---- with the library, in both directions ------------------------------------------------------

ARRAYS = {
    "wide": values("<f4", 5, 3),
    "scalar": values("<f8"),
    "a name, with 字 and \n": values("<i2", 7),
    "empty": values("<f2", 3, 0, 5),
    "odd": values("u1", 3),
    "flags": values(bool, 11),
    "": values("<i8", 1, 2, 3),
    **{f"type {kind}": values(kind, 2, 3) for kind in ("i1", "<i4", "<u2", "<u4", "<u8")},
}


def test_the_library_writes_and_we_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(ARRAYS, metadata={"format": "np", "a": "字"}))
    with SafetensorsFile(str(path)) as file:
        assert file.path == path
        assert file.metadata == {"format": "np", "a": "字"}
        assert file.tensors.keys() == ARRAYS.keys()
        for name, array in ARRAYS.items():
            info = file.tensors[name]
            assert (info.dtype, info.shape) == (array.dtype, array.shape)
            assert info.stop - info.start == array.nbytes
            np.testing.assert_array_equal(file.array(name), array, strict=True)
    assert ours(path) == raw(path.read_bytes())


def test_we_write_and_the_library_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    arrays = ARRAYS | {"brain": values(BF16, 3, 5), "f8": values(ml_dtypes.float8_e4m3fn, 5)}
    tensors = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    size = write_safetensors(path, tensors, arrays.values())
    data = path.read_bytes()
    assert size == len(data)
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert raw(data) == ours(path)
    assert {k: v[2] for k, v in raw(data).items()} == {k: v.tobytes() for k, v in arrays.items()}
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
        np.testing.assert_array_equal(file.get_tensor("wide"), ARRAYS["wide"], strict=True)
        np.testing.assert_array_equal(file.get_tensor("brain"), arrays["brain"], strict=True)


def test_pytorch_reads_our_bfloat16_and_we_read_its(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors import torch as library_torch

    mine, its = tmp_path / "mine.safetensors", tmp_path / "its.safetensors"
    array = np.linspace(-3, 7, 35, dtype=np.float32).reshape(5, 7)
    brain = array.astype(BF16)
    odd = values("u1", 3)
    write_safetensors(mine, [("a", odd.dtype, (3,)), ("b", BF16, (5, 7))], [odd, brain])
    loaded = library_torch.load_file(mine)["b"]
    assert loaded.dtype == torch.bfloat16
    np.testing.assert_array_equal(loaded.float().numpy(), brain.astype(np.float32))
    library_torch.save_file({"b": torch.tensor(array).bfloat16()}, its, metadata={"format": "pt"})
    with SafetensorsFile(its) as file:
        np.testing.assert_array_equal(file.array("b"), brain, strict=True)
        assert file.metadata == {"format": "pt"}


def test_every_type_of_the_format_is_known_by_name(tmp_path):
    path = tmp_path / "x.safetensors"
    for name, bits in [(k, 8 * d.itemsize) for k, d in DTYPES.items()] + [
        (k, bits) for k, (_, bits) in PACKED.items()
    ]:
        data = build({"a": tensor(0, bits, [8], name)}, bytes(bits))
        path.write_bytes(data)
        assert ours(path) == raw(data), name
    with pytest.raises(safetensors.SafetensorError, match="unknown variant") as error:
        safetensors.deserialize(build({"a": tensor(0, 1, dtype="X")}, b"a"))
    known = str(error.value).split("expected one of")[1].split(" at line")[0]
    assert set(known.replace("`", "").replace(" ", "").split(",")) <= DTYPES.keys() | PACKED.keys()


def test_a_packed_type_is_named_when_it_is_asked_for(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"w": tensor(0, 3, [2, 3], "F4")}, b"abc"))
    with SafetensorsFile(path) as file, pytest.raises(InputError, match="'w' is float4_e2m1fn"):
        file.array("w")


# ---- reading -----------------------------------------------------------------------------------


def test_an_array_is_a_read_only_view_wherever_the_file_has_it(tmp_path):
    path = tmp_path / "x.safetensors"
    numbers = values("<f4", 3)
    header = {"a": tensor(0, 1), "b": tensor(1, 13, [3], "F32")}
    path.write_bytes(build(header, b"x" + numbers.tobytes()))
    with SafetensorsFile(path) as file:
        array = file.array("b")
        assert not array.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
        file.release("b")
        file.prefetch("b")
        with pytest.raises(KeyError):
            file.array("c")
    np.testing.assert_array_equal(array, numbers)  # a view outlives the file
    with pytest.raises(ValueError, match="closed"):
        file.array("b")


def test_opening_reads_nothing_but_the_header(tmp_path):
    path, layers, each = tmp_path / "sparse.safetensors", 999, 2**27
    header = {
        f"layers.{n}": tensor(n * each, (n + 1) * each, [8, 2**23], "BF16") for n in range(layers)
    }
    with open(path, "wb") as file:
        start = file.write(build(header))
        file.truncate(start + layers * each)
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with SafetensorsFile(path) as file:
        seconds = time.perf_counter() - begin
        assert len(file.tensors) == layers
        assert file.array("layers.998").shape == (8, 2**23)  # mapped: 125 GiB, none of it read
        assert file.array("layers.998")[7, -1] == 0
    assert seconds < 1, "10 ms when nothing else runs"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB


def resident():
    """Bytes of mapped files that are in this process's memory."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssFile"))


def test_release_bounds_the_memory_of_a_stream(tmp_path):
    path, each = tmp_path / "x.safetensors", 16 * MIB + 3
    write_safetensors(
        path, [(f"t{n}", np.dtype("u1"), (each,)) for n in range(5)],
        (np.full(each, n, np.uint8) for n in range(5)),
    )  # fmt: skip
    with SafetensorsFile(path) as file:
        before, seen = resident(), []
        for n in range(5):
            file.prefetch(f"t{n}")
            array = file.array(f"t{n}")
            assert array.sum(dtype=int) == n * each
            seen.append(resident() - before)
            file.release(f"t{n}")
            assert resident() - before < 4 * MIB
            assert array[-1] == n  # still good, and read again
        assert all(each - MIB < size < 2 * each for size in seen), seen


def test_a_file_cut_short_while_open_is_an_error_and_no_crash(tmp_path):
    path = tmp_path / "x.safetensors"
    data = build({"a": tensor(0, 9000), "b": tensor(9000, 9003)}, bytes(9003))
    path.write_bytes(data)
    with SafetensorsFile(path) as file:
        file.array("a")
        os.truncate(path, len(data) - 1)
        assert file.array("a").sum() == 0
        with pytest.raises(InputError, match=r"'b' is gone.*shorter"):
            file.array("b")
    path.write_bytes(data)
    with SafetensorsFile(path) as file:
        os.truncate(path, 20)
        with pytest.raises(InputError, match="shorter"):
            file.array("a")


# ---- writing -----------------------------------------------------------------------------------


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def test_arrays_are_let_go_of_one_by_one_and_never_copied(tmp_path):
    each, count = 8 * MIB, 5
    tracemalloc.start()
    write_safetensors(
        tmp_path / "x",
        [(f"t{n}", BF16, (2, each // 4)) for n in range(count)],
        (np.full((2, each // 4), n, BF16) for n in range(count)),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < each + MIB


def test_an_array_with_gaps_is_written_by_its_values(tmp_path):
    array = np.asfortranarray(values("<f4", 5, 7))
    arrays = [array, array[::2, 1:], array.T, np.broadcast_to(np.float32(3), (3, 5))]
    tensors = [(f"t{n}", a.dtype, a.shape) for n, a in enumerate(arrays)]
    write_safetensors(tmp_path / "x", tensors, arrays)
    with SafetensorsFile(tmp_path / "x") as file:
        for n, expected in enumerate(arrays):
            np.testing.assert_array_equal(file.array(f"t{n}"), expected, strict=True)


def test_no_tensors(tmp_path):
    size = write_safetensors(tmp_path / "x", [], [])
    assert size == len((tmp_path / "x").read_bytes())
    assert raw((tmp_path / "x").read_bytes()) == {}
    with SafetensorsFile(tmp_path / "x") as file:
        assert (file.tensors, file.metadata) == ({}, {"format": "pt"})


F32 = np.dtype("<f4")
PAIR = [("a", F32, (2, 3)), ("b", BF16, (5,))]
A, B = np.zeros((2, 3), F32), np.zeros(5, BF16)


def broken():
    yield A
    raise KeyError("from the source")


@pytest.mark.parametrize(
    ("tensors", "arrays", "error", "words"),
    [
        (PAIR, [A], ValueError, "2 arrays were announced, 1 came"),
        (PAIR, [], ValueError, "2 arrays were announced, 0 came"),
        (PAIR, [A, B, B], ValueError, "more came"),
        (PAIR, [B, A], ValueError, "'a' was announced as float32 (2, 3), but is bfloat16 (5,)"),
        (PAIR, [A.T, B], ValueError, "but is float32 (3, 2)"),
        (PAIR, [A, B.astype("<f2")], ValueError, "'b'"),
        (PAIR, [A.astype(">f4"), B], ValueError, "'a'"),
        ([PAIR[0], PAIR[0]], [A, A], ValueError, "the name is taken"),
        ([("__metadata__", F32, (2, 3))], [A], ValueError, "'__metadata__'"),
        ([("a", np.dtype("<c16"), (2, 3))], [A], ValueError, "no type for complex128"),
        ([("a", np.dtype(ml_dtypes.float4_e2m1fn), (2, 3))], [A], ValueError, "no type"),
        (PAIR, broken, KeyError, "from the source"),
    ],
)
@pytest.mark.parametrize("before", [None, b"the old one"])
def test_what_was_not_announced_leaves_nothing(tmp_path, tensors, arrays, error, words, before):
    if before:
        (tmp_path / "x").write_bytes(before)
    with pytest.raises(error) as raised:
        write_safetensors(tmp_path / "x", tensors, arrays() if callable(arrays) else arrays)
    assert words in str(raised.value)
    assert listed(tmp_path) == (["x"] if before else [])
    assert not before or (tmp_path / "x").read_bytes() == before


def test_the_file_appears_when_it_is_whole(tmp_path):
    def arrays():
        assert "x" not in listed(tmp_path)
        yield A
        assert "x" not in listed(tmp_path)
        yield B

    write_safetensors(tmp_path / "x", PAIR, arrays())
    assert listed(tmp_path) == ["x"]
    write_safetensors(tmp_path / "x", PAIR[:1], [A])  # over the old one
    longest = tmp_path / ("n" * 255)
    write_safetensors(longest, PAIR[:1], [A])
    assert longest.read_bytes() == (tmp_path / "x").read_bytes()
    with SafetensorsFile(tmp_path / "x") as file:
        assert list(file.tensors) == ["a"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in ("none/x", "file/x", "folder", "n" * 300, "a\0b", "none/two\nlines"):
        with pytest.raises(InputError, match="cannot be written: ") as error:
            write_safetensors(tmp_path / path, PAIR, [A, B])
        assert str(error.value).isprintable()
        assert listed(tmp_path) == ["file", "folder"]
        assert listed(tmp_path / "folder") == []


@pytest.mark.parametrize("limit", [0, 100, 30_000])
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, limit):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(InputError, match="x cannot be written: File too large"):
            write_safetensors(tmp_path / "x", [("a", F32, (9999,))], [np.zeros(9999, F32)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert listed(tmp_path) == []
