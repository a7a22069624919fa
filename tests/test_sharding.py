import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec

from mixtral_jax import sharding
from mixtral_jax.config import InputError, MeshConfig

ROOT = pathlib.Path(__file__).parents[1]


def one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_mesh_has_the_sizes_asked_for_and_explicit_axes():
    mesh = sharding.make_mesh(data=1, fsdp=2, expert=2, tensor=2)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Explicit}
    assert sharding.make_mesh().size == 1
    config = MeshConfig(data=2, tensor=3)
    assert dict(sharding.mesh_from_config(config).shape) == vars(config)


def test_a_mesh_uses_the_devices_it_is_given():
    devices = jax.devices()[4:]
    mesh = sharding.make_mesh(expert=2, devices=devices)
    assert set(mesh.devices.ravel()) == set(devices[:2])


def test_too_few_devices():
    with pytest.raises(InputError) as error:
        sharding.make_mesh(fsdp=3, expert=4)
    one_line(error, "mesh.fsdp=3", "mesh.expert=4", "12 devices", "has 8", "smaller mesh")
    assert "mesh.data" not in str(error.value), "axes of size 1 are not worth naming"


def test_too_few_gpus():
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    with pytest.raises(InputError) as error:
        sharding.make_mesh(data=2, expert=4, devices=[gpu])
    one_line(error, "1 (NVIDIA H200)", "smaller mesh (mesh.data=1 mesh.expert=1 for one device)")


