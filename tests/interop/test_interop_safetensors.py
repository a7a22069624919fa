"""Our reader and writer of safetensors against the library's, and against hostile files."""

import json
import os
import resource
import time
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.config import InputError
from mixtral_jax.interop.safetensors import SafetensorsFile, write_safetensors
from mixtral_jax.interop.safetensors_header import DTYPES, PACKED

library = pytest.importorskip("safetensors")
save = pytest.importorskip("safetensors.numpy").save

BF16 = np.dtype(ml_dtypes.bfloat16)
MIB = 2**20


def values(dtype, *shape):
    """Different numbers of a type, small enough for each."""
    count = np.arange(np.prod(shape, dtype=int)) % 13
    return (count % 2 if dtype is bool else count).reshape(shape).astype(dtype)


def build(header, data=b"", length=None):
    """A file's bytes from its header, as JSON or as something to be written as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start, stop, shape=None, dtype="U8", **more):
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop], **more}


def refused(tmp_path, data, *words):
    """Opening these bytes gives one line that names the file and has these words."""
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(data)
    with pytest.raises(InputError) as error:
        SafetensorsFile(path)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < len(str(path)) + 400, message
    assert all(word in message for word in [str(path), *words]), message


def raw(data):
    """What the library finds in these bytes: type, shape and bytes of every tensor."""
    return {k: (v["dtype"], tuple(v["shape"]), v["data"]) for k, v in library.deserialize(data)}


def ours(path):
    """The same as `raw`, from the file and by our reader."""
    found, names = {}, {dtype: name for name, dtype in DTYPES.items()}
    names |= {dtype: name for name, (dtype, _) in PACKED.items()}
    data = path.read_bytes()
    with SafetensorsFile(path) as file:
        for name, info in file.tensors.items():
            found[name] = (names[info.dtype], info.shape, data[info.start : info.stop])
            if info.dtype in DTYPES.values():
                assert file.array(name).tobytes() == found[name][2]
    return found


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
    size = write_safetensors(path, tensors, arrays.values(), metadata={"who": "we"})
    data = path.read_bytes()
    assert size == len(data)
    assert int.from_bytes(data[:8], "little") % 8 == 0
    assert raw(data) == ours(path)
    assert {k: v[2] for k, v in raw(data).items()} == {k: v.tobytes() for k, v in arrays.items()}
    with library.safe_open(path, "np") as file:
        assert file.metadata() == {"who": "we"}
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
    with pytest.raises(library.SafetensorError, match="unknown variant") as error:
        library.deserialize(build({"a": tensor(0, 1, dtype="X")}, b"a"))
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


# ---- hostile files -----------------------------------------------------------------------------


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "two\nlines").mkdir()
    for path, words in [
        (tmp_path / "none", "does not exist"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "not a regular file"),
        ("/dev/zero", "not a regular file"),
        (tmp_path / "two\nlines", "is a folder"),
        (str(tmp_path) + "/a\0b", "cannot be read"),
        (tmp_path / "pipe" / "x", "cannot be read"),
        (tmp_path / ("n" * 300), "cannot be read"),
    ]:
        with pytest.raises(InputError, match=words) as error:
            SafetensorsFile(path)
        assert str(error.value).isprintable()


GOOD = {"a": tensor(0, 2), "b": tensor(2, 6, [2], "BF16")}
ONE = tensor(0, 1)
LONG = "n" * 5000
HUGE = 2**63


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", ["0 bytes", "too few"]),
        (b"1234567", ["7 bytes", "too few"]),
        (bytes(8), ["does not start with a brace"]),
        (b"\xff" * 30, ["header of 18446744073709551615 bytes", "100000000"]),
        (build(b"{}", length=100_000_001), ["100000001", "100000000"]),
        (build(b"{}", length=100_000_000), ["header of 100000000 bytes", "of 10", "cut short?"]),
        (build(b"{}", length=3), ["header of 3 bytes", "file of 10"]),
        (build(b'{"\xff": 1}'), ["not UTF-8", "byte 2"]),
        (build(b"{'a': 1}"), ["not JSON"]),
        (build(b"{"), ["not JSON"]),
        (build(b"{}x"), ["not JSON"]),
        (build(b"{}\0\0"), ["not JSON"]),
        (build(b"[]"), ["brace"]),
        (build(b"null"), ["brace"]),
        (build(b"\xef\xbb\xbf{}"), ["brace"]),
        (build(b'{"a":' + b"[" * 200_000), ["nested too deeply"]),
        (build(b'{"a":' * 200_000), ["nested too deeply"]),
        (build(b'{"a":{"shape":[' + b"9" * 5000 + b"]}}"), ["thousands of digits"]),
        (build(b'{"a":1,"a":2}'), ["'a' stands there twice"]),
        (build(b'{"a":{"dtype":"U8","dtype":"U8"}}'), ["'dtype' stands there twice"]),
        (build(b'{"a\nb":1}'), ["not JSON"]),
        (build({"a": 1}), ["tensor 'a'", "needs dtype, shape and data_offsets"]),
        (build({"a": None}), ["tensor 'a'", "None"]),
        (build({"a": {}}), ["tensor 'a'", "has none"]),
        (build({"a": [["U8"], [1], [0, 1]]}, b"a"), ["tensor 'a'", "list of 3"]),
        (build({"a": {"dtype": "U8", "shape": [1]}}, b"a"), ["tensor 'a'", "'dtype', 'shape'"]),
        (build({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"a"), ["tensor 'a'", "shape"]),
        (build({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"a"), ["tensor 'a'", "dtype"]),
        (build({"a": tensor(0, 1, extra=1)}, b"a"), ["tensor 'a'", "'extra'"]),
        (build({"a": tensor(0, 1, dtype="Q4")}, b"a"), ["'a'", "dtype 'Q4' is not a type"]),
        (build({"a": tensor(0, 1, dtype=8)}, b"a"), ["'a'", "dtype 8"]),
        (build({"a": tensor(0, 1, dtype=["U8"])}, b"a"), ["'a'", "dtype list of 1"]),
        (build({"a": tensor(0, 1, dtype="u8")}, b"a"), ["'a'", "'u8'"]),
        *(
            (build({"a": {**ONE, "shape": shape}}, b"a"), ["tensor 'a'", "shape must list"])
            for shape in (1, None, "1", {}, {"1": 1}, [True], [1.0], ["1"], [None], [[1]], [-1])
        ),
        (build({"a": tensor(0, 1, [1] * 33)}, b"a"), ["tensor 'a'", "at most 32"]),
        (build({"a": tensor(0, 1, [HUGE])}, b"a"), ["tensor 'a'", "shape must list"]),
        (build({"a": tensor(0, 1, [10**400])}, b"a"), ["tensor 'a'", "shape must list"]),
        (build({"a": tensor(0, 0, [2**62, 4])}), ["tensor 'a'", "beyond any memory"]),
        (build({"a": tensor(0, 0, [2**63 - 1, 2**63 - 1] * 16)}), ["beyond any memory"]),
        (build({"a": tensor(0, 0, [0, HUGE - 1, 2])}), ["tensor 'a'", "beyond any memory"]),
        (build({"a": tensor(0, 0, [2**61], "F64")}), ["tensor 'a'", "beyond any memory"]),
        *(
            (build({"a": {**tensor(0, 1), "data_offsets": o}}, b"a"), ["'a'", "data_offsets must"])
            for o in (1, None, [0], [0, 1, 1], [1, 0], [0, True], [0, 1.0], [-1, 0], [0, 2**64])
        ),
        (build({"a": tensor(0, 1, [2])}, b"a"), ["'a'", "takes 16 bits", "span 1 bytes"]),
        (build({"a": tensor(0, 2, [1])}, b"ab"), ["'a'", "takes 8 bits", "span 2 bytes"]),
        (build({"a": tensor(0, 2, [2], "BF16")}, b"ab"), ["'a'", "of BF16 takes 32 bits"]),
        (build({"a": tensor(0, 1, [3], "F4")}, b"a"), ["'a'", "of F4 takes 12 bits"]),
        (build({"a": tensor(0, 0, [3], "U8")}), ["'a'", "takes 24 bits", "span 0 bytes"]),
        (build(GOOD, b"abcde"), ["tensor 'b'", "ends at byte", "cut short"]),
        (build(GOOD, b""), ["tensor 'a'", "cut short"]),
        (build(GOOD, b"abcdefg"), ["its tensors end at byte"]),
        (build({"a": tensor(0, 2**62)}, b"a"), ["tensor 'a'", "cut short"]),
        (build({"a": tensor(1, 2)}, b"ab"), ["tensor 'a' leaves a hole"]),
        (build({"a": tensor(0, 1), "b": tensor(2, 3)}, b"abc"), ["tensor 'b' leaves a hole"]),
        (build({"a": tensor(0, 2), "b": tensor(1, 3)}, b"abc"), ["tensor 'b' overlaps"]),
        (build({"a": tensor(0, 2), "b": tensor(0, 2)}, b"ab"), ["tensor 'b' overlaps"]),
        (build({"a": tensor(0, 2), "b": tensor(1, 1)}, b"ab"), ["tensor 'b' overlaps"]),
        (build({}, b"a"), ["its tensors end at byte 10"]),
        (build({LONG: tensor(0, 1)}), ["tensor 'nnnn", "..."]),
        (build({"a\n\x1b[31m\u2028": tensor(0, 1)}), [r"'a\n\x1b[31m\u2028'"]),
        (build({"\ud800": tensor(0, 1)}, b"a"), ["'\\ud800'", "not valid Unicode"]),
        (build({"__metadata__": {"a": 1}}), ["__metadata__ must be an object"]),
        (build({"__metadata__": {"\ud800": "a"}}), ["'\\ud800' in __metadata__"]),
        (build({"__metadata__": {"a": "\ud800"}}), ["'\\ud800' in __metadata__"]),
        (build({"__metadata__": []}), ["__metadata__ must be an object"]),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)  # fmt: skip
def test_a_hostile_file_gives_one_line(tmp_path, data, words):
    refused(tmp_path, data, *words)


# What the library accepts and we refuse. The format's description allows neither duplicate keys,
# nor anything before the brace, nor other JSON in the metadata; fields that we do not know could
# change what the bytes mean; and NumPy makes no such shapes.
STRICTER = {
    "stands there twice": build(b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2), b"a"),
    "does not start with a brace": build(b" {}"),
    "__metadata__ must be": build(b'{"__metadata__":null}'),
    "data_offsets alone, has": build({"a": {**ONE, "more": 2}}, b"a"),
    "has list of 3": build({"a": ["U8", [1], [0, 1]]}, b"a"),
    "at most 32": build({"a": tensor(0, 1, [1] * 33)}, b"a"),
    "whole numbers from 0 to 2**63 - 1": build({"a": tensor(0, 0, [0, 2**64 - 1])}),
    "beyond any memory": build({"a": tensor(0, 0, [0, 2**62, 2])}),
}


@pytest.mark.parametrize("words", STRICTER)
def test_where_we_are_stricter_than_the_library(tmp_path, words):
    raw(STRICTER[words])
    refused(tmp_path, STRICTER[words], words)


def test_where_the_library_is_stricter(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'))
    with SafetensorsFile(path) as file:  # minus nothing is nothing, and JSON
        assert file.tensors["a"].shape == (0,)
    with pytest.raises(library.SafetensorError):
        raw(path.read_bytes())


# ---- mutated files -----------------------------------------------------------------------------

BASE = {
    "__metadata__": {"format": "pt"},
    "a": tensor(0, 6, [3], "BF16"),
    "b": tensor(6, 14, [2, 1], "F32"),
    "c": tensor(14, 14, [0, 7], "I64"),
    "d": tensor(14, 19, [5], "U8"),
}
DATA = bytes(range(19))
KEYS, FIELDS = st.sampled_from([*BASE]), st.sampled_from(["dtype", "shape", "data_offsets", "x"])
SIZES = st.one_of(st.integers(-2, 20), st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, 10**30]))
SCALARS = st.one_of(SIZES, st.none(), st.booleans(), st.floats(), st.text(max_size=4))
JSON = st.one_of(
    st.sampled_from([*DTYPES, *PACKED]),
    st.lists(SIZES, max_size=4),
    st.recursive(
        SCALARS,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=2), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("mutated") / "x.safetensors"


def judge(path, data):
    """One line of error, or exactly what the library loads; quick, and with little memory."""
    path.write_bytes(data)
    try:
        expected = raw(data)
    except (library.SafetensorError, ValueError, OverflowError):
        expected = None
    tracemalloc.start()
    begin, message = time.process_time(), ""
    try:
        with SafetensorsFile(path) as file:
            for name, info in file.tensors.items():
                if info.dtype in DTYPES.values():
                    file.array(name)
    except InputError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MIB
    assert time.process_time() - begin < 1
    if message:
        assert message.isprintable()
        assert len(message) < len(str(path)) + 400
        assert expected is None or any(words in message for words in STRICTER), message
        return
    if expected is None:
        assert b"-0" in data
    else:
        assert ours(path) == expected


@settings(max_examples=400)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["flip", "insert", "delete", "copy"]),
            st.integers(0, 400),
            st.one_of(st.integers(1, 255), st.sampled_from(b'-0123456789.,:"{}[]e \\')),
        ),
        min_size=1,
        max_size=4,
    ),
    st.booleans(),
)
def test_bytes_changed_in_the_header(scratch, changes, honest):
    text = bytearray(json.dumps(BASE).encode())
    for what, at, byte in changes:
        at %= len(text)
        if what == "flip":
            text[at] ^= byte
        elif what == "insert":
            text[at:at] = bytes([byte])
        elif what == "delete":
            del text[at : at + byte % 3 + 1]
        else:
            text[at:at] = text[at // 2 : at // 2 + byte]
    length = len(text) if honest else len(json.dumps(BASE))
    judge(scratch, build(bytes(text), DATA, length))


@settings(max_examples=400)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("set"), KEYS, FIELDS, JSON),
            st.tuples(st.just("resize"), KEYS, st.sampled_from(["shape", "data_offsets"]), SIZES),
            st.tuples(st.just("swap"), KEYS, FIELDS, KEYS),
            st.tuples(st.just("drop"), KEYS, FIELDS, st.none()),
            st.tuples(st.just("replace"), KEYS, st.none(), JSON),
            st.tuples(st.just("rename"), KEYS, st.none(), st.text(max_size=200)),
        ),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
)
def test_a_header_that_says_something_else(scratch, changes, escaped):
    header = json.loads(json.dumps(BASE))
    for what, key, field, value in changes:
        entry = header.get(key)
        if what == "replace":
            header[key] = value
        elif what == "rename":
            header[value] = header.pop(key, None)
        elif not isinstance(entry, dict):
            continue
        elif what == "set":
            entry[field] = value
        elif what == "resize" and isinstance(entry.get(field), list) and entry[field]:
            entry[field][value % len(entry[field])] = value
        elif what == "swap" and isinstance(header.get(value), dict):
            entry[field] = header[value].get(field)
        elif what == "drop":
            entry.pop(field, None)
    text = json.dumps(header, ensure_ascii=escaped).encode(errors="surrogatepass")
    judge(scratch, build(text, DATA))


@settings(max_examples=200)
@given(st.integers(0, 500), st.binary(max_size=9), st.integers(0, 2**64 - 1), st.booleans())
def test_a_file_cut_short_or_with_more_or_another_length(scratch, stop, more, length, claim):
    whole = build(BASE, DATA)
    judge(scratch, whole[:stop] + more)
    judge(scratch, whole + more)
    judge(scratch, build(BASE, DATA, length if claim else length % 500))


@settings(max_examples=100)
@given(st.binary(max_size=60), st.binary(max_size=20))
def test_bytes_that_are_nothing(scratch, header, data):
    judge(scratch, header + data)
    judge(scratch, build(header, data))


def test_what_the_base_of_the_mutations_is(scratch):
    scratch.write_bytes(build(BASE, DATA))
    assert ours(scratch) == raw(build(BASE, DATA))


def test_a_header_of_nonsense_costs_memory_by_its_own_length_alone(scratch):
    for text in (b"[]," * 300_000, b'"ab",' * 300_000, b"{}," * 300_000):
        scratch.write_bytes(build(b'{"a":[' + text + b"1]}"))
        tracemalloc.start()
        with pytest.raises(InputError, match="list of 300001"):
            SafetensorsFile(scratch)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 * len(text)


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


def test_no_tensors_and_no_metadata(tmp_path):
    assert write_safetensors(tmp_path / "x", [], [], None) == 16
    assert raw((tmp_path / "x").read_bytes()) == {}
    with SafetensorsFile(tmp_path / "x") as file:
        assert (file.tensors, file.metadata) == ({}, {})


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
