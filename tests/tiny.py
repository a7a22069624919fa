"""Helpers of the training tests: a tiny Mixtral of odd sizes, and batches for it."""

import dataclasses
import functools

import jax
import numpy as np

from mixtral_jax import sharding
from mixtral_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    TrainingConfig,
)
from mixtral_jax.data.packing import Batch
from mixtral_jax.training import step as steps

MODEL = ModelConfig(
    vocab_size=38,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    num_local_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
TRAINING = TrainingConfig(
    steps=6,
    batch_size=8,
    sequence_length=9,
    learning_rate=1e-2,
    warmup_steps=2,
    log_every=1,
    checkpoint_every=3,
    validate_every=3,
    validation_batches=1,
)
CONFIG = Config(MODEL, MeshConfig(), TRAINING, DataConfig(source="synthetic"), RunConfig("unused"))


def make_config(**sections) -> Config:
    """CONFIG with changes: make_config(training={"steps": 3}, mesh={"expert": 2})."""
    changed = {
        name: dataclasses.replace(getattr(CONFIG, name), **changes)
        for name, changes in sections.items()
    }
    return dataclasses.replace(CONFIG, **changed)


def make_batch(rows: int, length: int = 9, seed: int = 0) -> Batch:
    """Random tokens; every row has two documents and its own amount of padding at the end."""
    random = np.random.default_rng(seed)
    tokens = random.integers(MODEL.vocab_size, size=(rows, length), dtype=np.int32)
    targets = random.integers(MODEL.vocab_size, size=(rows, length), dtype=np.int32)
    place = np.arange(length)
    cut = random.integers(1, length - 3, size=(rows, 1))
    end = length - random.integers(0, 3, size=(rows, 1))
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0)).astype(np.int32)
    positions = np.where(place < cut, place, place - cut).astype(np.int32)
    return Batch(tokens, targets, segments, positions)


@functools.cache
def initial_arrays():
    """The initial TrainState of CONFIG, in NumPy: compiled once for all tests."""
    return host(steps.initial_state(CONFIG, sharding.make_mesh()))


def initial_state(config: Config, mesh: jax.sharding.Mesh) -> steps.TrainState:
    """What training.step.initial_state gives for a config with CONFIG's sizes, sooner."""
    shardings = steps.shardings_of(steps.abstract_train_state(config, mesh))
    return jax.device_put(initial_arrays(), shardings)


def host(tree):
    """A tree's arrays in NumPy."""
    return jax.tree.map(np.asarray, jax.device_get(tree))
