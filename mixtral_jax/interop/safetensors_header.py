"""The header of a safetensors file: what it says of each tensor, checked, and made.

A file is 8 bytes with the length of the header (little-endian), the header in JSON, and the
tensors' bytes, which fill the rest without holes: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from mixtral_jax.config import InputError
from mixtral_jax.interop.strict_json import is_unicode, parse_object, quote

LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""
METADATA = {"format": "pt"}
"""What we write beside the tensors: transformers wants it."""
MOST_DIMENSIONS = 32
MOST_BYTES = 2**63 - 1

_WHOLE = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8", "BOOL": "?"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"},
    **{"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1"},
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
DTYPES = {name: np.dtype(kind) for name, kind in _WHOLE.items()}
"""The types that NumPy holds as the file does."""
PACKED = {
    "F4": (np.dtype(ml_dtypes.float4_e2m1fn), 4),
    "F6_E2M3": (np.dtype(ml_dtypes.float6_e2m3fn), 6),
    "F6_E3M2": (np.dtype(ml_dtypes.float6_e3m2fn), 6),
}
"""The types whose values share bytes in the file, with their bits."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorInfo(NamedTuple):
    """What the header says of a tensor: its bytes are start to stop of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_header(
    header: bytes, size: int, name: str
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a file of `size` bytes with this header, every claim checked.

    Args:
      header: the JSON, without the 8 bytes before it.
      size: of the whole file, in bytes.
      name: the file, as errors name it.

    Raises:
      InputError: naming the file, and the tensor where there is one.
    """
    what = f"{name}: the header"
    if not header.startswith(b"{"):  # white space may follow the object but not precede it
        raise InputError(f"{what} does not start with a brace: not a safetensors file")
    values = parse_object(header, what)
    metadata = _metadata(values.pop("__metadata__", {}), name)
    data = 8 + len(header)
    tensors = {key: _tensor(key, entry, data, name) for key, entry in values.items()}
    _check_cover(tensors, data, size, name)
    return tensors, metadata


def _metadata(values: object, name: str) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise InputError(f"{name}: __metadata__ must be an object whose values are text")
    for text in itertools.chain.from_iterable(values.items()):
        if not is_unicode(text):
            raise InputError(f"{name}: {quote(text)} in __metadata__ is not valid Unicode")
    return values


def _sizes(values: object) -> tuple[int, ...] | None:
    """A list of sizes as a tuple; None if it is anything else. True and 1.0 are not sizes."""
    if not isinstance(values, list):
        return None
    good = all(type(size) is int and 0 <= size <= MOST_BYTES for size in values)
    return tuple(values) if good else None


def _tensor(key: str, entry: object, data: int, name: str) -> TensorInfo:
    """Check what the header says of one tensor by itself; `data` is where the tensors begin."""
    where = f"{name}: tensor {quote(key)}"
    if not is_unicode(key):
        raise InputError(f"{where}: the name is not valid Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        keys = ", ".join(map(quote, list(entry)[:5])) if isinstance(entry, dict) else quote(entry)
        raise InputError(f"{where} needs dtype, shape and data_offsets alone, has {keys or 'none'}")
    kind = entry["dtype"]
    if not isinstance(kind, str) or kind not in DTYPES.keys() | PACKED.keys():
        raise InputError(f"{where}: dtype {quote(kind)} is not a type of the format")
    dtype, bits = PACKED[kind] if kind in PACKED else (DTYPES[kind], 8 * DTYPES[kind].itemsize)
    shape, offsets = _sizes(entry["shape"]), _sizes(entry["data_offsets"])
    if shape is None or len(shape) > MOST_DIMENSIONS:
        raise InputError(
            f"{where}: shape must list at most {MOST_DIMENSIONS} whole numbers from 0 to 2**63 - 1"
        )
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise InputError(f"{where}: data_offsets must be two whole numbers, in order")
    # An empty tensor too must have sizes whose product without the zeros can be counted.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize > MOST_BYTES:
        raise InputError(f"{where}: shape {quote(shape)} of {kind} is beyond any memory")
    begin, end = offsets
    if math.prod(shape) * bits != 8 * (end - begin):
        raise InputError(
            f"{where}: shape {quote(shape)} of {kind} takes {math.prod(shape) * bits} bits, "
            f"but data_offsets span {end - begin} bytes"
        )
    return TensorInfo(dtype, shape, data + begin, data + end)


def _check_cover(tensors: Mapping[str, TensorInfo], data: int, size: int, name: str) -> None:
    """The tensors must fill the file from `data` to its end, each byte once."""
    at = data
    for key, info in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if info.start != at:
            wrong = "overlaps the one before it" if info.start < at else "leaves a hole before it"
            raise InputError(f"{name}: tensor {quote(key)} {wrong}")
        if info.stop > size:
            raise InputError(
                f"{name}: tensor {quote(key)} ends at byte {info.stop} of a file of {size}: "
                "the file is cut short"
            )
        at = info.stop
    if at != size:
        raise InputError(f"{name} has {size} bytes, but its tensors end at byte {at}")


def make_header(
    tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]],
) -> bytes:
    """The length and the header, padded so that the tensors begin at a multiple of 8 bytes.

    Raises:
      ValueError: a name that is taken, or a type that the format does not have.
    """
    values: dict[str, object] = {"__metadata__": METADATA}
    at = 0
    for name, dtype, shape in tensors:
        if name in values or name == "__metadata__":
            raise ValueError(f"a tensor cannot be named {quote(name)}: the name is taken")
        if np.dtype(dtype) not in _NAMES:
            raise ValueError(f"tensor {quote(name)}: safetensors has no type for {dtype}")
        end = at + math.prod(shape) * np.dtype(dtype).itemsize
        kind = _NAMES[np.dtype(dtype)]
        values[name] = {"dtype": kind, "shape": [*map(int, shape)], "data_offsets": [at, end]}
        at = end
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
