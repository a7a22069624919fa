"""Random weights are made in place: beside the state, one layer of one device's slice."""

import jax
import pytest
from flax import nnx

from mixtral_jax import config_io, sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.model.mixtral import Mixtral

SIZES = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 5},
    **{"num_attention_heads": 8, "num_key_value_heads": 2, "num_local_experts": 8},
}


def make(key):
    return nnx.state(Mixtral(ModelConfig(**SIZES, param_dtype="bfloat16"), key))


def test_the_float32_of_one_layer_is_all_that_is_held(mesh):
    text = jax.jit(make).lower(jax.random.key(0)).as_text()
    assert "tensor<5x8x64x96xbf16>" in text
    assert "tensor<8x64x96xf32>" in text
    assert "tensor<5x8x64x96xf32>" not in text


@pytest.mark.parametrize("mesh", [(1, 2, 2, 2)], indirect=True, ids=["mesh"])
def test_each_device_makes_its_own_slice(mesh):
    """The random numbers themselves are split as the parameters will be, layer by layer."""
    for path, param in nnx.to_flat_state(jax.eval_shape(make, jax.random.key(0))):
        shape = param.get_value()
        if "norm" not in str(path):
            wanted = sharding.spec(*param.get_metadata("logical_axes"))
            assert tuple(shape.sharding.spec) == tuple(wanted), path


def test_the_configs_for_one_h200_fit_it():
    """Float32 weights, their gradient and two moments; a fifth of the card is left for the rest."""
    config = config_io.load("configs/mixtral_h200.yaml", []).model
    assert 16 * config.num_parameters < 0.8 * 141e9
    config = config_io.load("configs/mixtral_8x7b_h200.yaml", []).model
    assert 2 * config.num_parameters < 0.8 * 141e9
