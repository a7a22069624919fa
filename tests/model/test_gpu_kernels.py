"""The whole network with cuDNN's attention, given to XLA, inside the shard_map that it wants."""

import jax
import oracle
from emulation import cudnn_on_cpu
from harness import random_parameters
from whole import compiled, make_batch, make_config

from mixtral_jax import sharding
from mixtral_jax.model.mixtral import abstract_state, chosen_kernels

MESH = (1, 2, 2, 2)


def test_loss_gradients_and_statistics_are_those_of_the_portable_kernels():
    config = make_config(remat="matmuls")
    arguments = random_parameters(abstract_state(config)[1], seed=0), make_batch()
    portable = compiled(MESH, remat="matmuls")(*arguments)
    with cudnn_on_cpu():
        with jax.set_mesh(sharding.make_mesh(*MESH)):
            assert chosen_kernels(config, *arguments[1][0].shape)["attention"] == "cudnn"
        kernels = compiled.__wrapped__(MESH, remat="matmuls")(*arguments)
    oracle.close(kernels, portable, rel=2e-5)
