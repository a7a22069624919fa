"""Documents in files, read one at a time by number.

A glob names files; a file holds documents: a .jsonl or .ndjson file one a line and a .parquet file
one a row, both in the field `text`; any other file is one document, but for .json, which is
refused. Opening indexes where documents start and holds no text. A document that cannot be read is
counted in a MalformedReport and reads as None.
"""

from __future__ import annotations

import array
import bisect
import collections
import hashlib
import itertools
import json
import logging
import os
import threading
import zlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError, SourceConfig
from mixtral_jax.data.globs import expand, fixed_folder

FIELD = "text"
ROW_GROUP_CACHE_BYTES = 256 * 2**20
OPEN_FILES = 64  # .parquet files; a process may often have 1024 of all kinds
ENDS = 4096  # bytes of each end of a text that tell it from another of the same size

log = logging.getLogger(__name__)


class MalformedReport:
    """Which documents could not be read; each counts once, however often it is drawn.

    Args:
      fatal: raise an InputError for the first of them instead.
    """

    NAMED = 5

    def __init__(self, fatal: bool = False):
        self._fatal = fatal
        self._seen: set[str] = set()
        self.names: list[str] = []
        """The first few, as path, path:line or path:row, printable; they count from 1."""

    @property
    def count(self) -> int:
        return len(self._seen)

    def add(self, name: str, reason: str) -> None:
        name = one_line(name)
        if self._fatal:
            raise InputError(f"{name}: {reason}; data.malformed=skip leaves such documents out")
        if name in self._seen:
            return
        self._seen.add(name)
        if self.count <= self.NAMED:
            self.names.append(name)
        if self.count <= self.NAMED or self.count & (self.count - 1) == 0:  # then powers of two
            log.warning("skipped %s: %s; malformed documents so far: %d", name, reason, self.count)

    def __str__(self) -> str:
        named = ", ".join(self.names) + (", ..." if self.count > len(self.names) else "")
        plural = "" if self.count == 1 else "s"
        return f"{self.count} malformed document{plural}" + (f": {named}" if named else "")


class Documents:
    """The documents of some files, in the order of the files.

    `documents[i]` is the text, or None if document i is malformed; a random-access source for
    grain. Reading raises InputError if a file has vanished or is damaged. Threads may share it.

    Args:
      files: by name, which does not say where the folder of the glob is.
    """

    def __init__(self, files: Sequence[tuple[str, _File]], malformed: MalformedReport):
        self._names = [name for name, file in files if len(file)]
        self._files = [file for _, file in files if len(file)]
        self._ends = list(itertools.accumulate(len(file) for file in self._files))
        self._malformed = malformed

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def fingerprint(self) -> str:
        """A line that tells these documents from others, by the files' names, sizes and contents.

        Of the contents: all lines of a .jsonl file, the footer of a .parquet file with the
        statistics of its columns, and the ends of other files.
        """
        sizes = [os.path.getsize(file.path) for file in self._files]
        sums = [file.checksum for file in self._files]
        told = list(zip(self._names, sizes, sums, strict=True))
        digest = hashlib.sha256(repr(told).encode()).hexdigest()[:12]
        return f"{len(self):,} documents in {len(sizes):,} files, {sum(sizes):,} bytes, {digest}"

    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """For each document a uint64 that its file's name makes, and its number in the file."""
        digests = (hashlib.sha256(os.fsencode(name)).digest() for name in self._names)
        hashes_F = np.array([int.from_bytes(d[:8], "little") for d in digests], np.uint64)
        lengths_F = [len(file) for file in self._files]
        starts_F = np.array(self._ends, np.int64) - lengths_F
        numbers_N = np.arange(len(self)) - np.repeat(starts_F, lengths_F)
        return np.repeat(hashes_F, lengths_F), numbers_N

    def __getitem__(self, index: int) -> str | None:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self._ends, index)
        file = self._files[place]
        local = int(index) - (self._ends[place] - len(file))
        try:
            text = file.read(local)
            text.encode()  # JSON can spell half a surrogate pair, which is no text
            return text
        except UnicodeError as error:
            self._malformed.add(file.name(local), f"not Unicode text ({error.reason})")
        except _Malformed as error:
            self._malformed.add(file.name(local), str(error))
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(file.path, error) from None
        return None


def open_sources(
    section: str,
    sources: Sequence[SourceConfig],
    malformed: MalformedReport,
    taken: set[str],
) -> tuple[Documents, list[int]]:
    """The documents of several sources as one sequence, and how many each source has.

    A file belongs to the first source that names it: paths in `taken` are passed over, and the
    paths opened here are added to it.

    Args:
      section: what an error calls the sources, such as data.train.
    Raises:
      InputError: naming a glob without documents, or a file that cannot be indexed.
    """
    files, sizes = [], []
    cache = _RowGroups(ROW_GROUP_CACHE_BYTES)
    for source in sources:
        where = f"{section}: {source.files}"
        paths = expand(source.files)
        if not paths:
            raise InputError(f"{where} matches no file")
        paths = {os.path.realpath(path): path for path in reversed(paths)}
        mine = sorted(path for real, path in paths.items() if real not in taken)
        if not mine:
            raise InputError(
                f"{where} matches only files that data.validation or an earlier source names"
            )
        taken.update(paths)
        opened = [_open(path, cache) for path in mine]
        folder = fixed_folder(source.files)
        sizes.append(sum(map(len, opened)))
        if not sizes[-1]:
            raise InputError(f"{where} matches only empty files ({len(mine)} of them)")
        files += [(os.path.relpath(file.path, folder), file) for file in opened]
    return Documents(files, malformed), sizes


