"""What the backward pass finds of a layer, and what it computes again."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mixtral_jax import sharding
from mixtral_jax.kernels import chunks, cudnn, platform, splash

_ATTENTION = ("attention_qkv", splash.KEPT, chunks.KEPT, "attention_out", "routing")
_MATMULS = (*_ATTENTION, "expert_gate", "expert_up", "expert_out")
KEPT = {
    "full": (),
    "attention_out": ("attention_out",),
    "no_experts": _ATTENTION,
    "no_up": (*_ATTENTION, "expert_gate"),
    "no_down": (*_ATTENTION, "expert_gate", "expert_up"),
    "matmuls": _MATMULS,
    "matmuls_rows": (*_MATMULS, "expert_in"),
}
"""What is kept by each remat policy, beside a layer's input: by its name."""


def checkpointed(one_layer: Callable, policy: str, looped: bool) -> Callable:
    """A layer, as a function of (carry, parameters), that is computed again but for what is kept.

    Args:
      policy: one of KEPT.
      looped: whether it is the body of a loop. If not, XLA would see that it computes the same
        twice, and keep it: a barrier stands before what is computed again.
    """
    barrier = False if looped else _barrier()
    return jax.checkpoint(one_layer, policy=_policy(KEPT[policy]), prevent_cse=barrier)


@functools.cache
def _policy(names: tuple[str, ...]):
    """A policy that keeps these, and with splash attention's also cuDNN's, which have no name."""
    keep = jax.checkpoint_policies.save_only_these_names(*names)
    if splash.KEPT not in names:
        return keep
    return jax.checkpoint_policies.save_from_both_policies(keep, cudnn.kept)


def _barrier() -> bool | tuple[tuple[bool, bool], bool]:
    """Which of a layer's arguments are to be behind the barrier.

    Not the parameters on a GPU that gathers none: its kernels read them where they lie in their
    stack, and a barrier would copy them out. (A part of the arguments, as JAX 0.12 still has it,
    works only where nothing in a layer is a constant array, as the mask of splash attention is.)
    """
    if platform() != "gpu" or sharding.in_use(sharding.FSDP):
        return True
    return (True, True), False


def in_type(layers: nnx.State, dtype: jnp.dtype) -> nnx.State:
    """The layers' parameters in the activations' type, but the router's, whose product is float32.

    Without a loop, a layer that is computed again finds its parameters kept as they came in, each a
    slice of its stack; so neither what is kept nor its gradient is wider than what is multiplied.

    On GPU a barrier stands behind, which is one for the gradients too: they are put together in
    their stack once, and one kernel then updates a weight and both its moments. XLA would put them
    together within the update, in a kernel for each of the three that reads all of it again.
    """
    behind = jax.lax.optimization_barrier if platform() == "gpu" else lambda a: a

    def cast(path, a):
        return behind(a if "router" in jax.tree_util.keystr(path) else a.astype(dtype))

    return jax.tree.map_with_path(cast, layers)