def test_on_several_hosts_the_mesh_uses_every_device(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert sharding.mesh_from_config(MeshConfig(expert=8)).size == 8
    with pytest.raises(InputError) as error:
        sharding.mesh_from_config(MeshConfig(expert=4))
    one_line(error, "4 devices", "2 hosts", "8", "all of them")


def test_no_mesh_is_set():
    with pytest.raises(InputError) as error:
        sharding.current_mesh()
    one_line(error, "no mesh is set", "jax.set_mesh")
    other = jax.make_mesh((2,), ("rows",))
    with jax.set_mesh(other), pytest.raises(InputError):
        sharding.current_mesh()


@pytest.mark.parametrize("mesh", [(2, 1, 3, 1)], indirect=True, ids=["2x1x3x1"])
def test_shards_of_the_mesh_that_is_set(mesh):
    assert sharding.expert_shards() == 3
    assert sharding.batch_shards() == 6
    assert sharding.current_mesh().shape == mesh.shape


def test_logical_axes_become_mesh_axes():
    spec = sharding.spec("batch", None, "heads", "expert_hidden")
    batch = ("data", "fsdp", "expert")
    assert spec == PartitionSpec(batch, None, "tensor", "tensor")
    assert sharding.spec("experts", "expert_model") == PartitionSpec("expert", "fsdp")
    assert sharding.spec("layers", "model") == PartitionSpec(None, ("fsdp", "expert"))
    with pytest.raises(KeyError):
        sharding.spec("width")


@pytest.mark.parametrize("mesh", [(1, 2, 1, 3)], indirect=True, ids=["1x2x1x3"])
def test_axes_of_one_device_split_nothing(mesh):
    """`mesh` is set; `other` is named."""
    other = sharding.make_mesh(expert=2, data=2)
    assert sharding.spec("batch", "experts", "heads") == PartitionSpec("fsdp", None, "tensor")
    assert sharding.spec("batch", "model", "heads", mesh=other) == PartitionSpec(
        ("data", "expert"), "expert", None
    )
    assert sharding.on(other, "experts").spec == PartitionSpec("expert")
    assert sharding.in_use(*sharding.AXES) == ("fsdp", "tensor")
    assert sharding.in_use("data", "expert") == ()


def test_rules_name_mesh_axes_only():
    for axes in sharding.RULES.values():
        assert set(np.atleast_1d(axes or [])) <= set(sharding.AXES)


@pytest.mark.parametrize("mesh", [(1, 2, 2, 2)], indirect=True, ids=["1x2x2x2"])
def test_shard_moves_an_array(mesh):
    x = np.arange(24.0).reshape(4, 6)
    placed = jax.device_put(x, sharding.on(mesh, "model", "heads"))
    whole = jax.jit(lambda x: sharding.shard(x, None, None))(placed)
    assert whole.sharding.is_fully_replicated
    assert placed.addressable_shards[0].data.shape == (1, 3)
    np.testing.assert_array_equal(whole, x)


def test_parameters_are_placed_by_the_axes_they_were_made_with():
    mesh = sharding.make_mesh(1, 2, 2, 2)
    state = nnx.State(
        {
            "gate": nnx.Param(
                np.zeros((4, 6, 10)), logical_axes=("experts", "expert_model", "expert_hidden")
            ),
            "norm": nnx.Param(np.zeros(6), logical_axes=(None,)),
        }
    )
    wanted = sharding.param_shardings(state, mesh)
    assert wanted["gate"].get_raw_value().spec == PartitionSpec("expert", "fsdp", "tensor")
    placed = jax.device_put(state, wanted)
    assert placed["gate"].get_raw_value().addressable_shards[0].data.shape == (2, 3, 5)
    assert placed["norm"].get_raw_value().sharding.is_fully_replicated


def test_whole_and_split_by_batch():
    mesh = sharding.make_mesh(2, 1, 4, 1)
    x = np.zeros((8, 3))
    assert jax.device_put(x, sharding.replicated(mesh)).sharding.is_fully_replicated
    split = jax.device_put(x, sharding.on(mesh, "batch"))
    assert split.addressable_shards[0].data.shape == (1, 3)


# ---- start-up, each in a process of its own ----------------------------------------------------


def run(code, **environment):
    kept = {k: v for k, v in os.environ.items() if k not in ("PJRT_NPROC", "XLA_FLAGS")}
    code = f"from mixtral_jax.config import MeshConfig\nfrom mixtral_jax import sharding\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_cpu_is_split_into_the_devices_that_the_mesh_needs():
    code = """
import jax
sharding.start(MeshConfig(data=2, expert=3))
print(len(jax.devices()))
mesh = sharding.make_mesh(2, 1, 3)
x = jax.device_put(jax.numpy.arange(6), sharding.on(mesh, "batch"))
with jax.set_mesh(mesh):
    print(int(jax.jit(jax.numpy.sum)(x)))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["6", "15"]


def test_flags_that_already_say_the_number_of_devices_are_respected():
    code = "import jax\nsharding.start(MeshConfig(expert=2))\nprint(len(jax.devices()))"
    done = run(code, XLA_FLAGS="--xla_force_host_platform_device_count=5")
    assert done.stdout.split() == ["5"], done.stderr


def test_a_mesh_that_does_not_split_over_the_processes(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    with pytest.raises(InputError) as error:
        sharding.start(MeshConfig(data=2, expert=2))
    one_line(error, "4 devices", "3 processes")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' must be a whole number"),
        ({"JAX_NUM_PROCESSES": "0"}, "does not split over 0 processes"),
        ({"JAX_NUM_PROCESSES": "1"}, "JAX_PROCESS_ID='' must be a whole number"),
    ],
)
def test_a_coordinator_needs_the_numbers_of_the_processes(monkeypatch, variables, message):
    monkeypatch.setattr(sharding, "emulate_cpu_devices", lambda devices: None)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        sharding.start(MeshConfig())


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("topology", "sizes"),
    [
        ("v5e:4x4", {"expert": 8, "tensor": 2}),
        ("v6e:4x4", {"expert": 8, "tensor": 2}),
        ("v5p:4x4x4", {"expert": 8, "fsdp": 8}),
        ("v5p:2x2x2", {"data": 2, "expert": 4}),
    ],
)
def test_a_mesh_may_split_a_row_of_chips(topology, sizes):
    pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = sharding.make_mesh(**sizes, devices=devices)
    assert {axis: n for axis, n in mesh.shape.items() if n > 1} == sizes
    assert sorted(d.id for d in mesh.devices.flat) == sorted(d.id for d in devices)
    assert mesh.axis_types == sharding.make_mesh().axis_types


@pytest.mark.parametrize(
    ("variables", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "2"}, False),  # in an allocation, but not started by srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a"}, False),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a"}, True),
    ],
)
def test_slurm_is_asked_where_it_started_several(monkeypatch, variables, several):
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sharding._in_slurm_step() is several


@pytest.mark.parametrize("said", ["", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"])
def test_most_of_a_gpus_memory_is_taken_unless_the_user_says_how_much(said):
    """JAX reads it when it first looks for devices, and refuses to hear it twice."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    code = (
        "from mixtral_jax import sharding\nfrom mixtral_jax.config import MeshConfig\nimport os\n"
    )
    code += f"sharding.start(MeshConfig())\nprint([os.environ.get(n) for n in {names}])"
    environment = {k: v for k, v in os.environ.items() if k not in names} | (
        {said: "0.5"} if said else {}
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    wanted = {name: "0.5" for name in names if name == said} or {names[0]: "0.95"}
    assert done.stdout.strip() == str([wanted.get(name) for name in names])


PROGRAM = """
import jax, logging
from mixtral_jax import sharding
from mixtral_jax.config import MeshConfig
sharding.start(MeshConfig())
jax.config.update("jax_log_compiles", True)
jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((7, 7)))
"""


def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    def run(**environment):
        base = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION")}
        base |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-c", PROGRAM]
        done = subprocess.run(
            command, env=base | environment, capture_output=True, text=True, check=True, cwd=ROOT
        )
        return done.stderr

    def kept(folder):
        return sorted(path.name for path in folder.rglob("jit_*-cache"))

    assert "Not writing" not in run(XDG_CACHE_HOME=str(tmp_path / "default"))
    first = kept(tmp_path / "default" / "mixtral_jax")
    assert any(name.startswith("jit__lambda") for name in first)
    assert "cache hit" in run(XDG_CACHE_HOME=str(tmp_path / "default")).lower()
    assert kept(tmp_path / "default" / "mixtral_jax") == first
    run(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"), XDG_CACHE_HOME=str(tmp_path / "unused"))
    assert len(kept(tmp_path / "own")) == len(first)
    run(JAX_ENABLE_COMPILATION_CACHE="false", XDG_CACHE_HOME=str(tmp_path / "unused"))
    assert not (tmp_path / "unused").exists()
