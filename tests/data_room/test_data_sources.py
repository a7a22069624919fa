"""Globs, file kinds, and documents that cannot be read."""

import json
import logging
import os
import random
import sysconfig

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixtral_jax.config import InputError, SourceConfig
from mixtral_jax.data import sources
from mixtral_jax.data.globs import expand
from mixtral_jax.data.sources import MalformedReport, open_sources


def opened(*globs, fatal=False, taken=None):
    report = MalformedReport(fatal)
    configs = [SourceConfig(files=str(glob)) for glob in globs]
    documents, sizes = open_sources(
        "data.train", configs, report, set() if taken is None else taken
    )
    return documents, sizes, report


def test_text_files_are_documents_in_sorted_order(folder, texts):
    documents, sizes, report = opened(folder / "*.txt")
    assert sizes == [len(texts)]
    assert list(documents) == texts
    assert report.count == 0


def test_text_is_byte_for_byte(tmp_path):
    text = "a\r\nb\rc\n\n\x00\u2028é\ufeff"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(text.encode("utf-8-sig"))  # its mark is no text
    assert list(opened(tmp_path / "*")[0]) == [text, text]


def test_globs_recurse_and_skip_empty_files(tmp_path):
    for name in ("b/c/one.md", "two.md", "b/empty.md", "b/other.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    assert list(opened(tmp_path / "**/*.md")[0]) == ["b/c/one.md", "two.md"]


def test_stdlib_is_this_pythons_without_packages(tmp_path, monkeypatch):
    assert [os.path.basename(path) for path in expand("{stdlib}/json/[a-s]*.py")] == [
        "decoder.py",
        "encoder.py",
        "scanner.py",
    ]
    stdlib = tmp_path / "site-packages" / "[3]"
    for name in ("b.py", "a/c.py", "site-packages/d.py", "a/dist-packages/e.py", "__pycache__/f"):
        (stdlib / name).parent.mkdir(parents=True, exist_ok=True)
        (stdlib / name).write_text(name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(stdlib)})
    assert expand("{stdlib}/**") == [f"{stdlib}/a/c.py", f"{stdlib}/b.py"]
    assert len(expand(f"{tmp_path}/**")) == 5


def test_a_folder_is_entered_once_by_whichever_link(tmp_path):
    names = ("a/one.md", "b/c/two.md", "three.md", "a/.hidden/four.md")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    for name in ("a/up", "a/above", "b/c/up"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "b" / "itself").symlink_to("itself")
    assert expand(f"{tmp_path}/**/*.md") == [f"{tmp_path}/{name}" for name in names[:3]]


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "matches no file"), ({"a.txt": ""}, "only empty"), ({"a.jsonl": "\n \n"}, "only empty")],
)
def test_a_glob_without_documents_is_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        opened(tmp_path / "*")
    assert f"data.train: {tmp_path}/*" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_belongs_to_the_first_glob_that_names_it(folder, texts):
    documents, sizes, _ = opened(folder / "000.txt", folder / "*.txt")
    assert sizes == [1, len(texts) - 1]
    assert list(documents) == texts
    with pytest.raises(InputError, match="earlier source"):
        opened(folder / "*.txt", folder / "000.txt")


def test_json_lines(tmp_path, texts):
    lines = [json.dumps({"id": 3, "text": text}) for text in texts]
    lines[1:1] = ["", "  \t"]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    (tmp_path / "b.JSONL").write_text('{"text": "next"}\n\n')
    (tmp_path / "c.ndjson").write_text('{"text": "last"}')
    documents, _, report = opened(tmp_path / "*")
    order = list(range(len(documents)))
    random.Random(0).shuffle(order)
    read = {index: documents[index] for index in order}
    assert [read[index] for index in range(len(documents))] == [*texts, "next", "last"]
    assert report.count == 0
    (tmp_path / "a.jsonl").write_text(lines[0][:-1])
    with pytest.raises(InputError, match=r"a\.jsonl has been cut short"):
        documents[0]
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(InputError, match=r"d\.json is neither .*: call it \.jsonl"):
        opened(tmp_path / "*")


def test_malformed_lines_are_named_and_counted_once(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "good"}', b"", b"not json", b'{"txt": "x"}', b'{"text": 3}', b"[1]"]
    lines += [b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 10**5, b'{"text": "end"}']
    path.write_bytes(b"\n".join(lines))
    documents, _, report = opened(path)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert list(documents) == ["good", *[None] * 7, "end"]
    assert report.count == 7
    assert report.names == [f"{path}:{line}" for line in (3, 4, 5, 6, 7)]
    assert str(report).startswith(f"7 malformed documents: {path}:3, ")
    assert len(caplog.records) == 5
    assert f"{path}:7" in caplog.text
    assert caplog.records[-1].getMessage().endswith("so far: 5")


def test_malformed_text_and_fatal(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"latin \xe9")
    documents, _, report = opened(tmp_path / "*")
    assert documents[0] is None
    assert report.names == [str(tmp_path / "a.txt")]
    documents, _, _ = opened(tmp_path / "*", fatal=True)
    with pytest.raises(InputError, match=r"a\.txt: not Unicode text .*data\.malformed=skip"):
        documents[0]


