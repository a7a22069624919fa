"""What a model refuses to compute with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_config

from mixtral_jax import sharding
from mixtral_jax.config import InputError
from mixtral_jax.model.mixtral import initialize


@pytest.fixture(scope="module")
def model():
    return initialize(make_config().model, jax.random.key(0), sharding.make_mesh())


FINE = np.arange(10).reshape(2, 5)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([np.arange(4)], r"token ids have shape \(4,\)"),
        ([np.zeros((0, 4), int)], r"token ids have shape \(0, 4\)"),
        ([np.zeros((2, 0), int)], r"token ids have shape \(2, 0\)"),
        ([[[1, 38]]], r"token id 38 at \[0, 1\] is not in 0..37 \(model.vocab_size=38\)"),
        ([[[1, 2], [-1, 3]]], r"token id -1 at \[1, 0\]"),
        ([np.array([[1, 2**32 + 1]])], r"token id 4294967297 at \[0, 1\]"),
        ([jnp.array([[1, 99999]])], r"token id 99999 at \[0, 1\]"),
        ([np.array([[1.7, 2]])], r"token ids are of type float64: give whole numbers"),
        ([[["a", "b"]]], r"token ids are of type <U1"),
        ([FINE, np.arange(5)[None]], r"positions_BL have shape \(1, 5\), and token ids \(2, 5\)"),
        ([FINE, None, np.ones((1, 5), int)], r"segments_BL have shape \(1, 5\)"),
        ([FINE, np.array([[0, 1, 2, 0, 1]] * 2)], "positions_BL begin again: say with segments_BL"),
    ],
)
def test_what_is_no_batch_of_ids_is_refused(model, inputs, said):
    with pytest.raises(InputError, match=said) as error:
        model(*inputs)
    assert "\n" not in str(error.value)


def test_what_is_traced_is_not_looked_at(model):
    with jax.set_mesh(sharding.make_mesh()):
        given = jax.ShapeDtypeStruct((2, 5), jnp.int32)
        assert jax.eval_shape(lambda ids: model(ids, ids, ids), given).shape == (2, 5, 38)


def test_sizes_that_do_not_split_over_a_mesh_are_refused():
    with pytest.raises(
        InputError, match=r"mesh.expert=3 does not divide model.num_local_experts=4"
    ):
        initialize(make_config().model, jax.random.key(0), sharding.make_mesh(expert=3))
    with pytest.raises(InputError, match=r"mesh.expert=0 must be at least 1"):
        sharding.make_mesh(expert=0)
