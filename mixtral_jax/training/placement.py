"""Batches from the hosts onto the mesh, and what each host knows of them to all."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax import sharding
from mixtral_jax.config import Config
from mixtral_jax.data.packing import Batch


class Placement:
    """Which rows of the global batch this host holds, and how they become global arrays.

    Global arrays are [M, B, L]: microbatch m has the rows m B .. (m + 1) B of the global batch,
    split over the mesh's batch axes.
    """

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        training = config.training
        self._micro = training.gradient_accumulation
        self._rows = training.batch_size // self._micro
        self.shape = (self._micro, self._rows, training.sequence_length)
        self.sharding = sharding.on(mesh, None, "batch")
        mine = self.sharding.addressable_devices_indices_map(self.shape).values()
        self.rows = sorted({row for index in mine for row in self._global_rows(index[1])})
        """Rows of the global batch that this host must supply."""

    def _global_rows(self, rows: slice) -> list[int]:
        within = range(*rows.indices(self._rows))
        return [m * self._rows + row for m in range(self._micro) for row in within]

    def abstract(self) -> Batch:
        """Shapes, types and shardings of a placed batch."""
        one = jax.ShapeDtypeStruct(self.shape, np.int32, sharding=self.sharding)
        return Batch(one, one, one, one)

    def __call__(self, batch: Batch, rows: list[int] | None = None) -> Batch:
        """Global arrays from this host's rows; `rows` names those of the batch, if not its own."""
        place = {row: i for i, row in enumerate(self.rows if rows is None else rows)}

        def to_global(local):
            def part(index):
                picked = local[[place[row] for row in self._global_rows(index[1])]]
                return picked.reshape(self._micro, -1, local.shape[-1])

            return jax.make_array_from_callback(self.shape, self.sharding, part)

        return Batch(*map(to_global, batch))

    def of_all_rows(self, mine: np.ndarray) -> np.ndarray:
        """A line, none of them negative, for each row of the global batch, from each host's own."""
        lines = np.full((self._micro * self._rows, mine.shape[1]), -1, np.int64)
        lines[self.rows] = mine
        if jax.process_count() == 1:
            return lines
        return multihost_utils.process_allgather(lines).max(axis=0)
