"""The planner: what it proposes, its commands, and mistakes."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import time

import pytest
import yaml
from tiny import MODEL, TRAINING

from mixtral_jax import config_io
from mixtral_jax.analysis import chips, plan, search
from mixtral_jax.config import Config, DataConfig, InputError, ModelConfig, TrainingConfig

BASE = Config(
    ModelConfig(preset="mixtral_8x7b"),
    training=TrainingConfig(sequence_length=4096, batch_size=1),
    data=DataConfig(source="synthetic"),
)
FLAGS = ["--model", "mixtral_8x7b", "--sequence-length", "4096", "--compile", "0"]


@pytest.fixture(scope="module")
def plans():
    began = time.monotonic()
    found = search.plans(BASE, chips.parse("v5p:4x4x4"), 1, search.Choices())
    assert time.monotonic() - began < 60
    return found


def test_plans_fit_and_are_ranked(plans):
    speeds = [found.tokens_per_second for found in plans]
    assert speeds == sorted(speeds, reverse=True)
    assert all(found.estimate.total_bytes < 0.95 * 95 * 2**30 for found in plans)
    assert len({found.key for found in plans}) == len(plans)
    assert all(found.config.mesh.size == 64 for found in plans)
    assert all(0 < found.mfu < 0.9 for found in plans)


def test_bounded_buffers_beat_the_worst_case_and_experts_spread_beat_copies(plans):
    def best(**wanted):
        return max(
            found.tokens_per_second
            for found in plans
            if wanted.items() <= {**vars(found.config.mesh), **vars(found.config.model)}.items()
        )

    ragged = {"expert": 4, "exchange": "ragged", "param_dtype": "float32"}
    assert best(**ragged, receive_factor=1.25) > best(**ragged, receive_factor=None)
    assert best(fsdp=64) > best(fsdp=8, tensor=8)
    assert best(param_dtype="bfloat16") >= best(param_dtype="float32")


def test_no_plan_has_an_exchange_that_the_compiler_refuses_there(plans):
    assert {found.config.model.exchange for found in plans} == {"", "ragged", "padded"}
    found = search.plans(BASE, chips.parse("v5e:8x8"), 1, search.Choices())
    assert {one.config.model.exchange for one in found if one.config.mesh.expert > 1} == {"padded"}
    ragged = search.Choices(model={"exchange": "ragged"})
    assert not search.plans(BASE, chips.parse("v5e:4x8"), 1, ragged)
    small = dataclasses.replace(BASE.model, num_hidden_layers=2)
    base = dataclasses.replace(BASE, model=small)
    assert search.plans(base, chips.parse("v5e:4x4"), 1, ragged)


def test_a_batch_asked_for_is_made_of_microbatches():
    found = search.plans(BASE, chips.parse("v5p:4x4x4"), 1, search.Choices(batch_size=1024))
    assert found
    for one in found:
        training = one.config.training
        assert training.batch_size == 1024
        assert training.gradient_accumulation * one.config.mesh.batch_shards <= 1024


def test_slices_lie_on_data_or_on_fsdp_alone():
    target = chips.parse("v5p:2x2x1")
    for mesh in search.meshes(BASE, target, 2, search.Choices()):
        assert mesh.size == 8
        assert (mesh.data if mesh.data > 1 else mesh.fsdp) % 2 == 0


def test_a_command_says_all_of_its_plan(tmp_path, capsys):
    file = tmp_path / "plans.json"
    flags = ["--topology", "v5p:4x4x4", "--top", "2", "--report", str(file)]
    assert plan.main([*FLAGS, *flags, "model.load_balance_weight=0.03"]) == 0
    shown, report = capsys.readouterr().out, json.loads(file.read_text())
    assert len(report) > 10
    assert shown.count("python train.py") == 2
    for described in report[:5]:
        words = shlex.split(described["command"])
        assert words[:2] == ["python", "train.py"]
        assert words[-2:] == ["--compile-only", "v5p:4x4x4"]
        config = config_io.load(words[3], words[4:-2])
        assert vars(config.mesh) == described["mesh"]
        assert config.model.load_balance_weight == 0.03
        assert config.model.remat == described["remat"]
        assert config.model.param_dtype == described["param_dtype"]
        assert config.training.batch_size == described["batch_size"]
        assert config.training.sequence_length == 4096


def test_attention_without_its_kernel_is_said_with_what_would_have_it(capsys):
    flags = ["--topology", "v5p:2x2x2", "mesh.fsdp=8", "model.remat=full", "model.head_dim=96"]
    wanted = "splash wants multiples of 128, not training.sequence_length=4000 (but 3968 or 4096)"
    assert plan.main([*FLAGS, *flags, "--sequence-length", "4000"]) == 0
    assert f"{wanted}, model.head_dim=96 (but 128)\n" in capsys.readouterr().out
    assert plan.main([*FLAGS, *flags[:-1], "--sequence-length", "32760", "--batch-size", "64"]) == 1
    assert "(but 32640 or 32768)\n" in capsys.readouterr().out
    assert plan.main([*FLAGS, *flags[:-1]]) == 0
    assert "splash" not in capsys.readouterr().out


def test_the_report_is_written_though_whoever_reads_the_table_has_gone(tmp_path):
    file = tmp_path / "plans.json"
    flags = ["--topology", "v5p:2x2x2", "mesh.fsdp=8", "model.remat=full", "--report", str(file)]
    command = [sys.executable, "-m", "mixtral_jax.analysis.plan", *FLAGS, *flags]
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(written)
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(file.read_text())[0]["remat"] == "full"


@pytest.mark.tpu_compile
def test_the_best_are_compiled(tmp_path, capsys, optimized):
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")
    path, file = tmp_path / "tiny.yaml", tmp_path / "plans.json"
    model = {**vars(MODEL), "num_hidden_layers": 1}
    sections = {"model": model, "training": vars(TRAINING), "data": {"source": "synthetic"}}
    path.write_text(yaml.safe_dump(sections))
    flags = [
        "--config",
        str(path),
        "--topology",
        "v5e:1x1",
        "--compile",
        "1",
        "--report",
        str(file),
    ]
    assert plan.main([*flags, "--batch-size", "4"]) == 0
    best = json.loads(file.read_text())[0]
    assert best["compiled"]["fits"] is True
    speed = best["compiled"]["estimated_tokens_per_second_per_chip"]
    assert f"{speed:,.0f}" in capsys.readouterr().out
    assert "--compile-only v5e:1x1" in best["command"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology", "v5e:2x2"], "nothing fits on 1 x v5e:2x2: use more chips"),
        (["--topology", "v5p:4x4x4", "mesh.fsdp=3"], "no mesh over the devices of 1 x v5p:4x4x4"),
        (
            ["--topology", "v5p:4x4x4", "--batch-size", "7", "mesh.expert=8"],
            "--batch-size 7 does not split over any mesh on 1 x v5p:4x4x4: use a multiple of 8",
        ),
        (
            ["--topology", "v5p:4x4x4", "mesh.fsdp=64", "model.exchange=ragged"],
            "no mesh on 1 x v5p:4x4x4 has experts to exchange between",
        ),
        (
            ["--topology", "v5p:4x4x4", "mesh.expert=4", "model.exchange=local"],
            "model.exchange=local cannot reach experts on other devices: use padded or ragged",
        ),
        (
            ["--topology", "v5e:16x16", "model.exchange=ragged"],
            "the compiler for TPU v5 lite refuses model.exchange=ragged on more than 16 chips",
        ),
    ],
)
def test_why_there_is_no_plan_is_said(capsys, flags, said):
    assert plan.main([*FLAGS, *flags]) == 1
    assert said in capsys.readouterr().out


def test_overrides_choose(tmp_path, capsys):
    file = tmp_path / "plans.json"
    chosen = [
        "mesh.expert=4",
        "model.remat=full",
        "model.exchange=padded",
        "model.receive_factor=3",
    ]
    flags = ["--topology", "v5p:4x4x4", "--param-dtype", "float32", "--report", str(file)]
    assert plan.main([*FLAGS, *flags, *chosen, "run.dir=a b"]) == 0
    capsys.readouterr()
    report = json.loads(file.read_text())
    assert len(report) > 3
    for described in report:
        assert described["mesh"]["expert"] == 4
        assert (described["remat"], described["exchange"]) == ("full", "padded")
        assert described["receive_factor"] == 3
        words = shlex.split(described["command"])
        assert "run.dir=a b" in words
        keys = [word.partition("=")[0] for word in words if "=" in word]
        assert len(set(keys)) == len(keys)


def test_a_model_that_starts_from_weights_has_their_sizes(tmp_path, capsys):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    sizes = {
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    sizes |= {
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
    kind = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(sizes | kind))
    path = tmp_path / "small.yaml"
    path.write_text(f"model: {{checkpoint: {folder}}}\ndata: {{source: synthetic}}\n")
    flags = ["--config", str(path), "--topology", "v5e:2x2", "--compile", "0", "--top", "1"]
    assert plan.main(flags) == 0
    assert "python train.py" in capsys.readouterr().out
    assert plan.main([*flags, f"model.checkpoint={tmp_path}/none"]) == 2
    assert "none does not exist" in capsys.readouterr().err


@pytest.mark.tpu_compile
def test_a_plan_that_is_not_compiled_leaves_the_others(capsys, monkeypatch):
    from mixtral_jax.analysis import compile_report

    def refused(config, name, slices):
        raise InputError("libtpu is not installed")

    monkeypatch.setattr(compile_report, "compile_report", refused)
    flags = ["--model", "mixtral_8x7b", "--topology", "v5p:4x4x4", "--compile", "2", "--top", "3"]
    assert plan.main(flags) == 0
    shown = capsys.readouterr()
    assert shown.err.count("is not compiled: libtpu is not installed") == 2
    assert shown.out.count("python train.py") == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--topology", "v9:4x4"], "'v9:4x4' must look like v5p:4x4x4"),
        (["--topology", "v5p:4x4"], "'v5p:4x4' has 2 axes and v5p 3"),
        (["--topology", "v5e:100x100"], "is not a slice: it has 10,000 chips, and a pod 256"),
        (["--topology", "v5p:4x5x4"], "'v5p:4x5x4' is not a slice: a host has 2 x 2 chips"),
        (["--topology", "v5p:4x4x4", "--model", "mixtral"], "--model='mixtral' is not one of"),
        (
            ["--topology", "v5p:4x4x4", "--sequence-length", "40000"],
            "sequence_length=40000 is more",
        ),
        (["--topology", "v5p:4x4x4", "--slices", "0"], "--slices 0 must be at least 1"),
        (["--topology", "v5p:4x4x4", "--compile", "-1"], "--compile -1 must be at least 0"),
        (["--topology", "v5p:4x4x4", "--report", "/no/such/x"], "there is no folder /no/such"),
        (["--topology", "v5p:4x4x4", "--model", ""], "--model='' is not one of"),
        (["--topology", "h200:8"], "--topology h200:8: plans are for TPU slices"),
        (["--topology", "v5p:4x4x4", "training.batch_size=64"], "name it as --batch-size"),
        (["--topology", "v5p:4x4x4", "model.preset=mixtral_8x22b"], "name it as --model"),
        (["--topology", "v5p:4x4x4", "mesh.expret=4"], "did you mean expert?"),
        (["--topology", "v5p:4x4x4", "--report", "/"], "--report / is a folder"),
        ([], "--topology"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(capsys, flags, message):
    assert plan.main([*FLAGS, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