# ---- one file ----------------------------------------------------------------------------------


class _Malformed(Exception):
    """This document, and not its whole file, cannot be read."""


class _TextFile:
    """A file that is one document; an empty file has none."""

    def __init__(self, path: str):
        self.path = path
        size = os.path.getsize(path)
        self._length = int(size > 0)
        with open(path, "rb") as file:
            head = file.read(ENDS)
            file.seek(max(ENDS, size - ENDS))
            self.checksum = zlib.crc32(head + file.read(ENDS))

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        return self.path

    def read(self, index: int) -> str:
        with open(self.path, "rb") as file:
            return file.read().decode("utf-8-sig")  # without a byte order mark at its start


class _JsonLines:
    """A file with one JSON object a line; blank lines are no documents."""

    def __init__(self, path: str):
        self.path = path
        self._starts = array.array("q")  # byte offset of each document
        self._blanks = array.array("q")  # for each blank line, the documents before it
        position = self.checksum = 0
        with open(path, "rb") as file:
            for line in file:
                if line.isspace():
                    self._blanks.append(len(self._starts))
                else:
                    self._starts.append(position)
                position += len(line)
                self.checksum = zlib.crc32(line, self.checksum)
        self._size = position

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, index: int) -> str:
        return f"{self.path}:{1 + index + bisect.bisect_right(self._blanks, index)}"

    def read(self, index: int) -> str:
        with open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < self._size:
                raise InputError(f"{self.path} has been cut short since it was opened")
            file.seek(self._starts[index])
            line = file.readline().decode("utf-8-sig")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            raise _Malformed("not JSON") from None
        text = record.get(FIELD) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise _Malformed(f"no text in the field {FIELD!r}")
        return text


class _Parquet:
    """A table with one document a row.

    A read decodes the row group around it, so shuffled reads are fast where the row groups are
    small (about 1000 rows) or the text of all files fits the cache.
    """

    def __init__(self, path: str, cache: _RowGroups):
        self.path = path
        self._cache = cache
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        with open(path, "rb") as file:  # it ends in the footer, its length in 4 bytes, and 4 more
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(4), "little")
            file.seek(-8 - length, os.SEEK_END)
            self.checksum = zlib.crc32(file.read(length))
        if schema.names.count(FIELD) != 1:
            many = "no column" if FIELD not in schema.names else "more than one column"
            raise InputError(f"{path} has {many} {FIELD!r}: {', '.join(schema.names)}")
        kind = schema.field(FIELD).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if kind not in (pa.string(), pa.large_string(), pa.string_view()):
            raise InputError(f"{path}: the column {FIELD!r} holds {kind}, not strings")
        self._ends = list(itertools.accumulate(rows))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def name(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def read(self, index: int) -> str:
        group = bisect.bisect_right(self._ends, index)
        column = self._cache.column(self.path, group)
        text = column[index - (self._ends[group] - len(column))].as_py()
        if text is None:
            raise _Malformed(f"no text in the column {FIELD!r}")
        return text


class _RowGroups:
    """The row groups read last, up to a number of bytes in all, and the files read last, open.

    Opening a file parses its footer, which describes all of its row groups.
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._bytes = 0
        self._columns: collections.OrderedDict[tuple[str, int], pa.ChunkedArray]
        self._columns = collections.OrderedDict()
        self._files: collections.OrderedDict[str, pq.ParquetFile] = collections.OrderedDict()
        self._lock = threading.Lock()

    def column(self, path: str, group: int) -> pa.ChunkedArray:
        key = (path, group)
        with self._lock:
            if key not in self._columns:
                read = self._file(path).read_row_group(group, columns=[FIELD])
                self._columns[key] = read.column(FIELD)
                self._bytes += self._columns[key].nbytes
            self._columns.move_to_end(key)
            while len(self._columns) > 1 and self._bytes > self._capacity:
                self._bytes -= self._columns.popitem(last=False)[1].nbytes
            return self._columns[key]

    def _file(self, path: str) -> pq.ParquetFile:
        if path not in self._files:
            self._files[path] = pq.ParquetFile(path)
        self._files.move_to_end(path)
        if len(self._files) > OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        return self._files[path]


_File = _TextFile | _JsonLines | _Parquet


def _open(path: str, cache: _RowGroups) -> _File:
    suffix = os.path.splitext(path)[1].lower()
    try:
        if suffix == ".parquet":
            return _Parquet(path, cache)
        if suffix == ".json":
            raise InputError(
                f"{path} is neither text nor lines of JSON by its name: call it .jsonl if each "
                "line is an object, or .txt if it is text"
            )
        return _JsonLines(path) if suffix in (".jsonl", ".ndjson") else _TextFile(path)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
    return InputError(f"{path} cannot be read: {reason}")
