"""The whole network on the kernels of a TPU, interpreted, inside the same shard_maps."""

import jax
import oracle
import pytest
from emulation import tpu_kernels_on_cpu
from harness import describe, random_parameters
from whole import compiled, make_batch, make_config

from mixtral_jax import sharding
from mixtral_jax.model.mixtral import abstract_state, chosen_kernels

WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
}
LENGTH = 128


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ((1, 1, 1, 1), {"remat": "no_down"}),
        ((1, 2, 2, 2), {"remat": "matmuls"}),
        ((1, 1, 4, 1), {"exchange": "ragged", "receive_factor": 2.0, "remat": "no_up"}),
    ],
    ids=lambda value: describe(value) if isinstance(value, tuple) else "",
)
def test_loss_gradients_and_statistics_are_those_of_the_portable_kernels(mesh, changes):
    _, state = abstract_state(make_config(**WIDE))
    # Weights of 0.3 would make scores in the hundreds, whose softmax magnifies rounding.
    arguments = random_parameters(state, seed=0, spread=0.08), make_batch(length=LENGTH)
    portable = compiled(mesh, **WIDE, **changes)(*arguments)
    with tpu_kernels_on_cpu():
        with jax.set_mesh(sharding.make_mesh(*mesh)):
            chosen = chosen_kernels(make_config(**WIDE), *arguments[1][0].shape)
        assert (chosen["grouped_matmul"], chosen["attention"]) == ("megablox", "splash")
        kernels = compiled.__wrapped__(mesh, **WIDE, **changes)(*arguments)
    oracle.close(kernels, portable, rel=1e-5)
