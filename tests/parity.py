"""What a loaded model computes, in the terms in which transformers states the same."""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.training.losses import load_balance

FOLDER = pathlib.Path(__file__).with_name("data") / "parity"


class Batch(NamedTuple):
    """Rows of one document each, with padding on either side."""

    tokens_BL: np.ndarray
    positions_BL: np.ndarray
    """From 0 at the first real token."""
    mask_BL: np.ndarray
    """1 where real: our segments, transformers' attention mask."""

    @property
    def real(self):
        return self.mask_BL > 0


class Computed(NamedTuple):
    """What `forward` gives, and what lies inside it."""

    logits_BLV: np.ndarray
    router_logits_LBLE: np.ndarray
    load_balance_L: np.ndarray
    """Each layer's loss."""
    load_balance_pooled: np.ndarray
    """As transformers has it: means over layers and tokens, then the product."""


def make_batch(rows, length, vocabulary, seed=0):
    """Random tokens: a whole row, then padding on the right, on the left, and on both sides."""
    tokens = np.random.default_rng(seed).integers(vocabulary, size=(rows, length), dtype=np.int32)
    mask = np.ones((rows, length), np.int32)
    mask[1:2, length - 4 :] = 0
    mask[2:3, :3] = 0
    mask[3:, :2] = mask[3:, length - 1 :] = 0
    return Batch(tokens, np.maximum(mask.cumsum(axis=1) - 1, 0).astype(np.int32), mask)


def recorded(name):
    """(batch, what transformers computed) of a file that tests/data/make_parity.py wrote."""
    with np.load(FOLDER / f"{name}.npz") as arrays:
        arrays = dict(arrays)
    return Batch(*(arrays.pop(field) for field in Batch._fields)), Computed(**arrays)


def router_logits(model, tokens_BL, positions_BL, segments_BL):
    """router_logits_LBLE of each layer, through the layers' own modules."""
    table_VD = sharding.shard(model.embedding_VD[...].astype(jnp.float32), None, None)
    x_BLD = table_VD.at[tokens_BL].get(out_sharding=sharding.spec("batch", None, None))
    graphdef, stacked = nnx.split(model.layers)

    def one_layer(x_BLD, state):
        block = nnx.merge(graphdef, state)
        out_BLD, _ = block.attention(block.attention_norm(x_BLD), positions_BL, segments_BL)
        normed_BLD = block.moe_norm(x_BLD + out_BLD)
        router_DE = sharding.shard(block.moe.router_DE[...].astype(x_BLD.dtype), None, None)
        return block(x_BLD, positions_BL, segments_BL, None)[0], normed_BLD @ router_DE

    return jax.lax.scan(one_layer, x_BLD, stacked)[1]


@functools.partial(jax.jit, static_argnums=0)
def _compute(graphdef, state, batch):
    model = nnx.merge(graphdef, state)
    logits_BLV, statistics, _ = model.forward(*batch)
    one_by_one = jax.vmap(load_balance)(jax.tree.map(lambda x: x[:, None], statistics))
    tokens = statistics.tokens.sum()
    share_E = statistics.assignments_E.sum(axis=0) / tokens
    probability_E = statistics.probabilities_E.sum(axis=0) / tokens
    pooled = share_E.shape[0] * jnp.sum(share_E * probability_E)
    return Computed(logits_BLV, router_logits(model, *batch), one_by_one, pooled)


def compute(model, mesh, batch):
    """A Computed of a model on a mesh that the batch's rows split over."""
    graphdef, state = nnx.split(model)
    with jax.set_mesh(mesh):
        placed = jax.device_put(tuple(batch), sharding.on(mesh, "batch"))
        return jax.tree.map(np.asarray, _compute(graphdef, state, placed))


def differences(computed, expected, batch):
    """The largest absolute difference in each field, at the real tokens."""
    real, found = batch.real, {}
    for name, a, b in zip(Computed._fields, computed, expected):
        assert a.shape == b.shape, f"{name} has shape {a.shape}, not {b.shape}"
        if name == "logits_BLV":
            a, b = a[real], b[real]
        if name == "router_logits_LBLE":
            a, b = a[:, real], b[:, real]
        assert np.isfinite(a).all(), name
        found[name] = float(np.abs(a - b).max())
    return found


def parameters(model):
    """Each parameter in NumPy, by name."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}
