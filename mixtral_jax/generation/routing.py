"""Which experts the tokens of a text go to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mixtral_jax import sharding
from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.generation.placing import Placing
from mixtral_jax.generation.rows import length_of
from mixtral_jax.model.mixtral import Mixtral


class ChosenExperts:
    """The experts of a model's tokens, by a program for each layer and length that is asked for."""

    def __init__(self, merge: Callable[[Any], Mixtral], config: ModelConfig, placing: Placing):
        """Args: merge: makes the model of its parameters."""

        def experts(params, tokens_BL, segments_BL, layer):
            return merge(params).chosen_experts(tokens_BL, segments_BL, layer)

        self._layers, self._placing = config.num_hidden_layers, placing
        self._experts = jax.jit(experts, static_argnames="layer")

    def __call__(self, params: Any, tokens: Sequence[int], layer: int) -> np.ndarray:
        """ids_TC of the experts that each token goes to, best first.

        Raises:
          InputError: if there is no such layer.
        """
        if not 0 <= layer < self._layers:
            raise InputError(f"layer {layer} is not in 0..{self._layers - 1}")
        padded = np.zeros((self._placing.shards, length_of(len(tokens))), np.int32)
        padded[0, : len(tokens)] = tokens
        real = np.zeros_like(padded)
        real[0, : len(tokens)] = 1
        with jax.set_mesh(self._placing.mesh):
            ids = self._experts(params, *self._placing.split(padded, real), layer=layer)
            return np.asarray(sharding.shard(ids, None, None, None))[0, : len(tokens)]
