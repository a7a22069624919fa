"""Random parameters for a module, their bytes, and its arrays onto a mesh and back."""

import jax
import numpy as np
from flax import nnx

from mixtral_jax import sharding


def abstract(make):
    """The structure and the parameters' shapes of the module that `make` makes."""
    return nnx.split(nnx.eval_shape(make))


def random_parameters(state, seed, spread=0.3):
    """A state of that shape in NumPy: matrices around 0, and the weights of norms around 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return (centre + spread * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree.map_with_path(draw, state)


def parameter_bytes(module):
    """Of all parameters, scales included, once each however many devices hold it."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(nnx.state(module)))


def shardings(tree, mesh):
    """Parameters lie where their logical axes say; other arrays split by their first dimension."""

    def where(leaf):
        if isinstance(leaf, nnx.Variable):
            return sharding.param_shardings(leaf, mesh)
        return sharding.on(mesh, *["batch"] * min(np.ndim(leaf), 1))

    return jax.tree.map(where, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def place(tree, mesh):
    """Arrays on a mesh."""
    return jax.device_put(tree, shardings(tree, mesh))


def shapes(tree, mesh):
    """The shapes, types and shardings of what `place` would give."""

    def shape(a, where):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)

    return jax.tree.map(shape, tree, shardings(tree, mesh))


def addresses(array: jax.Array) -> set[int]:
    """Of its parts, in memory: those of an array that shares its memory are the same."""
    return {shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards}


def plain(tree):
    """Every array in NumPy, every nnx state as a nested dictionary."""
    is_state = lambda leaf: isinstance(leaf, nnx.State)  # noqa: E731
    tree = jax.tree.map(lambda x: nnx.to_pure_dict(x) if is_state(x) else x, tree, is_leaf=is_state)
    return jax.tree.map(np.asarray, tree)


def describe(sizes):
    """A mesh's sizes as the name of a test."""
    return "x".join(map(str, sizes))
