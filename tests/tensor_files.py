"""Files in the safetensors format: made by hand, and read by the library and by us."""

import json

import ml_dtypes
import numpy as np
import safetensors

from mixtral_jax.interop.safetensors import SafetensorsFile
from mixtral_jax.interop.safetensors_header import DTYPES, PACKED

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


def raw(data):
    """What the library finds in these bytes: type, shape and bytes of every tensor."""
    return {k: (v["dtype"], tuple(v["shape"]), v["data"]) for k, v in safetensors.deserialize(data)}


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
