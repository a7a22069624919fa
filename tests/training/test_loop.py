"""Runs: metrics, resuming, signals, failing, run folders; in this process, with tiny models."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import re
import shutil
import signal

import jax
import numpy as np
import pytest
import sentencepiece
from tiny import make_config

import mixtral_jax
from mixtral_jax import config_io, sharding
from mixtral_jax.config import InputError, RunConfig, SourceConfig, TrainingError
from mixtral_jax.data.tokenizer import train_tokenizer
from mixtral_jax.interop import folders, own, own_arrays
from mixtral_jax.model.mixtral import initialize
from mixtral_jax.training import loop
from mixtral_jax.training.metrics import Reporter

ROOT = pathlib.Path(__file__).parents[2]
TIMES = ("tokens_per_second", "step_seconds")


@pytest.fixture(autouse=True)
def _devices_are_ready(monkeypatch):
    monkeypatch.setattr(sharding, "start", lambda mesh: None)


def lines(folder, kind="loss"):
    """Records of metrics.jsonl that have a key, without what differs from run to run."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records if kind in r]


def checksums(folder, step):
    return own.read_run(folder / own.FOLDER / str(step))["checksums"]


def synthetic(folder, **sections):
    return make_config(run={"dir": str(folder)}, **sections)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 6 steps on experts over 2 devices."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "start", lambda mesh: None)
        loop.train(synthetic(folder, mesh={"expert": 2}))
    return folder


def test_a_run_folder_has_what_it_promises(whole):
    assert config_io.load(whole / "config.yaml").training.steps == 6
    assert (whole / "report.png").stat().st_size > 10_000
    assert (whole / "tensorboard").is_dir()
    training, validation = lines(whole), lines(whole, "validation_loss")
    assert [r["step"] for r in training] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in validation] == [3, 6]
    keys = {"step", "loss", "load_balance", "router_z", "grad_norm", "learning_rate"}
    keys |= {"dropped_assignments", "skipped_steps", "expert_load_max_over_mean", "expert_share"}
    assert set(training[0]) == keys
    told = (ROOT / "docs" / "training.md").read_text()
    assert all(f"| `{key}` |" in told for key in {*keys, *validation[0], *TIMES})
    last = training[-1]
    assert last["dropped_assignments"] == last["skipped_steps"] == 0
    for load, share in zip(last["expert_load_max_over_mean"], last["expert_share"], strict=True):
        assert sum(share) == pytest.approx(1, abs=1e-4)
        assert load == pytest.approx(4 * max(share), abs=1e-3)


