"""What a user gives a model, checked: as int32 in JAX, any number is an index of something."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from mixtral_jax.config import InputError


def check(tokens_BL: Any, positions_BL: Any, segments_BL: Any, vocab_size: int) -> None:
    """Raises InputError, in one line, for what is no batch of token ids of this vocabulary.

    Of arrays that are traced, or lie on several hosts, values are not looked at.
    """
    shape = np.shape(tokens_BL)
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"token ids have shape {shape}: give [batch, length], of 1 or more each")
    given = {"token ids": tokens_BL, "positions_BL": positions_BL, "segments_BL": segments_BL}
    for name, array in given.items():
        if array is None:
            continue
        dtype = getattr(array, "dtype", None) or np.asarray(array).dtype
        if not np.issubdtype(dtype, np.integer):
            raise InputError(f"{name} are of type {dtype}: give whole numbers")
        if np.shape(array) != shape:
            raise InputError(f"{name} have shape {np.shape(array)}, and token ids {shape}")
    if _seen(tokens_BL):
        ids_BL = np.asarray(tokens_BL)
        outside_BL = (ids_BL < 0) | (ids_BL >= vocab_size)
        if outside_BL.any():
            row, place = np.argwhere(outside_BL)[0]
            raise InputError(
                f"token id {ids_BL[row, place]} at [{row}, {place}] is not in "
                f"0..{vocab_size - 1} (model.vocab_size={vocab_size})"
            )
    if segments_BL is None and positions_BL is not None and _seen(positions_BL):
        steps = np.diff(np.asarray(positions_BL), axis=1)
        if steps.size and steps.min() <= 0:
            raise InputError(
                "positions_BL begin again: say with segments_BL which document is which"
            )


def _seen(array: Any) -> bool:
    """Whether this process has the values."""
    if isinstance(array, jax.core.Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable
