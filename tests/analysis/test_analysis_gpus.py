"""Reports for GPUs that are not there: of a tiny model, where XLA compiles for them; mistakes."""

import importlib.util
import json

import pytest
import yaml
from tiny import MODEL, TRAINING

import generate
import train
from mixtral_jax.analysis import gpus

HAS_PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
compiles = pytest.mark.skipif(not HAS_PLUGIN, reason="jax_cuda13_plugin is not installed")


@pytest.fixture
def config_file(tmp_path):
    model = {**vars(MODEL), "attention": "xla", "grouped_matmul": "ragged_dot"}
    sections = {"model": model, "training": vars(TRAINING), "data": {"source": "synthetic"}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def run(main, config_file, *arguments):
    return main(["--config", str(config_file), "--compile-only", *arguments])


@compiles
def test_a_training_step_in_memory_alone(config_file, tmp_path, capsys):
    file = tmp_path / "report.json"
    assert run(train.main, config_file, "h200:2", "--report", str(file), "mesh.expert=2") == 0
    report, shown = json.loads(file.read_text()), capsys.readouterr().out
    memory = report["bytes_per_device"]
    assert report["fits"] is True
    assert report["chips"] == 2
    assert 0 < memory["arguments"] < memory["total"] < memory["limit"] < gpus.GPUS["h200"].hbm_bytes
    assert report["compiler_seconds"] is None
    assert report["estimated_mfu"] is None
    assert "memory, total" in shown
    assert "estimated" not in shown


@compiles
def test_what_does_not_fit_is_said_with_exit_code_1(config_file, monkeypatch, capsys):
    small = gpus.Gpu("NVIDIA H200 141GB HBM3e", 2**16, 4.8e12)
    devices = gpus.get_devices("h200", 1)
    monkeypatch.setattr(gpus, "get_devices", lambda *_: devices)
    monkeypatch.setitem(gpus.GPUS, "h200", small)
    assert run(train.main, config_file, "h200:1") == 1
    assert "fits                 NO" in capsys.readouterr().out


@compiles
def test_prefill_and_decode(config_file, capsys):
    asked = ("--prompt-length", "8", "--max-new-tokens", "8")
    assert run(generate.main, config_file, "h100:1", *asked) == 0
    shown = capsys.readouterr().out
    assert shown.count(": fits") == 2
    assert "limit: step" in shown


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("h200", [], "'h200' must look like h200:8"),
        ("h200:9", [], "'h200:9' must look like h200:8, with at most 8 GPUs"),
        ("h100:2x2", [], "'h100:2x2' must look like h100:8"),
        ("a100:1", [], "'a100:1' must look like v5p:4x4x4, with one of v4,"),
        ("h200:2", ["--slices", "2"], "--slices 2 is for TPUs: h200:2 are GPUs of one host"),
    ],
)
def test_mistakes_are_one_line(config_file, capsys, name, more, message):
    assert run(train.main, config_file, name, *more) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert not captured.out


@compiles
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.expert=2", "the mesh has 2 devices and h200:1 has 1: set mesh.data"),
        ("model.grouped_matmul=megablox", "model.grouped_matmul=megablox does not run on gpu"),
    ],
)
def test_meshes_and_kernels_that_do_not_fit_are_one_line(config_file, capsys, override, message):
    assert run(train.main, config_file, "h200:1", override) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_kernels_that_are_loops_are_refused_where_programs_are_priced():
    from mixtral_jax.analysis.compile_report import check_kernels
    from mixtral_jax.config import InputError

    check_kernels({"grouped_matmul": "hopper", "attention": "chunks"}, priced=False)
    with pytest.raises(InputError, match=r"model.attention=chunks is a loop.* or use xla"):
        check_kernels({"grouped_matmul": "megablox", "attention": "chunks"}, priced=True)


def test_without_the_plugin_the_message_says_what_to_install(config_file, capsys, monkeypatch):
    monkeypatch.setattr(gpus.importlib.util, "find_spec", lambda name: None)
    assert run(train.main, config_file, "h200:1") == 2
    assert "pip install -r requirements-gpu.txt (no GPU is needed)" in capsys.readouterr().err