def test_sigterm_saves_and_the_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, capfd):
    folder, advance, events = tmp_path / "run", Reporter.advance, []

    def advance_then_signal(self, step, record):
        events.append(step)
        advance(self, step, record)
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    config = synthetic(folder, mesh={"expert": 2})
    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "advance", advance_then_signal)
        patch.setattr(loop, "give_back_memory", lambda: events.append("what compiling took"))
        loop.train(config)
    assert events == ["what compiling took", 1, 2, 3, 4]
    assert [r["step"] for r in lines(folder)] == [1, 2, 3, 4]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # as a kill -9 in the middle of a line leaves it
    loop.train(config)
    assert "resuming" in capfd.readouterr().out
    assert lines(folder) == lines(whole)
    assert checksums(folder, 6) == checksums(whole, 6)
    compiled = []
    monkeypatch.setattr(loop.Run, "_compile", lambda self: compiled.append(self))
    loop.train(config)
    assert "complete at step 6" in capfd.readouterr().out
    assert not compiled


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh_with_the_same_losses(whole, tmp_path):
    folder = tmp_path / "run"
    loop.train(synthetic(folder, mesh={"expert": 2}, training={"steps": 3, "schedule": "constant"}))
    mesh = {"expert": 1, "data": 2, "tensor": 2}
    loop.train(synthetic(folder, mesh=mesh, training={"steps": 6, "schedule": "constant"}))
    straight = tmp_path / "straight"
    loop.train(synthetic(straight, training={"steps": 6, "schedule": "constant"}))
    for got, expected in zip(lines(folder), lines(straight), strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["load_balance"] == pytest.approx(expected["load_balance"], rel=1e-5)


def test_a_damaged_newest_checkpoint_can_be_set_aside(whole, tmp_path):
    folder = tmp_path / "run"
    config = synthetic(folder, mesh={"expert": 2})
    loop.train(config)
    damaged = folder / own.FOLDER / "6" / "params"
    for path in [p for p in damaged.rglob("*") if p.is_file() and p.stat().st_size > 1000]:
        path.write_bytes(b"")
    more = {"training": {"steps": 9}, "mesh": {"expert": 2}}
    with pytest.raises(InputError, match=r"6 is damaged.*run.resume_step=3"):
        loop.train(synthetic(folder, **more))
    loop.train(make_config(run={"dir": str(folder), "resume_step": 3}, mesh={"expert": 2}))
    assert lines(folder) == lines(whole)
    assert (folder / "set-aside-checkpoints-6").is_dir()


def test_what_is_said_and_warned_of_has_lines_of_its_own_beside_the_bar(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one and the other"}\nnot JSON\n')
    text = train_tokenizer(["one and the other, of some words\n"] * 9, 290)
    text.save(tmp_path / "some.model")
    named = (SourceConfig(f"{tmp_path}/a.jsonl"),), 0, f"{tmp_path}/some.model"
    data = dict(zip(("train", "validation_fraction", "tokenizer"), named), source="files")
    training = {"steps": 2, "validate_every": 0}
    config = synthetic(tmp_path / "run", data=data, model={"vocab_size": 290}, training=training)
    screen = io.StringIO()
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        loop.train(config)
    for said in ("Mixtral of", "kernels: ", "compiled in", "first step", "skipped .*not JSON; "):
        assert re.search(rf"(^|[\r\n]){said}[^\r\n]*\n", screen.getvalue()), said
    screen.truncate(0)
    with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
        loop.train(config)
    assert "complete at step 2" in screen.getvalue()
    assert "00:00" not in screen.getvalue()


def test_steps_that_are_not_finite_stop_the_run(tmp_path, capfd):
    training = {"learning_rate": 1e30, "max_skipped_steps": 3, "warmup_steps": 0, "steps": 30}
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row.*learning_rate"):
        loop.train(synthetic(tmp_path / "run", training=training))
    assert "loss or gradient not finite" in capfd.readouterr().out


def test_text_is_scored_in_bits_per_byte(tmp_path):
    """The whole of it once: a tokenizer made from the data, on the mesh, with accumulation."""
    for number in range(12):
        text = "\n".join(f"def f{i}(x): return x * {i + number}" for i in range(30))
        (tmp_path / f"{number}.txt").write_text(text)
    config = make_config(
        run={"dir": str(tmp_path / "run")},
        data={
            "source": "files",
            "train": (SourceConfig(f"{tmp_path}/*.txt"),),
            "validation_fraction": 0.3,
            "tokenizer": "train",
        },
        model={"vocab_size": 300},
        training={
            "sequence_length": 16,
            "gradient_accumulation": 2,
            "validation_batches": 60,
            "steps": 2,
            "validate_every": 2,
        },
        mesh={"expert": 2, "fsdp": 2},
    )
    loop.train(config)
    (record,) = lines(tmp_path / "run", "validation_loss")
    assert 0 < record["validation_bits_per_byte"] < 8
    path = own.find(tmp_path / "run")
    tokenizer = own.load_extras(path).tokenizer
    assert tokenizer.vocab_size == 300
    saved = sentencepiece.SentencePieceProcessor(str(tmp_path / "run" / "tokenizer.model"))
    assert saved.get_piece_size() == 300


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"exchange": "ragged"}, "mesh": {"expert": 2}}, "does not run on cpu"),
        ({"mesh": {"expert": 4, "data": 4}, "training": {"batch_size": 16}}, "needs 16 devices"),
        ({"data": {"source": "files"}}, "data.train is empty"),
        (
            {"data": {"train": (SourceConfig("/no/such"),), "tokenizer": "t"}},
            "data.train and data.tokenizer would go unread: set data.source=files",
        ),
    ],
)
def test_what_only_the_machine_can_refuse_is_refused_before_writing(tmp_path, sections, message):
    with pytest.raises(InputError, match=message):
        loop.train(synthetic(tmp_path / "run", **sections))
    assert not (tmp_path / "run").exists()


