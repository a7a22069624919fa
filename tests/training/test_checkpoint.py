"""Checkpoints: other meshes, damage, what is kept, what is found."""

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from orbax.checkpoint._src.checkpointers import async_checkpointer
from tiny import CONFIG, host, initial_state, make_config

from mixtral_jax import hosts, sharding
from mixtral_jax.config import InputError, TrainingError
from mixtral_jax.interop import own, own_arrays
from mixtral_jax.training import checkpoint
from mixtral_jax.training.step import abstract_train_state

MESH = {"expert": 4}
OTHER = {"data": 2, "expert": 2, "tensor": 2}


def extras(config, loss=None):
    state = np.arange(2 * config.training.batch_size).reshape(-1, 2)
    return own.Extras(config, state, None, loss)


def save_steps(folder, losses, keep=10):
    """A run folder with a checkpoint for each step: loss of `losses`."""
    config = make_config(mesh=MESH)
    mesh = sharding.make_mesh(**MESH)
    checkpoints = checkpoint.Checkpoints(folder, keep)
    with jax.set_mesh(mesh):
        state = initial_state(config, mesh)
        for step, loss in losses.items():
            checkpoints.save(step, state, extras(config, loss))
    checkpoints.wait()
    return checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_steps(folder, {3: 2.0, 6: 1.0}).close()
    return folder


def test_a_checkpoint_comes_back_bit_for_bit_on_another_mesh(saved):
    config = make_config(mesh=OTHER)
    mesh = sharding.make_mesh(**OTHER)
    checkpoints = checkpoint.Checkpoints(saved, 10)
    with jax.set_mesh(mesh):
        state, got = checkpoints.restore(6, abstract_train_state(config, mesh))
        expected = initial_state(config, mesh)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding
    chex.assert_trees_all_equal(state, expected, strict=True)
    np.testing.assert_array_equal(got.data_state, extras(config).data_state)
    assert got.config == make_config(mesh=MESH)


def test_a_model_loads_for_sampling_without_the_optimizer(saved):
    mesh = sharding.make_mesh(tensor=2)
    model = own_arrays.load_model(own.find(saved), CONFIG.model, mesh)
    with jax.set_mesh(mesh):
        expected = host(initial_state(CONFIG, mesh).params)
    np.testing.assert_array_equal(np.asarray(model.head_DV[...]), expected.head_DV[...])
    np.testing.assert_array_equal(
        np.asarray(model.layers.moe.down_EFD[...]), expected.layers.moe.down_EFD[...]
    )


def test_the_newest_and_the_best_are_kept_also_by_the_next_process(tmp_path):
    """Losses 3.0, 1.0, 2.0, ...: step 2 is the best, and stays when the run goes on elsewhere."""
    save_steps(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: None}, keep=2).close()
    assert checkpoint.Checkpoints(tmp_path, 2).steps() == [2, 3, 4]
    save_steps(tmp_path, {5: 4.0}, keep=2).close()
    assert checkpoint.Checkpoints(tmp_path, 2).steps() == [2, 4, 5]


@pytest.mark.parametrize("unknown", [float("nan"), float("inf"), None])
def test_a_loss_that_is_no_number_does_not_push_out_the_best(tmp_path, unknown):
    checkpoints = save_steps(tmp_path, {1: 1.0, 2: unknown, 3: 1.5, 4: unknown}, keep=1)
    assert checkpoints.steps() == [1, 4]
    checkpoints.close()


def test_checkpoints_are_set_aside_again_beside_those_before(tmp_path):
    save_steps(tmp_path, {1: 1.0, 2: 1.0}).close()
    (tmp_path / "set-aside-checkpoints-2").mkdir()
    checkpoints = checkpoint.Checkpoints(tmp_path, 10)
    assert [p.name for p in checkpoints.set_aside_after(1)] == ["set-aside-checkpoints-2-2"]
    assert checkpoints.steps() == [1]
    checkpoints.close()


def test_a_disk_that_takes_no_more_is_one_line(tmp_path, monkeypatch):
    checkpoints = save_steps(tmp_path, {1: 1.0})

    def full():
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nat somewhere")

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", full)
    with pytest.raises(TrainingError, match=r"cannot be written to .*No space left on device; "):
        checkpoints.wait()
    checkpoints.close()  # does not raise it again


def test_of_several_hosts_each_says_what_one_could_not_write(tmp_path, monkeypatch):
    checkpoints = save_steps(tmp_path, {1: 1.0})

    def full(*arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED [os_error_code='28']")

    monkeypatch.setattr(async_checkpointer, "_background_wait_for_commit_futures", full)
    checkpoints.check()
    assert not checkpoints.failed
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        checkpoints.save(2, initial_state(CONFIG, mesh), extras(CONFIG))
    with pytest.raises(TrainingError, match="No space left on device"):
        checkpoints.wait()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(hosts, "gather", lambda text: ["", text])
    assert checkpoints.failed
    for call in (checkpoints.check, checkpoints.wait):
        with pytest.raises(TrainingError, match=r"^host 1: a checkpoint cannot .*No space left"):
            call()
    checkpoints.close()


def test_a_checkpoint_that_one_host_cannot_read_is_damaged_on_all(saved, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gather", lambda text: [text, "no disk"])
    mesh = sharding.make_mesh()
    params = initial_state(CONFIG, mesh).params
    with pytest.raises(InputError, match=r"^host 1: no disk$"):
        own_arrays.restore(own.find(saved), "params", nnx.to_pure_dict(params), {})


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    save_steps(tmp_path, {3: 1.0}).close()
    folder = tmp_path / own.FOLDER
    (folder / "6.orbax-checkpoint-tmp-1234").mkdir()
    (folder / "6.orbax-checkpoint-tmp-1234" / "params").mkdir()
    assert own.find(tmp_path).name == "3"
    assert checkpoint.Checkpoints(tmp_path, 2).steps() == [3]


def largest_file(item):
    """Of arrays, one in d/: elsewhere lies what the processes wrote before it was merged."""
    folder = item / "d" if (item / "d").is_dir() else item
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("item", ["params", "optimizer", "run"])
@pytest.mark.parametrize(
    "damage", [cut, flip, lambda path: path.unlink()], ids=["cut", "flip", "gone"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_offered(tmp_path, item, damage):
    if item == "run" and damage is flip:
        pytest.skip("a changed letter in the JSON may still be a valid config")
    save_steps(tmp_path, {3: 2.0, 6: 1.0}).close()
    damage(largest_file(tmp_path / own.FOLDER / "6" / item))
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh), pytest.raises(InputError) as error:
        checkpoint.Checkpoints(tmp_path, 10).restore(6, abstract_train_state(CONFIG, mesh))
    text = str(error.value)
    assert "\n" not in text
    assert "checkpoints/6 is damaged" in text
    assert "run.resume_step=3" in text


def test_changed_bits_that_still_decode_are_found(saved):
    """The checksums do not rest on the storage format noticing."""
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        params = initial_state(CONFIG, mesh).params
        before = own_arrays.checksums(params)
        params.norm.weight[...] = params.norm.weight[...].at[3].multiply(1 + 1e-7)
        after = own_arrays.checksums(params)
    changed = {name for name in before if before[name] != after[name]}
    assert len(changed) == 1
    assert "norm" in changed.pop()


@pytest.mark.parametrize("make", ["missing", "empty", "foreign"])
def test_a_folder_without_a_checkpoint_is_refused(tmp_path, make):
    folder = tmp_path / "run"
    if make != "missing":
        folder.mkdir()
    if make == "foreign":
        (folder / "model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"does not exist|no checkpoint"):
        own.find(folder)
