"""From the engine's tasks to arrays on its devices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from mixtral_jax import sharding
from mixtral_jax.generation.answering import Task
from mixtral_jax.generation.free_memory import free_memory
from mixtral_jax.generation.programs import ENDS, NOTHING, Lanes, RowOptions
from mixtral_jax.generation.request import Options
from mixtral_jax.generation.rows import Part
from mixtral_jax.generation.sampling import Parameters

SHARE = 0.8
"""Of the free memory that a cache may take."""


class Placing:
    """Arrays of rows, and of lanes, split over the devices as the batch is."""

    def __init__(self, mesh: jax.sharding.Mesh, rows: int, shards: int):
        """Args: rows: of the cache; shards: devices that they are split over."""
        self.mesh, self.rows, self.shards = mesh, rows, shards
        self._each = rows // shards

    def rows_of(self, shard: int) -> range:
        """The rows that lie on a device."""
        return range(shard * self._each, (shard + 1) * self._each)

    def shard_of(self, row: int) -> int:
        """The device that a row lies on."""
        return row // self._each

    def split(self, *arrays: np.ndarray):
        return self._placed(arrays, sharding.on(self.mesh, "batch"))

    def whole(self, *arrays: np.ndarray):
        """Arrays that every device has."""
        return self._placed(arrays, sharding.replicated(self.mesh))

    @staticmethod
    def _placed(arrays: Sequence[np.ndarray], where: jax.sharding.Sharding):
        if jax.process_count() == 1:
            return jax.device_put(arrays, where)
        # device_put would have the hosts compare each array; they asked the same at the start.
        return tuple(jax.make_array_from_callback(a.shape, where, a.__getitem__) for a in arrays)

    def lanes(self, shape: tuple[int, int], parts: dict[int, Part]) -> Lanes:
        """Parts of prompts by lane.

        Args: shape: lanes of each device, and the tokens that each is padded to.
        """
        each, length = shape
        tokens = np.zeros((self.shards * each, length), np.int32)
        following = np.zeros_like(tokens)
        row, start, count = (np.zeros(len(tokens), np.int32) for _ in range(3))
        last = np.zeros(len(tokens), bool)
        for lane, part in parts.items():
            end = part.start + part.count
            tokens[lane, : part.count] = part.task.prompt[part.start : end]
            after = part.task.prompt[part.start + 1 : end + 1]
            following[lane, : len(after)] = after
            row[lane], start[lane] = part.task.row % self._each, part.start
            count[lane], last[lane] = part.count, part.answers
        return Lanes(*self.split(tokens, following, row, start, count, last))

    def marks(self, vocabulary: int, tasks: dict[int, Task]):
        """(row_X, use_X, in_prompt_XV, bias_XV) for a task on some of the devices."""
        shape = (self.shards, vocabulary)
        in_prompt, bias = np.zeros(shape, bool), np.zeros(shape, np.float32)
        row, use = np.zeros(self.shards, np.int32), np.zeros(self.shards, bool)
        for shard, task in tasks.items():
            row[shard], use[shard] = task.row % self._each, True
            in_prompt[shard, task.prompt] = True
            for token, value in task.options.logit_bias:
                bias[shard, token] = value
        return self.split(row, use, in_prompt, bias)

    def row_options(self, tasks: Sequence[Task | None]) -> RowOptions:
        """What tasks ask, one a row; neutral where there is none."""
        options = [Options(temperature=0.0) if task is None else task.options for task in tasks]
        ends = np.full((len(tasks), ENDS), NOTHING, np.int32)
        for row, task in zip(ends, tasks, strict=True):
            if task is not None:
                row[: len(task.ends)] = task.ends

        def column(dtype, name):
            return np.array([getattr(o, name) for o in options], dtype)

        seed = np.array([0 if task is None else task.seed for task in tasks], np.uint32)
        wanted = np.array([o.logprobs is not None for o in options])
        parameters = Parameters(
            temperature_B=column(np.float32, "temperature"),
            top_k_B=column(np.int32, "top_k"),
            top_p_B=column(np.float32, "top_p"),
            min_p_B=column(np.float32, "min_p"),
            repetition_B=column(np.float32, "repetition_penalty"),
            presence_B=column(np.float32, "presence_penalty"),
            frequency_B=column(np.float32, "frequency_penalty"),
        )
        least = column(np.int32, "min_new_tokens")
        placed = self.split(seed, least, ends, wanted, *parameters)
        return RowOptions(*placed[:4], Parameters(*placed[4:]))


def memory_of_device(mesh: jax.sharding.Mesh) -> float:
    """Bytes that JAX has of each device; infinity where it does not say."""
    stats = mesh.local_mesh.devices.flat[0].memory_stats() or {}
    return stats.get("bytes_limit", math.inf)


def rows_that_fit(size: int, mesh: jax.sharding.Mesh) -> int:
    """Rows of a cache that free memory holds, a multiple of the devices that they are split over.

    On several hosts, what the one with the least of it has room for.

    Args:
      size: bytes of a row, on all devices of the tensor axis together.
    """
    with jax.set_mesh(mesh):
        shards, tensor = sharding.batch_shards(), sharding.tensor_shards()
    stats = mesh.local_mesh.devices.flat[0].memory_stats() or {}
    if "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        fit = shards * int(SHARE * free // (size / tensor))
    else:
        fit = int(SHARE * free_memory() // size) * jax.process_count() // shards * shards
    if jax.process_count() == 1:
        return fit
    return int(multihost_utils.process_allgather(np.int64(fit)).min())