def test_another_runs_folder_is_left_alone(whole):
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))
    config = synthetic(whole, mesh={"expert": 2}, training={"learning_rate": 0.5})
    config = dataclasses.replace(config, run=RunConfig(config.run.dir, seed=1))
    with pytest.raises(InputError, match=r"learning_rate=0.01, not 0.5; run.seed=0, not 1: choose"):
        loop.train(config)
    assert sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*")) == before


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        loop.train(synthetic(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        loop.train(synthetic(tmp_path / "run"))


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(InputError, match="not writable"):
        loop.train(synthetic(tmp_path / "run"))
    assert jax.device_count() == 8


# ---- starting from weights ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder in Hugging Face's form, with a tokenizer, and the model that it holds."""
    folder = tmp_path_factory.mktemp("weights") / "huggingface"
    documents = ["def first(words):\n    return words[0]\n", "class Words(list):\n    pass\n"]
    tokenizer = train_tokenizer(documents, 290)
    config = make_config(model={"vocab_size": 290, "load_balance_weight": 0.05}).model
    model = initialize(config, jax.random.key(5), sharding.make_mesh())
    mixtral_jax.save_model(model, tokenizer, folder, "huggingface")
    return folder, model, tokenizer


def from_weights(path, folder, *overrides, **model):
    """The config of a run on text that starts from the weights in a folder."""
    (path / "texts").mkdir(exist_ok=True)
    for number in range(8):
        text = f"def first(words):\n    return words[{number}]\n" * 9
        (path / "texts" / f"{number}.txt").write_text(text)
    training = {"steps": 2, "batch_size": 4, "sequence_length": 16, "log_every": 1}
    training |= {"checkpoint_every": 1, "validate_every": 0, "warmup_steps": 0}
    values = {
        "model": {"checkpoint": str(folder), **model},
        "training": training,
        "data": {"train": str(path / "texts" / "*.txt")},
        "run": {"dir": str(path / "run")},
    }
    (path / "config.yaml").write_text(json.dumps(values))
    return config_io.load(path / "config.yaml", overrides, folders.training_sizes)


def test_a_run_starts_from_weights_with_their_sizes_and_tokenizer(weights, tmp_path):
    folder, model, tokenizer = weights
    rate = "training.learning_rate=0"  # so that what is saved is what it started from
    config = from_weights(tmp_path, folder, rate, "mesh.expert=2")
    sizes = {"vocab_size": 290, "checkpoint": str(folder), "load_balance_weight": 0.05}
    assert config.model == make_config(model=sizes).model
    loop.train(config)
    step = own.find(tmp_path / "run")
    again = own_arrays.load_model(step, config.model, sharding.make_mesh())
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old))
    assert own.load_extras(step).tokenizer.model_bytes == tokenizer.model_bytes
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == tokenizer.model_bytes


def test_weights_keep_their_tokenizer(weights, tmp_path, capfd):
    """What an embedding was trained with; a run's files may be others than those it came from."""
    folder, _, tokenizer = weights
    once = ("data.tokenizer=train", "training.steps=1")
    loop.train(from_weights(tmp_path, folder, *once))
    assert own.load_extras(own.find(tmp_path / "run")).tokenizer.pieces == tokenizer.pieces
    assert f"data.tokenizer=train: that of {folder}, which" in capfd.readouterr().out
    other = tmp_path / "other.model"
    train_tokenizer(["something else, of other words altogether\n"] * 9, 290).save(other)
    named = (f"data.tokenizer={other}", f"run.dir={tmp_path / 'named'}")
    with pytest.raises(InputError, match=rf"={other} has other pieces than .*checkpoint={folder}"):
        loop.train(from_weights(tmp_path, folder, *named))
    assert not (tmp_path / "named").exists()


def test_a_run_that_started_from_weights_goes_on_without_them(weights, tmp_path):
    folder, _, _ = weights
    moved = tmp_path / "weights"
    shutil.copytree(folder, moved)
    loop.train(from_weights(tmp_path, moved))
    first = lines(tmp_path / "run")
    assert [record["step"] for record in first] == [1, 2]
    shutil.rmtree(moved)
    loop.train(from_weights(tmp_path, moved, "training.steps=3"))
    assert [record["step"] for record in lines(tmp_path / "run")] == [1, 2, 3]
    assert lines(tmp_path / "run")[:2] == first


def test_sizes_that_contradict_the_weights_are_refused(weights, tmp_path):
    folder, _, _ = weights
    with pytest.raises(InputError, match=r"model.hidden_size=48, but model.checkpoint=.* has 24"):
        from_weights(tmp_path, folder, hidden_size=48)
    with pytest.raises(InputError, match=r"model.preset=mixtral_8x7b: .* \(model.preset= on the"):
        from_weights(tmp_path, folder, preset="mixtral_8x7b")
    with pytest.raises(InputError, match=r"checkpoint folder .*none does not exist"):
        from_weights(tmp_path, tmp_path / "none")
    free = {"max_position_embeddings": 32, "load_balance_weight": 0.5, "hidden_size": "24"}
    model = from_weights(tmp_path, folder, **free).model
    assert (model.max_position_embeddings, model.load_balance_weight) == (32, 0.5)


def test_weights_without_a_tokenizer_ask_for_one(weights, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(weights[0], folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(InputError, match=r"has no tokenizer.model: name one as data.tokenizer"):
        loop.train(from_weights(tmp_path, folder))
    assert not (tmp_path / "run").exists()
