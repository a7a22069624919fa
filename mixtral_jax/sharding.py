"""The mesh, the one table from logical axes to mesh axes, and start-up on one or many hosts.

The only file that spells a mesh axis. Meshes have Explicit axes: every array's sharding is part of
its type and an ambiguous contraction fails while tracing, on a CPU as on a TPU.

Dimension letters, used as suffixes of array names throughout:

    B batch            L query length     S key length       D model width
    N query heads      K kv heads         G = N / K          H head width
    V vocabulary       E experts          F expert hidden    C experts per token
    T tokens on this device               R rows (token, expert) received here
    A assignments (choice, token): C T    S, of an exchange: rows of its send buffer
    X devices along the expert axis       M microbatches
    P parts of a sum, or runs of rows     Y lanes of prompts

Lower case is a per-device size where it differs: e = E / X local experts, d and f likewise; within
kernels, a block or a piece of that dimension. h of rotary angles is H / 2.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.util
import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import NamedSharding, PartitionSpec, reshard

from mixtral_jax.config import InputError, MeshConfig

DATA, FSDP, EXPERT, TENSOR = "data", "fsdp", "expert", "tensor"
AXES = (DATA, FSDP, EXPERT, TENSOR)
BATCH_AXES = (DATA, FSDP, EXPERT)
GPU_MEMORY = 0.95
"""Share of a GPU's memory that JAX takes at start-up, for good."""

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    None: None,
    "batch": BATCH_AXES,
    "tokens": BATCH_AXES,
    "layers": None,
    "model": (FSDP, EXPERT),  # the model dimension of weights outside the experts
    "served_model": FSDP,  # the same for inference, where gathering it takes longer than all else
    "heads": TENSOR,
    "vocabulary": TENSOR,
    "experts": EXPERT,
    "expert_model": FSDP,  # the model dimension of expert matrices
    "expert_hidden": TENSOR,
}


def spec(*logical: str | None, mesh: jax.sharding.Mesh | None = None) -> PartitionSpec:
    """The PartitionSpec of an array whose dimensions have these logical axes.

    Args:
      mesh: the one that is set, if None. Its axes of one device are left out: JAX would take what
        is split over them for something else than what is not, and XLA:CPU copies each array that
        is summed over them.
    """

    def axes(name: str | None) -> str | tuple[str, ...] | None:
        rule = RULES[name]
        found = in_use(*([rule] if isinstance(rule, str) else rule or ()), mesh=mesh)
        return found if len(found) > 1 else next(iter(found), None)

    return PartitionSpec(*map(axes, logical))


def in_use(*axes: str, mesh: jax.sharding.Mesh | None = None) -> tuple[str, ...]:
    """Those mesh axes along which a mesh (the one that is set, if None) has several devices.

    All of them where none is set.
    """
    sizes = (mesh or jax.sharding.get_abstract_mesh()).shape
    return tuple(axis for axis in axes if sizes.get(axis) != 1)


