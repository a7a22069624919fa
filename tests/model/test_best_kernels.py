"""The whole network in bfloat16 with the kernels that a platform gets, beside the portable ones.

Runs on a GPU too (see conftest.py), of which it is the first thing to ask.
"""

import jax
import numpy as np
import pytest
from harness import plain, random_parameters
from whole import KERNEL_SIZES, loss_of

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.mixtral import abstract_state, chosen_kernels

pytestmark = pytest.mark.gpu
ROWS, LENGTH = 4, 256
SIZES = {**KERNEL_SIZES, "compute_dtype": "bfloat16"}
PORTABLE = {"grouped_matmul": "ragged_dot", "attention": "xla"}


def batch(packed):
    """tokens, targets, positions, segments: of one document a row, or of two, and some padding."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(SIZES["vocab_size"], size=(2, ROWS, LENGTH), dtype=np.int32)
    at = np.arange(LENGTH, dtype=np.int32)
    cut = np.array([[100], [128], [1], [255]]) if packed else np.full((ROWS, 1), LENGTH)
    end = np.array([[256], [250], [256], [200]])
    segments = np.where(at >= end, 0, np.where(at < cut, 1, 2)).astype(np.int32)
    return tokens, targets, np.where(at < cut, at, at - cut).astype(np.int32), segments


def loss_and_gradients(parameters, arrays, **changes):
    config = ModelConfig(**SIZES, **changes)
    with jax.set_mesh(sharding.make_mesh()):
        graphdef, _ = abstract_state(config)
        gradient = jax.jit(jax.value_and_grad(lambda *a: loss_of(graphdef, *a)[0]))
        return *plain(gradient(parameters, *arrays)), chosen_kernels(config, ROWS, LENGTH)


@pytest.mark.parametrize(
    "changes",
    [{}, {"remat": "matmuls"}, {"remat": "matmuls", "scan_layers": False}],
    ids=["", "remat", "remat, layers apart"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["one document a row", "packed"])
def test_loss_and_gradients(packed, changes):
    parameters = random_parameters(abstract_state(ModelConfig(**SIZES))[1], seed=0, spread=0.02)
    arrays = batch(packed)
    wanted_loss, wanted, _ = loss_and_gradients(parameters, arrays, **PORTABLE)
    loss, found, kernels = loss_and_gradients(parameters, arrays, **changes)
    assert kernels["grouped_matmul"] != "ragged_dot"
    np.testing.assert_allclose(loss, wanted_loss, rtol=2e-3)
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), found, wanted)
    # bfloat16, and some tokens for which two experts are as good; a wrong kernel gives about 1.
    assert max(jax.tree.leaves(errors)) < 0.15, errors


@pytest.mark.parametrize("scan_layers", [False, True])
def test_without_a_loop_layers_keep_their_matrices_in_the_type_they_are_multiplied_in(scan_layers):
    config = ModelConfig(**SIZES, remat="full", scan_layers=scan_layers)
    with jax.set_mesh(sharding.make_mesh()):
        graphdef, parameters = abstract_state(config)
        gradient = jax.grad(lambda *a: loss_of(graphdef, *a)[0])
        made = jax.make_jaxpr(gradient)(parameters, *batch(packed=False))
    again = [
        e for e in _equations(made.jaxpr) if e.primitive.name.startswith(("remat", "checkpoint"))
    ]
    experts = [v.aval for e in again for v in e.invars if v.aval.shape[-3:] == (8, 256, 384)]
    wide = {a.dtype.name for a in experts}
    assert wide == ({"float32"} if scan_layers else {"bfloat16"})


def _equations(jaxpr):
    """All of a jaxpr, and of those inside."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_holds_equations):
            if _holds_equations(value):
                yield from _equations(value)


def _holds_equations(value):
    return hasattr(value, "eqns")  # a Jaxpr's, or a ClosedJaxpr's
