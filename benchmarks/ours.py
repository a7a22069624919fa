"""What mixtral_jax brings to the benchmarks: a training step, and answers decoded."""

from __future__ import annotations

import time

import measure  # noqa: F401  (finds the package)

from mixtral_jax import config_io, sharding
from mixtral_jax.command_line import give_back_memory
from mixtral_jax.config import Config, MeshConfig, ModelConfig
from mixtral_jax.model.flops import experts_visited


def load(path: str, overrides: list[str]) -> Config:
    """A config, for random tokens."""
    return config_io.load(path, ["data.source=synthetic", *overrides])


class Training:
    """A training step that has been compiled, and what it works on."""

    def __init__(self, config: Config):
        sharding.start(config.mesh)
        import jax

        from mixtral_jax.data.batches import synthetic_batch
        from mixtral_jax.training import step as steps
        from mixtral_jax.training.placement import Placement

        self.mesh = sharding.mesh_from_config(config.mesh)
        with jax.set_mesh(self.mesh):
            began = time.perf_counter()
            self._state = jax.block_until_ready(steps.initial_state(config, self.mesh))
            self.initialise_seconds = time.perf_counter() - began
            placement = Placement(config, self.mesh)
            step = jax.jit(steps.make_train_step(config), donate_argnums=0)
            began = time.perf_counter()
            self.compiled = step.lower(self._state, placement.abstract()).compile()
            self.compile_seconds = time.perf_counter() - began
            give_back_memory()
            self._batch = placement(synthetic_batch(config, placement.rows, 0))
            self.kernels = steps.kernels_of_step(config)

    def step(self) -> None:
        """One step, until its results are there."""
        import jax

        self._state, metrics = self.compiled(self._state, self._batch)
        jax.block_until_ready((self._state, metrics))


class Decoding:
    """Engines with random weights, made on the device."""

    def __init__(self, config: ModelConfig, int8: bool = False, **engine):
        """Args: int8: quantise the matrices; engine: more arguments of Engine."""
        sharding.start(MeshConfig())
        import jax
        from flax import nnx

        from mixtral_jax.model.mixtral import initialize
        from mixtral_jax.model.quantized import quantized
        from mixtral_jax.model.unstacked import in_layers

        model = initialize(config.dropless(), jax.random.key(0), sharding.make_mesh())
        model = quantized(model, consume=True) if int8 else model
        if jax.default_backend() != "cpu":  # once for all engines, in the memory of one model
            model = in_layers(model, consume=True)
        jax.block_until_ready(nnx.state(model))  # what is timed next has the machine alone
        self._model = model
        self._vocabulary, self._options = config.vocab_size, engine
        self._engines, self._turns = {}, 0

    def answer(self, batch: int, prompt: int, new: int) -> tuple[float, float]:
        """Seconds to the last prompt's first token, and of each step of all rows after it."""
        from mixtral_jax.generation.engine import Engine
        from mixtral_jax.generation.request import Options, Request

        asked = (batch, prompt, new)
        if asked not in self._engines:
            # All prompts before the first step.
            part = max(16, 1 << (batch * prompt - 1).bit_length())
            sizes = {"rows": batch, "context": prompt + new, "part": part}
            self._engines[asked] = Engine(self._model, **sizes, **self._options)
        options = Options(max_new_tokens=new, temperature=0.0)
        self._turns += 1  # no prompt comes twice: its cache would be there
        rows = prompts(batch, prompt, self._vocabulary, 1009 * self._turns)
        requests = [Request(tuple(row), options) for row in rows]
        began, times, firsts = time.perf_counter(), [], set()
        for event in self._engines[asked].run(requests):
            if len(firsts) < batch:
                firsts.add(event.request)
                first = time.perf_counter()
            else:
                times.append(time.perf_counter())
        return first - began, (times[-1] - first) / (len(times) / batch)


def prompts(batch: int, length: int, vocabulary: int, first: int = 0) -> list[list[int]]:
    """Rows of token ids, each another."""
    return [[(first + 7 * row + i) % vocabulary for i in range(length)] for row in range(batch)]


def read_bytes(config: ModelConfig, batch: int, slots: int, weight: int, activation: int) -> float:
    """Bytes that a decoding step must read: weights of the experts in use, all others, the cache.

    Experts are used as by tokens that choose at random. Of the embedding only the rows of the batch
    are read.

    Args:
      slots: tokens in the cache of a row, on average.
      weight, activation: bytes of one number of each.
    """
    experts, used = config.num_local_experts, experts_visited(config, batch)
    expert = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    others = config.num_parameters - experts * expert - config.vocab_size * config.hidden_size
    kept = 2 * config.num_key_value_heads * config.head_size * config.num_hidden_layers
    embedded = batch * config.hidden_size
    return weight * (others + used * expert + embedded) + activation * batch * slots * kept
