"""Runs that go on: with their files and tokenizer, one process at a time, and nothing lost."""

import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from processes import as_hosts
from tiny import make_config

import mixtral_jax
from mixtral_jax import hosts, sharding
from mixtral_jax.config import InputError, SourceConfig, TrainingError
from mixtral_jax.data.batches import TrainBatches
from mixtral_jax.data.released import released_file
from mixtral_jax.data.tokenizer import Tokenizer, train_tokenizer
from mixtral_jax.interop import own
from mixtral_jax.model.mixtral import initialize
from mixtral_jax.training import loop, run_folder


@pytest.fixture(autouse=True)
def _devices_are_ready(monkeypatch):
    monkeypatch.setattr(sharding, "start", lambda mesh: None)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def synthetic(folder, **sections):
    return make_config(run={"dir": str(folder)}, **sections)


def on_text(path, steps, **sections):
    """The config of a run on the files path/*.txt with a tokenizer made from them."""
    training = {"steps": steps, "sequence_length": 16, "checkpoint_every": 1, "validate_every": 0}
    return make_config(
        run={"dir": str(path / "run")},
        data={
            "source": "files",
            "train": (SourceConfig(f"{path}/*.txt"),),
            "validation_fraction": 0,
            "tokenizer": "train",
            "interleave": 1,
            **sections.pop("data", {}),
        },
        model={"vocab_size": 290, **sections.pop("model", {})},
        training=training | sections.pop("training", {}),
        **sections,
    )


@pytest.fixture
def texts(tmp_path):
    for number in range(6):
        text = f"def first(words):\n    return words[{number}]\n" * 9
        (tmp_path / f"{number}.txt").write_text(text)
    return tmp_path


def test_a_run_wants_its_files_and_its_tokenizer_back(texts):
    loop.train(on_text(texts, 1))
    (texts / "0a.txt").write_text("another")
    with pytest.raises(InputError, match=r"data.train was 6 documents .* and is 7 documents in 7"):
        loop.train(on_text(texts, 2))
    (texts / "0a.txt").unlink()
    tokenizer = (texts / "run" / "tokenizer.model").read_bytes()
    other = train_tokenizer(["something else, of other words altogether\n"] * 9, 290)
    (texts / "run" / "tokenizer.model").write_bytes(other.model_bytes)
    with pytest.raises(InputError, match=r"the tokenizer of .* has changed"):
        loop.train(on_text(texts, 2))
    (texts / "run" / "tokenizer.model").write_bytes(tokenizer)
    loop.train(on_text(texts, 2))
    assert [r["step"] for r in records(texts / "run")] == [1, 2]


def test_what_has_changed_is_said_before_what_it_leads_to(texts):
    data, training = {"validation_fraction": 0.5}, {"validate_every": 1, "validation_batches": 9}
    loop.train(on_text(texts, 1, data=data, training=training))
    for number in range(6):
        (texts / f"{number}.txt").write_text("x" * 10**5)
    with pytest.raises(InputError, match=r"data.train was .*, or start another run.dir with"):
        loop.train(on_text(texts, 2, data=data, training=training))


def test_without_a_checkpoint_the_tokenizer_is_made_of_the_files_as_they_are(texts, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "loop", lambda self: None)  # as a kill before the first step
        loop.train(on_text(texts, 1))
    before = (texts / "run" / "tokenizer.model").read_bytes()
    for number in range(6):
        (texts / f"{number}.txt").write_text(f"of other words altogether: {number}\n" * 9)
    loop.train(on_text(texts, 1))
    assert (texts / "run" / "tokenizer.model").read_bytes() != before


def test_the_version_of_a_tokenizer_stays(texts):
    """The file of v2 says v3 but for its name; the run's own copies must not lose that."""
    pytest.importorskip("mistral_common")
    tokenizer = Tokenizer.from_file(released_file("mistral-v2"))
    sizes = {"vocab_size": tokenizer.vocab_size}
    base = texts / "base"
    model = initialize(make_config(model=sizes).model, jax.random.key(0), sharding.make_mesh())
    mixtral_jax.save_model(model, tokenizer, base, "huggingface")
    for steps in (1, 2):
        weights = {**sizes, "checkpoint": str(base)}
        loop.train(on_text(texts, steps, data={"tokenizer": ""}, model=weights))
        assert own.load_extras(own.find(texts / "run")).tokenizer.version == "v2"


