"""What a program needs in a chip's memory, from the compiler, whether it fits or not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax

from mixtral_jax.config import InputError


def memory_of(compile: Callable[[], jax.stages.Compiled], arguments: Any, limit: int) -> dict:
    """`fits`, and `bytes_per_device` of a program as the compiler places it.

    `output` leaves out what overwrites arguments. Of a program that does not fit, these are what
    the compiler says that it would need.

    Args:
      compile: compiles it. For TPUs it fails if the program does not fit; for GPUs it does not.
      arguments: a tree of ShapeDtypeStructs with shardings.
      limit: bytes of one device.
    Raises:
      InputError: if the compiler refuses the program for another reason than its size.
    """
    try:
        memory = compile().memory_analysis()
    except RuntimeError as error:
        if "cuDNN not found" in str(error):
            raise InputError(
                "cuDNN is not installed: pip install -r requirements-gpu.txt, or use xla"
            ) from None
        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        if "RESOURCE_EXHAUSTED" not in str(error):
            reason = str(error).splitlines()[0]
            raise InputError(
                f"the compiler refuses this program ({reason}): try another mesh, or another "
                "model.exchange"
            ) from None
        held, wanted = bytes_of(arguments), needed_bytes(str(error))
        # It is the whole program's, though the compiler may call it that of temporaries.
        temporaries = max(wanted - held, 0)
        fits, parts = False, {"arguments": held, "temporaries": temporaries, "output": 0}
    else:
        parts = {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "output": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        }
        fits = sum(parts.values()) <= limit
    return {
        "fits": fits,
        "bytes_per_device": {**parts, "total": sum(parts.values()), "limit": limit},
    }


def needed_bytes(message: str) -> int:
    """What a program needs, from the compiler's complaint that it does not fit; 0 if it is mute."""
    found = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds", message)
    found = found or re.search(r"Used ([\d.]+)([KMGT]?) of", message)
    if not found:
        return 0
    return round(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1 if found[2] else 0))


def bytes_of(abstract: Any) -> int:
    """Bytes on one device of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize
        for a in jax.tree.leaves(abstract)
    )