def shard(x: jax.Array, *logical: str | None) -> jax.Array:
    """Move x to the sharding of these logical axes, e.g. gather a weight before its use."""
    return reshard(x, spec(*logical))


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> jax.sharding.Mesh:
    """A mesh over the first data * fsdp * expert * tensor devices.

    Use it as `with jax.set_mesh(make_mesh(expert=4)): ...`. Of several TPU slices, the data axis
    goes from one to the next, or the fsdp axis where data is 1.

    Raises:
      InputError: if there are fewer devices, or their slices do not divide that axis.
    """
    MeshConfig(data, fsdp, expert, tensor)  # checks them
    sizes = (data, fsdp, expert, tensor)
    devices = jax.devices() if devices is None else list(devices)
    wanted = math.prod(sizes)
    if wanted > len(devices):
        large = {axis: n for axis, n in zip(AXES, sizes, strict=True) if n > 1}
        message = (
            f"a mesh of {', '.join(f'mesh.{axis}={n}' for axis, n in large.items())} needs "
            f"{wanted} devices, and this machine has {len(devices)} ({devices[0].device_kind}): "
            "use a smaller mesh"
        )
        if devices[0].platform == "cpu":
            start = ", ".join(f"{axis}={n}" for axis, n in large.items())
            message += f", or sharding.start(MeshConfig({start})) before JAX uses the CPU"
        else:
            message += f" ({' '.join(f'mesh.{axis}=1' for axis in large)} for one device)"
        raise InputError(message)
    devices = devices[:wanted]
    slices = len({d.slice_index for d in devices}) if hasattr(devices[0], "slice_index") else 1
    if slices == 1 or devices[0].platform != "tpu":
        with contextlib.suppress(NotImplementedError):
            return jax.make_mesh(sizes, AXES, devices=devices)
        # An axis takes a part of a row of chips.
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        across = 0 if data > 1 else 1
        if sizes[across] % slices:
            name = AXES[across]
            raise InputError(f"mesh.{name}={sizes[across]} does not split over {slices} slices")
        parts = tuple(slices if axis == across else 1 for axis in range(len(sizes)))
        inner = tuple(size // part for size, part in zip(sizes, parts, strict=True))
        split = {"allow_split_physical_axes": True}
        grid = mesh_utils.create_hybrid_device_mesh(inner, parts, devices, **split)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * len(AXES))


def mesh_from_config(config: MeshConfig) -> jax.sharding.Mesh:
    """The mesh that a config asks for; on several hosts it must use every device."""
    mesh = make_mesh(config.data, config.fsdp, config.expert, config.tensor)
    if jax.process_count() > 1 and config.size != jax.device_count():
        raise InputError(
            f"the mesh has {config.size} devices and the {jax.process_count()} hosts have "
            f"{jax.device_count()}: on several hosts it must use all of them"
        )
    return mesh


def current_mesh() -> jax.sharding.AbstractMesh:
    """The mesh set by jax.set_mesh.

    Raises:
      InputError: if none is set.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.axis_names) != set(AXES):
        raise InputError("no mesh is set: run inside `with jax.set_mesh(sharding.make_mesh()):`")
    return mesh


def mesh_of(x: jax.Array) -> contextlib.AbstractContextManager:
    """A block in which a mesh is set: the current one, or else the one that an array lies on.

    Raises:
      InputError: if no mesh is set, and the array lies on none or is being traced.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    where = None if isinstance(x, jax.core.Tracer) else x.sharding
    if not isinstance(where, NamedSharding):
        current_mesh()  # says what to do
    return jax.set_mesh(where.mesh)


def no_mesh() -> contextlib.AbstractContextManager:
    """A block in which no mesh is set, for programs that run on one device at a time."""
    return jax.set_mesh(None)


def expert_shards() -> int:
    """Devices along the expert axis of the current mesh (X)."""
    return current_mesh().shape[EXPERT]


def tensor_shards() -> int:
    """Devices along the tensor axis of the current mesh."""
    return current_mesh().shape[TENSOR]


def batch_shards() -> int:
    """Devices that the batch is split over in the current mesh."""
    return math.prod(current_mesh().shape[axis] for axis in BATCH_AXES)


def on(mesh: jax.sharding.Mesh, *logical: str | None) -> NamedSharding:
    """The sharding on a mesh of an array whose dimensions have these logical axes."""
    return NamedSharding(mesh, spec(*logical, mesh=mesh))