def test_what_was_trained_is_saved_where_the_data_ends_in_an_error(texts, monkeypatch):
    def make(self, made=TrainBatches._make):
        if self._step == 3:
            raise InputError("a.jsonl:18: not JSON")
        return made(self)

    monkeypatch.setattr(TrainBatches, "_make", make)
    with pytest.raises(InputError, match=r"a\.jsonl:18"):
        loop.train(on_text(texts, 9, training={"checkpoint_every": 9}))
    monkeypatch.undo()
    monkeypatch.setattr(sharding, "start", lambda mesh: None)
    assert own.find(texts / "run").name == "3"
    loop.train(on_text(texts, 4))
    assert [r["step"] for r in records(texts / "run")] == [1, 2, 3, 4]


# ---- one process, one folder -------------------------------------------------------------------


def test_a_folder_that_another_process_trains_in_is_left_alone(tmp_path):
    folder = tmp_path / "run"
    loop.train(synthetic(folder, training={"steps": 3}))
    other = (
        "import fcntl, sys; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
        "f.truncate(0); f.write('process 7 on h'); f.flush(); print('has it', flush=True);"
        "sys.stdin.read()"
    )
    lock = str(folder / run_folder.LOCK)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", other, lock], **pipes) as process:
        assert process.stdout.readline() == b"has it\n"
        before = (folder / "metrics.jsonl").read_bytes()
        with pytest.raises(InputError, match=r"run.dir=.* is in use by process 7 on h: wait"):
            loop.train(synthetic(folder))
        assert (folder / "metrics.jsonl").read_bytes() == before
        process.stdin.close()
    loop.train(synthetic(folder))
    assert own.find(folder).name == "6"


def test_what_a_start_that_failed_leaves_is_no_other_run(tmp_path, monkeypatch):
    def full(config, path):
        path.write_text("")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.config_io, "save", full)
        with pytest.raises(InputError, match=r"run.dir=.*cannot be written: No space left"):
            loop.train(synthetic(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "run").iterdir()] == [run_folder.LOCK]
    (tmp_path / "run" / ".0123.partial").write_text("")  # as a kill leaves it
    assert run_folder.check(synthetic(tmp_path / "run")) is False


def test_a_config_that_is_not_understood_is_named_with_its_file(tmp_path):
    (tmp_path / "config.yaml").write_text("run: {foo: 1}")
    with pytest.raises(InputError, match=r"config.yaml: unknown config key run.foo.*choose"):
        run_folder.check(synthetic(tmp_path))