def write_parquet(path, texts, kind=None, rows=7):
    column = pa.array(texts, kind or pa.string())
    table = pa.table({"id": pa.array(range(len(texts))), "text": column})
    pq.write_table(table, path, row_group_size=rows)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str
)
@pytest.mark.parametrize("cache", [0, 2**20])
def test_parquet(tmp_path, texts, kind, cache, monkeypatch):
    monkeypatch.setattr(sources, "ROW_GROUP_CACHE_BYTES", cache)
    write_parquet(tmp_path / "a.parquet", texts, kind)
    write_parquet(tmp_path / "b.parquet", ["x", None, "z"], kind)
    documents, sizes, report = opened(tmp_path / "*")
    assert sizes == [len(texts) + 3]
    order = list(range(sizes[0]))
    random.Random(0).shuffle(order)
    read = {index: documents[index] for index in order}
    assert [read[index] for index in sorted(order)] == [*texts, "x", None, "z"]
    assert report.names == [f"{tmp_path}/b.parquet:2"]


@pytest.fixture
def parquet_calls(monkeypatch):
    """What pyarrow was asked to do once sources were open: files opened and closed, groups read."""
    calls = []

    class Spy(pq.ParquetFile):
        def __init__(self, path):
            calls.append(("open", os.path.basename(path)))
            super().__init__(path)
            self.path = path

        def read_row_group(self, group, **options):
            calls.append(group)
            return super().read_row_group(group, **options)

        def close(self, force=False):
            calls.append(("close", os.path.basename(self.path)))
            super().close(force)

    monkeypatch.setattr(pq, "ParquetFile", Spy)
    return calls


@pytest.mark.parametrize(
    ("cache", "wanted"), [(0, [0, 1, 0, 1, 2, 0, 1]), (40, [0, 1, 2, 0, 1]), (2**20, [0, 1, 2])]
)
def test_parquet_keeps_the_row_groups_that_fit(tmp_path, cache, wanted, monkeypatch, parquet_calls):
    monkeypatch.setattr(sources, "ROW_GROUP_CACHE_BYTES", cache)
    write_parquet(tmp_path / "a.parquet", list("abcdefghi"), rows=3)
    documents, _, _ = opened(tmp_path / "*")
    parquet_calls.clear()
    assert [documents[i] for i in (0, 1, 5, 2, 3, 4, 8, 0, 3)] == list("abfcdeiad")
    assert [call for call in parquet_calls if isinstance(call, int)] == wanted


def test_parquet_files_stay_open_up_to_a_number(tmp_path, monkeypatch, parquet_calls):
    monkeypatch.setattr(sources, "ROW_GROUP_CACHE_BYTES", 0)
    monkeypatch.setattr(sources, "OPEN_FILES", 2)
    for name in "abc":
        write_parquet(tmp_path / f"{name}.parquet", [f"{name}{i}" for i in range(4)], rows=2)
    documents, _, _ = opened(tmp_path / "*")
    parquet_calls.clear()
    read = [documents[i] for i in (0, 2, 4, 1, 9, 3, 6)]
    assert read == ["a0", "a2", "b0", "a1", "c1", "a3", "b2"]
    a, b, c = (f"{name}.parquet" for name in "abc")
    assert [call for call in parquet_calls if not isinstance(call, int)] == [
        *(("open", a), ("open", b), ("open", c), ("close", b), ("open", b), ("close", c)),
    ]


def test_damaged_parquet_is_named(tmp_path, texts):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"]}), path)
    with pytest.raises(InputError, match=r"a\.parquet has no column 'text': content"):
        opened(path)
    write_parquet(path, [1, 2], pa.int64())
    with pytest.raises(InputError, match=r"a\.parquet: the column 'text' holds int64"):
        opened(path)
    write_parquet(path, texts)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read"):
        opened(path)
    path.write_bytes(whole[:4] + b"\xff" * 400 + whole[404:])
    with pytest.raises(InputError, match=r"a\.parquet cannot be read: [^\n]*$"):
        list(opened(path)[0])


def test_a_fingerprint_tells_contents_of_the_same_size(tmp_path):
    path, seen = tmp_path / "a.jsonl", []
    for lines in (["1", "2", "3"], ["1", "3", "2"], ["1", "2", "4"]):
        path.write_text("\n".join(lines))
        seen.append(opened(path)[0].fingerprint())
    path = tmp_path / "a.txt"
    for text in ("a" * 9999, "b" + "a" * 9998, "a" * 9998 + "b", "aa", "ab"):
        path.write_text(text)
        seen.append(opened(path)[0].fingerprint())
    path = tmp_path / "a.parquet"
    for texts in (["a", "c"], ["b", "c"], ["a", "b"]):
        write_parquet(path, texts)
        seen.append(opened(path)[0].fingerprint())
    assert len(set(seen)) == len(seen) == 11
    assert seen[-1] == opened(tmp_path / "*.parquet")[0].fingerprint()


def test_a_file_that_vanished_is_named(folder):
    documents, _, _ = opened(folder / "*.txt")
    (folder / "003.txt").unlink()
    with pytest.raises(InputError, match=r"003\.txt cannot be read: No such file"):
        list(documents)