def param_shardings(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """NamedShardings of a tree of nnx variables, by the logical axes each was made with."""
    return jax.tree.map(
        lambda variable: variable.replace(on(mesh, *variable.get_metadata("logical_axes"))),
        state,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )


def placed_shapes(state: Any, mesh: jax.sharding.Mesh) -> Any:
    """Shapes, types and those shardings, of a tree of nnx variables, as ShapeDtypeStructs."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        state,
        param_shardings(state, mesh),
    )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


# ---- start-up ----------------------------------------------------------------------------------


def start(mesh: MeshConfig) -> None:
    """Prepare JAX for a mesh, before the first use of a device; call once per process.

    On several hosts it connects them: TPU slices and Slurm are recognised by JAX itself, other
    clusters by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Where only a CPU is
    found, it is split into as many emulated devices as the mesh needs.

    Raises:
      InputError: if the mesh does not split over the processes.
    """
    coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number_in("JAX_NUM_PROCESSES") if coordinator else 1
    if processes < 1 or mesh.size % processes:
        raise InputError(f"a mesh of {mesh.size} devices does not split over {processes} processes")
    if "JAX_PLATFORMS" not in os.environ and _has_libtpu() and not _has_accelerator():
        jax.config.update("jax_platforms", "cpu")  # libtpu complains where there is no TPU
    emulate_cpu_devices(mesh.size // processes)
    _use_memory_of_gpus()
    keep_compiled_programs()
    if coordinator:
        jax.distributed.initialize(coordinator, processes, _number_in("JAX_PROCESS_ID"))
    elif _on_tpu() or _in_slurm_step():
        jax.distributed.initialize()


def one_of_several() -> bool:
    """Whether the environment says, before JAX starts, that this process is one of several.

    On a TPU slice JAX alone knows.
    """
    several = os.environ.get("JAX_NUM_PROCESSES") != "1"
    return several if os.environ.get("JAX_COORDINATOR_ADDRESS") else _in_slurm_step()


def _use_memory_of_gpus() -> None:
    """Have JAX take GPU_MEMORY of a GPU, not three fourths, unless the user says how much."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is older
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = str(GPU_MEMORY)


def _in_slurm_step() -> bool:
    """Whether srun started this process among others; in an allocation alone it is the only one."""
    return "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_NTASKS", "1") != "1"


def _number_in(variable: str) -> int:
    """What an environment variable says.

    Raises:
      InputError: if it is not set to a whole number.
    """
    text = os.environ.get(variable, "")
    if not text.isdecimal():
        raise InputError(
            f"{variable}={text!r} must be a whole number: JAX_COORDINATOR_ADDRESS is set"
        )
    return int(text)


def emulate_cpu_devices(devices: int) -> None:
    """Split the CPU, if JAX finds nothing better, into this many devices; before their first use.

    Each device blocks one thread of XLA's pool while it waits for the others. The default pool has
    as many threads as devices, and one more program in flight can then starve a device of its
    thread for ever; so the pool is made larger, and the watchdog patient with slow machines.
    XLA_FLAGS that already say the number of devices are respected.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        jax.config.update("jax_num_cpu_devices", devices)
    if devices > 1:
        os.environ.setdefault("PJRT_NPROC", str(4 * devices))
        if "xla_cpu_collective" not in flags:
            patience = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
            os.environ["XLA_FLAGS"] = f"{flags} {patience}".strip()


def keep_compiled_programs() -> None:
    """Have JAX keep compiled programs on disk, for the next run of the same program.

    In JAX_COMPILATION_CACHE_DIR if that is set, and otherwise in ~/.cache/mixtral_jax (under
    XDG_CACHE_HOME if set), apart for each kind of CPU: programs for one may not run on another.
    JAX_ENABLE_COMPILATION_CACHE=false switches it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(home, "mixtral_jax", f"jax-{jax.__version__}-{_cpu_kind()}")
        jax.config.update("jax_compilation_cache_dir", folder)
    for name, value in (("min_compile_time_secs", 0.2), ("min_entry_size_bytes", -1)):
        if f"JAX_PERSISTENT_CACHE_{name.upper()}" not in os.environ:
            jax.config.update(f"jax_persistent_cache_{name}", value)


def _cpu_kind() -> str:
    """A short name that is the same for CPUs with the same instructions."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = [line for line in file if line.startswith(("flags", "Features", "model name"))]
    except OSError:
        lines = []
    text = platform.machine() + "".join(sorted(set(lines)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _has_libtpu() -> bool:
    return importlib.util.find_spec("libtpu") is not None


def _has_accelerator() -> bool:
    devices = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd", "dxg")
    return any(glob.glob(f"/dev/{name}") for name in devices)


def _on_tpu() -> bool:
    chips = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in os.environ.get("JAX_PLATFORMS", "tpu") and bool(chips) and _has_libtpu()