@pytest.mark.parametrize("name", ["x" * 300, "dangling"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, name):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    with pytest.raises(InputError, match="cannot be written"):
        loop.train(synthetic(tmp_path / name))


def test_the_saved_config_does_not_go_back_again(tmp_path):
    run_folder.write(make_config(run={"dir": str(tmp_path), "resume_step": 3}))
    assert "resume_step: null" in (tmp_path / "config.yaml").read_text()


def test_what_may_change_is_documented():
    told = (pathlib.Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for section, keys in run_folder.MAY_CHANGE.items():
        (row,) = re.findall(rf"^\| `{section}` \|(.*)", told, re.M)
        assert section == "mesh" or set(re.findall(r"`(\w+)`", row)) - {section} == keys


# ---- several hosts -----------------------------------------------------------------------------


def hosts_differ(monkeypatch, old, new):
    """As if on a second host what the hosts compare had one text for another."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gather", lambda text: [text, text.replace(old, new)])


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            'rate": "0.01"',
            'rate": "1"',
            r"differ in training.learning_rate \(0.01 on host 0, 1 on host 1\)",
        ),
        ("6 documents", "5 documents", r"the files of data.train \(6 documents in 6 files, "),
        (
            '"the tokenizer": "',
            '"the tokenizer": "0',
            r"the tokenizer \(\w{12} on host 0, 0\w{12} on",
        ),
        (
            f"process {os.getpid()}",
            "process 0",
            r"run.dir=.*must be on a disk that all of them share",
        ),
    ],
    ids=["a setting", "a file", "the tokenizer", "the folder"],
)
def test_hosts_that_differ_do_not_train(texts, monkeypatch, old, new, told):
    hosts_differ(monkeypatch, old, new)
    with pytest.raises(InputError, match=told):
        loop.train(on_text(texts, 1, mesh={"data": 8}, training={"batch_size": 8}))
    assert not (texts / "run" / run_folder.CONFIG).exists()


def test_what_one_host_cannot_do_is_said_by_all(texts, monkeypatch):
    hosts_differ(monkeypatch, "", "")
    for path in texts.glob("*.txt"):
        path.unlink()
    with pytest.raises(InputError, match=r"^host 0: data.train: .* matches no file"):
        loop.train(on_text(texts, 1, mesh={"data": 8}, training={"batch_size": 8}))


def test_hosts_see_whether_their_folder_is_one(tmp_path, monkeypatch):
    def begin(folder):
        folder.mkdir(exist_ok=True)
        with run_folder.Hold() as hold:
            hold.take(folder)
            hosts.gather("")  # as training does, which takes it on all hosts together
            run_folder.check_shared(folder, True)

    one, other = tmp_path / "one", tmp_path / "other"
    assert as_hosts(monkeypatch, begin, one, one) == [None, None]
    errors = as_hosts(monkeypatch, begin, one, other)
    shutil.copytree(one, other, dirs_exist_ok=True)  # with what another run left there
    (other / run_folder.LOCK).write_text("process 7 on h")
    for error in [*errors, *as_hosts(monkeypatch, begin, one, other)]:
        assert re.match(r"the hosts differ in run.dir=.* on host 0, .* on host 1\)", str(error))


def test_a_host_whose_others_are_gone_says_how_to_go_on(tmp_path, monkeypatch):
    def lost(run):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(hosts, "gather", lambda text: pytest.fail("waits for them"))
        raise jax.errors.JaxRuntimeError("UNKNOWN: Connection reset by peer\nand more")

    monkeypatch.setattr(loop.Run, "loop", lost)
    told = r"^host 0 cannot go on .* \(UNKNOWN: Connection reset by peer\): the same command on all"
    with pytest.raises(TrainingError, match=told):
        loop.train(synthetic(tmp_path / "run"))


# ---- nothing is silent -------------------------------------------------------------------------


def test_every_dropped_token_is_in_some_line(tmp_path):
    bound = {"model": {"capacity_factor": 0.5}}
    loop.train(synthetic(tmp_path / "each", **bound))
    loop.train(synthetic(tmp_path / "some", **bound, training={"log_every": 4}))
    each, some = (
        [r["dropped_assignments"] for r in records(tmp_path / name) if "loss" in r]
        for name in ("each", "some")
    )
    assert min(each) > 0
    assert some == [sum(each[:4]), sum(each[4:])]
    validated = [r for r in records(tmp_path / "each") if "validation_loss" in r]
    assert all(r["validation_dropped_assignments"] > 0 for r in validated)


def test_weights_that_may_be_at_fault_push_out_no_checkpoint(tmp_path, capfd, caplog):
    training = {"learning_rate": 1e30, "max_skipped_steps": 9, "warmup_steps": 0, "steps": 30}
    training |= {"checkpoint_every": 1, "keep_checkpoints": 2, "validate_every": 0}
    with caplog.at_level(logging.WARNING), pytest.raises(TrainingError):
        loop.train(synthetic(tmp_path / "run", training=training))
    said = capfd.readouterr().out
    skipped = said.count("not saved, as")
    assert skipped > 0
    steps = sorted(int(p.name) for p in (tmp_path / "run" / own.FOLDER).iterdir())
    assert steps[-1] < 30 - skipped
    assert not [r for r in caplog.records if "NaN" in r.message]  # from TensorBoard's writer


def test_a_report_that_was_not_drawn_is_drawn(tmp_path, capfd):
    folder = tmp_path / "run"
    loop.train(synthetic(folder, training={"steps": 3}))
    (folder / "report.png").unlink()
    loop.train(synthetic(folder, training={"steps": 3}))
    assert (folder / "report.png").stat().st_size > 10_000
    assert "complete at step 3" in capfd.readouterr().out


def test_a_skipped_file_of_any_name_is_named_at_the_end(texts, capsys):
    (texts / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    loop.train(on_text(texts, 1))
    assert "skipped 1 malformed document: '" in capsys.readouterr().out


def test_what_a_user_may_not_expect_is_said_at_the_start(tmp_path, capfd):
    training = {"warmup_steps": 3, "steps": 3, "profile_steps": "7:9", "validate_every": 0}
    loop.train(synthetic(tmp_path / "run", training=training))
    said = capfd.readouterr().out
    assert "training.warmup_steps=3 is not less than training.steps=3: the learning rate" in said
    assert "training.profile_steps=7:9: no such step is left" in said
    assert "data: random tokens" in said
    assert not (tmp_path / "run" / "profile").exists()


def test_a_signal_in_the_last_step_changes_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(hosts, "on_any_host", lambda told: True)
    loop.train(synthetic(tmp_path / "run", training={"steps": 1}))
    assert (tmp_path / "run" / "report.png").exists()
    assert "stopped" not in capfd.readouterr().out


def test_a_run_that_is_stopped_saves_before_it_validates(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "on_any_host", lambda told: True)
    monkeypatch.setattr(loop.Run, "_validate", lambda self, step: pytest.fail("validated"))
    loop.train(synthetic(tmp_path / "run"))
    assert own.find(tmp_path / "run").name == "1"
    (last,) = records(tmp_path / "run")
    assert last["step"] == 1
    assert np.isfinite(last["loss"])
