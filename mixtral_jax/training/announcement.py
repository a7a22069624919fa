"""What a run says about itself before its first step."""

from __future__ import annotations

import jax

from mixtral_jax.config import Config
from mixtral_jax.data.validation import ValidationSet
from mixtral_jax.training.step import kernels_of_step


def announcement(
    config: Config, mesh: jax.sharding.Mesh, held_out: ValidationSet | None, first: int
) -> list[str]:
    """Lines on the model, the devices and the kernels, and on what a user may not expect.

    Args:
      first: the step that the run goes on from.
    """
    model, training = config.model, config.training
    kernels = kernels_of_step(config)
    lines = [
        f"Mixtral of {model.num_parameters:,} parameters, {model.num_active_parameters:,} active; "
        f"{training.batch_size} x {training.sequence_length} tokens a step on {described(mesh)}",
        "kernels: " + ", ".join(f"{key} {name}" for key, name in kernels.items()),
    ]
    if config.data.source == "synthetic":
        lines.append("data: random tokens (data.source=synthetic)")
    if held_out is not None and held_out.left_out:
        lines.append(
            f"validation: {held_out.documents} held-out documents; {held_out.left_out} more have "
            f"no room in training.validation_batches={training.validation_batches}"
        )
    if training.warmup_steps >= training.steps:
        lines.append(
            f"training.warmup_steps={training.warmup_steps} is not less than training.steps="
            f"{training.steps}: the learning rate does not reach its peak"
        )
    traced = training.profile_range
    if traced and (traced[0] > training.steps or traced[1] <= first):
        lines.append(f"training.profile_steps={training.profile_steps}: no such step is left")
    return lines


def described(mesh: jax.sharding.Mesh) -> str:
    """For example: 4 devices (cpu), expert 4."""
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0]
    count = f"{mesh.size} device{'s' if mesh.size > 1 else ''} ({device.device_kind})"
    return f"{count}, {axes}" if axes else count
