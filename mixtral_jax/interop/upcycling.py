"""Sparse upcycling: a mixture of experts that starts as copies of a dense model.

Every expert is the dense model's feed-forward network, so that, whatever the router says and with
weights that sum to 1, the first forward pass is the dense model's. Training then parts them.
Source: Sparse Upcycling, arXiv 2212.05055.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.interop import names
from mixtral_jax.interop.configs import MOST_EXPERTS
from mixtral_jax.interop.names import Piece
from mixtral_jax.interop.source import File, FileWeights
from mixtral_jax.interop.strict_json import quote


class Upcycled:
    """The weights of a dense checkpoint, as a Mixtral's: the interface of FileWeights."""

    def __init__(self, dense: FileWeights, experts: int, per_token: int, seed: int):
        """Args: the dense weights, experts per layer, experts per token, the router's seed.

        Raises:
          InputError: if the weights have experts already, or the numbers do not fit.
        """
        if not dense.format.dense:
            raise InputError("--upcycle is for a dense model, and this one has experts already")
        if seed < 0:
            raise InputError(f"--seed={seed} must be at least 0")
        if experts > MOST_EXPERTS:  # which nothing could read again
            raise InputError(f"--upcycle {quote(experts)} must be at most {MOST_EXPERTS}")
        self._dense, self._seed = dense, seed
        try:
            self.config: ModelConfig = dataclasses.replace(
                dense.config, num_local_experts=experts, num_experts_per_tok=per_token
            )
        except InputError as error:
            flags = f"--upcycle {quote(experts)} --experts-per-token {quote(per_token)}"
            raise InputError(f"{flags}: {error}") from None

    @property
    def places(self) -> list[Piece]:
        """In the order of the files; the routers, which have no file, come last."""
        order = {piece: number for number, piece in enumerate(self._dense.places)}
        return sorted(
            names.pieces(self.config), key=lambda piece: order.get(self._origin(piece), len(order))
        )

    @property
    def files(self) -> list[File]:
        return self._dense.files

    @property
    def nbytes(self) -> int:
        """Of all pieces, copies included."""
        return self.config.num_parameters * np.dtype(self._router_dtype).itemsize

    @property
    def _router_dtype(self) -> np.dtype:
        return self._dense.dtype(Piece(names.HEAD))

    def _origin(self, piece: Piece) -> Piece:
        return piece if piece.expert is None else piece._replace(expert=0)

    def dtype(self, piece: Piece) -> np.dtype:
        if piece.parameter == names.ROUTER:
            return self._router_dtype
        return self._dense.dtype(self._origin(piece))

    def read(
        self, piece: Piece, wanted: str = "", slices: Mapping[str, slice] | None = None
    ) -> tuple[np.ndarray, str]:
        """As FileWeights.read; a router is drawn anew, from the seed and the layer alone."""
        if piece.parameter != names.ROUTER:
            return self._dense.read(self._origin(piece), wanted, slices)
        sizes, letters = names.sizes(self.config), "ED"
        random = np.random.default_rng([self._seed, piece.layer])
        shape = [sizes[letter] for letter in letters]
        array = self.config.initializer_range * random.standard_normal(shape, np.float32)
        part = tuple((slices or {}).get(letter, slice(None)) for letter in letters)
        return array.astype(self.dtype(piece))[part], letters

    def prefetch(self, piece: Piece) -> None:
        if piece.parameter != names.ROUTER:
            self._dense.prefetch(self._origin(piece))

    def release(self, piece: Piece) -> None:
        if piece.parameter != names.ROUTER:
            self._dense.release(self._origin(piece))

    def close(self) -> None:
        self._dense.close()
