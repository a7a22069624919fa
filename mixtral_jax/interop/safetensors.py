"""The safetensors format: tensors read where they lie in the file, and written one at a time.

The library of that name copies each tensor that NumPy reads, and wants all tensors of a file in
memory to write it; this module does neither.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import pathlib
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError
from mixtral_jax.files import naming, whole_file
from mixtral_jax.interop.safetensors_header import (
    LONGEST_HEADER,
    TensorInfo,
    make_header,
    parse_header,
)
from mixtral_jax.interop.strict_json import quote, refuse_pointer

_AT_ONCE = 2**30  # bytes; Linux writes at most 2 GiB a call
_READ_AHEAD = 2**17  # bytes; what Linux reads ahead at a time unless it is told more


class SafetensorsFile:
    """A safetensors file, open for reading; also a context manager that closes it.

    Opening reads the header, checks all of it and nothing else: it takes milliseconds whatever the
    size of the file. Arrays are views of the mapped file and stay good after `close`.

    Attributes:
      path: the file.
      tensors: a TensorInfo for each name, in the order of the header.
      metadata: the text that the header carries beside them.

    Raises:
      InputError: the file is missing, cut short, or no well-formed safetensors file; one line that
        names the file, and the tensor where there is one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self._name = one_line(self.path)
        self._map: mmap.mmap | None = None
        self._file, self._size = self._open()
        try:
            self.tensors, self.metadata = self._read_header()
        except BaseException:
            self.close()
            raise

    def _open(self) -> tuple[BinaryIO, int]:
        try:
            mode = os.stat(self.path).st_mode
            # A named pipe is not opened: that would wait for ever.
            file = open(self.path, "rb", buffering=0) if stat.S_ISREG(mode) else None  # noqa: SIM115
        except FileNotFoundError:
            raise InputError(f"{self._name} does not exist") from None
        except (OSError, ValueError) as error:  # ValueError: a path that cannot be one
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{self._name} cannot be read: {reason}") from None
        if file is None:
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError(f"{self._name} is {kind}: name a safetensors file")
        return file, os.fstat(file.fileno()).st_size

    def _read(self, length: int, at: int) -> bytes:
        try:
            data = os.pread(self._file.fileno(), length, at)
        except OSError as error:
            raise InputError(f"{self._name} cannot be read: {error.strerror}") from None
        if len(data) < length:
            raise InputError(f"{self._name} ends before the header does: it is cut short")
        return data

    def _read_header(self) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        if self._size < 8:
            raise InputError(f"{self._name} has {self._size} bytes: too few for safetensors")
        length = int.from_bytes(self._read(8, 0), "little")
        if length > LONGEST_HEADER:
            refuse_pointer(self._read(min(self._size, 99), 0), self._name)
            raise InputError(
                f"{self._name}: a header of {length} bytes, more than the format's "
                f"{LONGEST_HEADER}: not a safetensors file"
            )
        if length > self._size - 8:
            raise InputError(
                f"{self._name}: a header of {length} bytes in a file of {self._size}: cut short?"
            )
        return parse_header(self._read(length, 8), self._size, self._name)

    def array(self, name: str) -> np.ndarray:
        """A tensor as a read-only view of the file, which is read as the view is.

        Its bytes lie wherever the file has them: the view may be unaligned.

        Raises:
          KeyError: no tensor of that name.
          InputError: the file became shorter since it was opened, cannot be mapped, or the type
            packs values into parts of bytes.
        """
        info = self.tensors[name]
        where = f"{self._name}: tensor {quote(name)}"
        if info.stop - info.start != math.prod(info.shape) * info.dtype.itemsize:
            raise InputError(f"{where} is {info.dtype}, packed: NumPy cannot hold it as it is")
        if info.start == info.stop:
            view = np.empty(info.shape, info.dtype)
            view.flags.writeable = False
            return view
        mapped = self._mapped()
        if os.fstat(self._file.fileno()).st_size < info.stop:  # reading on would kill the process
            raise InputError(f"{where} is gone: the file became shorter since it was opened")
        return np.ndarray(info.shape, info.dtype, buffer=mapped, offset=info.start)

    def prefetch(self, name: str) -> None:
        """Have the kernel read a tensor ahead, while this process does something else."""
        info = self.tensors[name]
        # In parts, because Linux heeds only the first of a longer request; and not by mmap's
        # madvise, which lets no other thread run until the disk has taken the request.
        for start in range(info.start, info.stop, _READ_AHEAD):
            size = min(_READ_AHEAD, info.stop - start)
            with contextlib.suppress(OSError):  # advice that a file system may not take
                os.posix_fadvise(self._file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def release(self, name: str) -> None:
        """Give a tensor's memory back; a view of it stays good and is read again if used."""
        info = self.tensors[name]
        if info.start < info.stop:
            # Outwards to whole pages: a neighbour that shares one is read again, never lost.
            start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            with contextlib.suppress(OSError):  # advice that a file system may not take
                self._mapped().madvise(mmap.MADV_DONTNEED, start, info.stop - start)

    def _mapped(self) -> mmap.mmap:
        if self._file.closed:
            raise ValueError(f"{self._name} is closed")
        if self._map is None:
            try:
                self._map = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:  # ValueError: shorter than it was
                reason = getattr(error, "strerror", None) or "it became shorter"
                raise InputError(f"{self._name} cannot be mapped: {reason}") from None
        return self._map

    def close(self) -> None:
        """Let go of the file. Views that are still in use keep it mapped until they go."""
        self._map = None
        self._file.close()

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    data = memoryview(data)
    while data:
        data = data[file.write(data[:_AT_ONCE]) :]


def _stream(
    file: BinaryIO,
    tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
    arrays: Iterator[np.ndarray],
) -> None:
    """Write each array as it comes, if it is what was announced."""
    for number, (name, dtype, shape) in enumerate(tensors):
        array = next(arrays, None)
        if array is None:
            raise ValueError(f"{len(tensors)} arrays were announced, {number} came")
        array = np.asarray(array)
        if array.dtype != dtype or array.shape != tuple(shape):
            raise ValueError(
                f"tensor {quote(name)} was announced as {np.dtype(dtype)} {tuple(shape)}, "
                f"but is {array.dtype} {array.shape}"
            )
        # As bytes, because ml_dtypes has no buffers; a copy only where the array has gaps.
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        _write(file, data)
        del array, data  # or it would still be here while the next one is made
    if next(arrays, None) is not None:
        raise ValueError(f"{len(tensors)} arrays were announced, more came")


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
    arrays: Iterable[np.ndarray],
) -> int:
    """Write a safetensors file from arrays that come one at a time, as they come.

    The file appears under its name when it is whole and on the disk; before that, and after any
    error, there is nothing of that name but what was there before.

    Args:
      path: the file; its folder exists.
      tensors: name, type and shape of every array, in the order of the file.
      arrays: the arrays; each is let go of before the next is asked for.

    Returns:
      The size of the file in bytes.

    Raises:
      InputError: the file cannot be written.
      ValueError: an array is not what was announced, or there are too few or too many; a name
        twice; a type that the format does not have.
    """
    header = make_header(tensors)
    with (
        naming(one_line(path)),
        whole_file(path) as unfinished,
        open(unfinished, "xb", buffering=0) as file,
    ):
        _write(file, header)
        _stream(file, tensors, iter(arrays))
        return file.tell()
