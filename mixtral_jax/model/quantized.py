"""A model for inference whose matrices are int8 with a scale for each output channel.

Half the memory of bfloat16, and half the bytes that a step of decoding reads. The experts, the
attention's projections and the head are quantised; the router, the norms and the embedding are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
from flax import nnx

from mixtral_jax.kernels import int8
from mixtral_jax.model.int8 import Int8Param
from mixtral_jax.model.mixtral import Mixtral

CONTRACTED = {
    "wq_DKGH": "D",
    "wk_DKH": "D",
    "wv_DKH": "D",
    "wo_KGHD": "KGH",
    "gate_EDF": "D",
    "up_EDF": "D",
    "down_EFD": "F",
    "head_DV": "D",
}
"""By parameter, the dimensions that its product sums over; layers may stand before the others."""


def quantized(model: Mixtral, *, consume: bool = False) -> Mixtral:
    """The same model with an Int8Param in the place of each matrix that CONTRACTED names.

    Its `forward` is that of the matrices values * scale, up to rounding. It has no gradient. For
    inference on CPU give it to `unstacked`, which then shares its memory.

    Args:
      model: with stacked layers, on a mesh or as shapes.
      consume: free each matrix once it is quantised, and with it the given model: the most that is
        held is one matrix of all layers more than the given model.
    Raises:
      ValueError: if the layers are in a list: quantise before `unstacked`.
    """
    if model.head_VD is not None:
        raise ValueError("the model's layers are in a list: call quantized first, then unstacked")
    graphdef, params = nnx.split(model)
    new = nnx.merge(graphdef, jax.tree.map(lambda p: p, params))
    for module, name in _matrices(new):
        param = getattr(module, name)
        delattr(module, name)
        setattr(module, name, _quantized(param, name))
        if consume:
            param.get_value().delete()
    return new


def _matrices(model: Mixtral) -> Iterator[tuple[nnx.Module, str]]:
    """Where those of CONTRACTED are."""
    for module in (model.layers.attention, model.layers.moe, model):
        for name in CONTRACTED:
            if hasattr(module, name):
                yield module, name


def _quantized(param: nnx.Param, name: str) -> Int8Param:
    array, logical = param.get_value(), param.get_metadata("logical_axes")
    letters = name.rpartition("_")[2]
    stacked = array.ndim - len(letters)
    contracted = tuple(stacked + letters.index(letter) for letter in CONTRACTED[name])
    arrays = _quantize(array, contracted)
    kept = tuple(axis for axis in range(array.ndim) if axis not in contracted)
    scale_axes = tuple(logical[axis] for axis in kept)
    return Int8Param(arrays, (*scale_axes, *(logical[axis] for axis in contracted)), scale_axes)


_quantize = partial(jax.jit, static_argnums=1)(int8.quantize)
