"""Between a tensor of a file and a piece of the model: split, pick, cut and transpose.

Everything here is NumPy and mostly views, so that a slice of a memory-mapped tensor is read from
disk when it is copied, and no sooner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mixtral_jax.interop.names import Entry

Sizes = Mapping[str, int]
"""What each letter counts; see names.sizes."""


def tensor_shape(entry: Entry, sizes: Sizes) -> tuple[int, ...]:
    """The shape of the tensor that an entry names."""
    return tuple(math.prod(sizes[letter] for letter in group) for group in entry.layout.split())


def letters_of(entry: Entry) -> str:
    """The layout of an entry's tensor in the model's letters, all dimensions apart."""
    return entry.layout.replace(" ", "").replace("hp", "H")


def from_tensor(
    tensor: np.ndarray,
    entry: Entry,
    sizes: Sizes,
    expert: int | None,
    slices: Mapping[str, slice] | None,
) -> tuple[np.ndarray, str]:
    """The part of a piece that slices name, and its layout.

    The layout is the tensor's own, as far as the dimensions go that are left, so that the part is
    a view of the tensor, unless pairs that RoPE turns together must be brought apart.

    Args:
      tensor: of the shape that `tensor_shape` gives.
      expert: which one, where the tensor holds several and the piece is one expert's.
      slices: by letter of the model; others are whole.
    """
    letters = entry.layout.replace(" ", "")
    array = tensor.reshape([sizes[letter] for letter in letters])
    for letter, place in (("g", entry.half), ("E", expert)):
        if letter in letters and place is not None:
            array = array[(slice(None),) * letters.index(letter) + (place,)]
            letters = letters.replace(letter, "")
    if slices:
        array = array[tuple(slices.get(letter, slice(None)) for letter in letters)]
    if "hp" in letters:
        at = letters.index("hp")
        array = np.moveaxis(array, at + 1, at)
        shape = array.shape
        array = array.reshape(*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
        letters = letters.replace("hp", "H")
    return array, letters


def to_tensor(array: np.ndarray, letters: str, entry: Entry, sizes: Sizes) -> np.ndarray:
    """The whole tensor that an entry names, from a piece of this layout.

    Only for entries whose tensors hold one piece each.
    """
    wanted = entry.layout.replace(" ", "")
    array = array.transpose(transposition(letters, letters_of(entry)))
    if "hp" in wanted:
        at = wanted.index("hp")
        shape = array.shape
        array = array.reshape(*shape[:at], 2, shape[at] // 2, *shape[at + 1 :])
        array = np.moveaxis(array, at, at + 1)
    return array.reshape(tensor_shape(entry, sizes))


def transposition(letters: str, wanted: str) -> Sequence[int]:
    """The axes for a transpose from one layout to another of the same letters."""
    return tuple(letters.index(letter) for letter in wanted)
