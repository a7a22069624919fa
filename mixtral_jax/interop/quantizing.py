"""Matrices on their way from a file into int8, each by the host that reads it.

The scale of a channel is that of all its values: where devices split what a product sums over, each
reads the whole of it and keeps its own part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from mixtral_jax.config import ModelConfig
from mixtral_jax.interop import names
from mixtral_jax.interop.layout import transposition
from mixtral_jax.interop.names import Piece
from mixtral_jax.interop.source import FileWeights
from mixtral_jax.kernels.int8 import LARGEST, LEAST_SCALE, STEP
from mixtral_jax.model.mixtral import Mixtral
from mixtral_jax.model.quantized import CONTRACTED, quantized

BLOCK = 1 << 18
"""Values that are float32 at a time."""


class Part(NamedTuple):
    """What an array of the model holds of the matrix, or vector, that the files name."""

    parameter: str
    letters: str
    """The array's own, without the layers'."""
    field: str
    """values or scale of what is in int8; empty for a parameter as it is."""


def part_of(name: str) -> Part:
    """Of an array by its path in the model."""
    parameter, _, field = name.rpartition(".")
    if field not in ("values", "scale"):
        return Part(name, names.letters_of(name), "")
    letters = names.letters_of(parameter)
    contracted = _contracted(parameter)
    kept = "".join(letter for letter in letters if letter not in contracted)
    return Part(parameter, kept + contracted * (field == "values"), field)


def abstract_state(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """As `mixtral.abstract_state`, of the model in int8."""
    return nnx.split(nnx.eval_shape(lambda: quantized(Mixtral(config, jax.random.key(0)))))


def read(weights: FileWeights, piece: Piece, part: Part, slices: Mapping[str, slice]):
    """The slices, by letter, of a part of a piece: (array, bytes of the file that it stands for).

    Args:
      part: its field is not empty.
    """
    contracted = _contracted(piece.parameter)
    kept = {letter: where for letter, where in slices.items() if letter not in contracted}
    array, letters = weights.read(piece, slices=kept)
    order = "".join(kept) + contracted
    values, scale = quantize(array.transpose(transposition(letters, order)), len(contracted))
    if part.field == "scale":
        return scale, 0
    values = values[(..., *(slices[letter] for letter in contracted))]
    return values, values.size * array.itemsize


def quantize(w: np.ndarray, contracted: int) -> tuple[np.ndarray, np.ndarray]:
    """(values, scale), bit for bit those of kernels.int8.quantize; what is summed over lies last.

    Args:
      contracted: the number of those dimensions.
    """
    kept = w.shape[: w.ndim - contracted]
    matrix = w.reshape(math.prod(kept), -1)
    values, scale = np.empty(matrix.shape, np.int8), np.empty(matrix.shape[0], np.float32)
    step = max(1, BLOCK // matrix.shape[1])
    for row in range(0, matrix.shape[0], step):
        rows = slice(row, row + step)
        wide = _float32(matrix[rows])
        scale[rows] = np.abs(wide).max(axis=1) * STEP
        scale[rows][scale[rows] < LEAST_SCALE] = 1
        with np.errstate(invalid="ignore"):  # an infinity times 0
            wide *= 1 / scale[rows, None]
        wide[~np.isfinite(scale[rows])] = 0  # of NaN NumPy makes any int8
        values[rows] = np.rint(wide, out=wide).clip(-LARGEST, LARGEST)
    return values.reshape(w.shape), scale.reshape(kept)


def _float32(matrix: np.ndarray) -> np.ndarray:
    """A copy; bfloat16 by its bits, for NumPy's own conversion lets no other thread run."""
    if matrix.dtype != ml_dtypes.bfloat16:
        return matrix.astype(np.float32)
    return (matrix.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _contracted(parameter: str) -> str:
    return CONTRACTED[parameter.rpartition(".")[2]]
