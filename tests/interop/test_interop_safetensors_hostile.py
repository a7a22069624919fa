"""Files that are no safetensors, or meant to break a reader, by hand and by mutation."""

import json
import os
import time
import tracemalloc

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from tensor_files import MIB, build, ours, raw, tensor

from mixtral_jax.config import InputError
from mixtral_jax.interop.safetensors import SafetensorsFile
from mixtral_jax.interop.safetensors_header import DTYPES, PACKED


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


# ---- by hand ------------------------------------------------------------------------------------


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
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ["run git lfs pull"]),
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
    with pytest.raises(safetensors.SafetensorError):
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
    except (safetensors.SafetensorError, ValueError, OverflowError):
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
