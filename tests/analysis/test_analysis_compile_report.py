"""Compile reports: of a tiny model on real compilations, and the parts that need none."""

import importlib.util
import json
import sys

import jax
import pytest
import yaml
from tiny import MODEL, TRAINING, make_config

import train
from mixtral_jax.analysis import compile_report, memory, prices, report_file, topology
from mixtral_jax.config import InputError
from mixtral_jax.model.flops import training_flops_per_token

MESH = {"fsdp": 2, "expert": 2}
KEYS = {
    *("fits", "bytes_per_device", "tokens_per_chip", "model_flops", "compiled_flops"),
    *("collectives", "compiler_seconds", "interconnect_seconds", "estimated_step_seconds"),
    *("estimated_tokens_per_second_per_chip", "estimated_mfu"),
    *("compiled_flops_expected_rows", "compiler_seconds_expected_rows", "unpriced"),
    *("arithmetic_seconds", "memory_seconds", "loop_seconds"),
}
compiles = pytest.mark.tpu_compile


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")


@pytest.fixture
def config_file(tmp_path):
    sections = {"model": vars(MODEL), "training": vars(TRAINING), "mesh": MESH}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**sections, "data": {"source": "synthetic"}}))
    return path


# ---- real compilations -------------------------------------------------------------------------


@pytest.mark.slow
@compiles
def test_the_report_of_three_layers_is_that_of_the_unrolled_program(
    libtpu, optimized, config_file, tmp_path, capsys
):
    file, folder = tmp_path / "report.json", tmp_path / "run"
    arguments = ["--compile-only", "v5p:2x2x1", "--report", str(file), f"run.dir={folder}"]
    code = train.main(["--config", str(config_file), "model.num_hidden_layers=3", *arguments])
    shown, report = capsys.readouterr().out, json.loads(file.read_text())
    assert code == 0
    assert not folder.exists()
    assert report.keys() >= KEYS
    assert report["fits"] is True
    memory = report["bytes_per_device"]
    assert memory["limit"] == 95 * 2**30
    assert 0 < memory["arguments"] < memory["total"] < memory["limit"]
    assert memory["total"] == sum(memory[part] for part in ("arguments", "temporaries", "output"))
    assert report["tokens_per_chip"] == 8 * 9 / 4
    assert 0 < report["compiler_seconds"] < 1e-3
    assert 0 < report["interconnect_seconds"] < 1e-3
    assert 0 < report["estimated_mfu"] < 0.1
    assert 0 < report["loop_seconds"] < 1e-3
    parts = ("compiler_seconds_expected_rows", "loop_seconds", "interconnect_seconds")
    step = sum(report[part] for part in parts) + report["unpriced"]["seconds"]
    assert report["estimated_step_seconds"] == pytest.approx(step)
    # Of the rows that a device has room for, half are in use: the products forward need less.
    for name in ("compiled_flops", "compiler_seconds"):
        assert 0.5 < report[f"{name}_expected_rows"] / report[name] < 1
    assert report["unpriced"] == {"flops": 0, "seconds": 0}
    for name in ("arithmetic_seconds", "memory_seconds"):
        assert 0 < report[name] < report["compiler_seconds"]
    for name in ("memory, total", "estimated tokens/s", "ragged-all-to-all", "no overlap"):
        assert name in shown

    target = topology.get_slice("v5p:2x2x1")
    config = make_config(mesh=MESH)
    mesh = topology.make_mesh(config.mesh, target)
    whole = prices.price_of_layers(config, mesh, target, 3)
    assert report["compiled_flops"] == pytest.approx(whole.compiled.flops, rel=0.02)
    assert report["compiler_seconds"] == pytest.approx(whole.compiled.seconds, rel=0.1)
    for kind in ("ragged-all-to-all", "all-gather"):
        assert report["collectives"][kind]["count"] == whole.collectives[kind]["count"]
        assert report["collectives"][kind]["bytes"] == pytest.approx(
            whole.collectives[kind]["bytes"], rel=0.02
        )
    # There and back, and the same backward.
    assert report["collectives"]["ragged-all-to-all"]["count"] == 3 * 4


def one_layer(topology_name, batch, length, **sizes):
    """The config of a model with one layer on fsdp=4 of a slice, and its price."""
    model = {**sizes, "num_hidden_layers": 1, "max_position_embeddings": length}
    training = {"batch_size": batch, "sequence_length": length}
    config = make_config(model=model, training=training, mesh={"fsdp": 4})
    target = topology.get_slice(topology_name)
    mesh = topology.make_mesh(config.mesh, target)
    return config.model, prices.price_of_layers(config, mesh, target, 1)


@compiles
def test_compiled_flops_are_those_of_the_model_and_the_buffers(libtpu, optimized):
    """Of a dense-like model, whose every expert is on every device: no worst-case buffers."""
    sizes = {"hidden_size": 256, "intermediate_size": 384, "vocab_size": 512, "head_dim": 64}
    model, found = one_layer("v5p:2x2x1", 4, 128, **sizes)
    wanted = 128 * training_flops_per_token(model, 128)
    assert 0.9 < found.compiled.flops / wanted < 3
    assert "ragged-all-to-all" not in found.collectives


@compiles
def test_a_gather_that_runs_beside_other_work_counts_once(libtpu, optimized):
    """Every matrix once, in bfloat16 but for the router's; norms lie whole."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1024, "head_dim": 128}
    model, found = one_layer("v5e:2x2", 8, 512, **sizes)
    router = 512 * 4
    matrices = model.num_parameters - router - 3 * 512
    sent = 3 / 4 * (2 * matrices + 4 * router)
    assert found.collectives["all-gather"]["bytes"] == pytest.approx(sent, rel=1e-3)


@compiles
def test_a_model_that_does_not_fit_is_reported_with_exit_code_1(
    libtpu, tmp_path, capsys, monkeypatch
):
    def refuse(*arguments):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (150.5G) exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(compile_report, "compile_step", refuse)  # the real one takes a minute
    path, file = tmp_path / "large.yaml", tmp_path / "report.json"
    sections = {"model": {"preset": "mixtral_8x7b"}, "training": {"batch_size": 4}}
    path.write_text(yaml.safe_dump({**sections, "mesh": {"fsdp": 4}}))
    code = train.main(["--config", str(path), "--compile-only", "v5e:2x2", "--report", str(file)])
    report, shown = json.loads(file.read_text()), capsys.readouterr().out
    assert code == 1
    assert report.keys() >= KEYS
    assert report["fits"] is False
    memory = report["bytes_per_device"]
    # Weights and two moments in float32; norms, counters and a batch of 512 tokens come on top.
    assert memory["arguments"] == pytest.approx(12 * 46_702_792_704 / 4, rel=1e-4)
    assert memory["total"] == 150.5 * 2**30  # the arguments are in it
    assert memory["limit"] == 16 * 2**30
    assert report["estimated_step_seconds"] is None
    assert "NO" in shown


@compiles
def test_another_error_of_the_compiler_is_not_taken_for_one_of_memory(libtpu, monkeypatch):
    def refuse(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(compile_report, "compile_step", refuse)
    with pytest.raises(InputError, match=r"refuses this program \(INTERNAL: something else\)"):
        compile_report.compile_report(make_config(mesh=MESH), "v5p:2x2x1", 1)


# ---- mistakes ----------------------------------------------------------------------------------


@compiles
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compile-only", "v9:4x4"], "'v9:4x4' must look like v5p:4x4x4"),
        (["--compile-only", "v5p"], "'v5p' must look like v5p:4x4x4"),
        (["--compile-only", ""], "'' must look like v5p:4x4x4"),
        (["--compile-only", "v5e:5x5"], "'v5e:5x5' is not a slice: "),
        (["--compile-only", "v5p:2x2x2"], "the mesh has 4 devices and v5p:2x2x2 has 8: set"),
        (["--compile-only", "v5p:2x2x1", "--report", "/no/such/r.json"], "no folder /no/such"),
        (["--compile-only", "v5p:4x4"], "'v5p:4x4' has 2 axes and v5p 3: 4x4x4"),
        (["--compile-only", "v5p:2x2x1", "--slices", "0"], "--slices 0 must be at least 1"),
        (["--report", "r.json"], "--report r.json needs --compile-only"),
        (["--slices", "2"], "--slices 2 needs --compile-only"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(libtpu, config_file, capsys, arguments, message):
    assert train.main(["--config", str(config_file), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_report_that_cannot_be_written_is_refused_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_report, "compile_report", None)  # not called
    with pytest.raises(InputError, match=f"--report {tmp_path} is a folder: name a file in it"):
        compile_report.run(make_config(), "v5p:2x2x1", str(tmp_path), 1)

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(report_file.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"--report .*r.json cannot be written: Permission denied"):
        compile_report.run(make_config(), "v5p:2x2x1", str(tmp_path / "r.json"), 1)


def test_a_report_is_shown_though_it_cannot_be_written_and_the_old_one_stands(
    tmp_path, monkeypatch, capsys
):
    file = tmp_path / "r.json"
    file.write_text("old")
    monkeypatch.setattr(compile_report, "compile_report", lambda *_: {"fits": True})
    monkeypatch.setattr(compile_report, "table", lambda report: "shown")

    def full(*files):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(report_file.os, "replace", full)
        with pytest.raises(InputError, match=r"r.json cannot be written: No space left on device"):
            compile_report.run(make_config(), "v5p:2x2x1", str(file), 1)
    assert capsys.readouterr().out == "shown\n"
    assert file.read_text() == "old"
    assert compile_report.run(make_config(), "v5p:2x2x1", str(file), 1) == 0
    assert json.loads(file.read_text()) == {"fits": True}
    assert list(tmp_path.iterdir()) == [file]


def test_a_report_is_written_though_it_cannot_be_shown(config_file, tmp_path, monkeypatch, capsys):
    file = tmp_path / "r.json"
    monkeypatch.setattr(compile_report, "compile_report", lambda *_: {"fits": True})
    monkeypatch.setattr(compile_report, "table", lambda report: "shown")
    arguments = ["--config", str(config_file), "--compile-only", "v5p:2x2x1"]
    with open("/dev/full", "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert train.main([*arguments, "--report", str(file)]) == 1
    said = "error: standard output cannot be written: No space left on device\n"
    assert capsys.readouterr().err == said
    assert json.loads(file.read_text()) == {"fits": True}


def test_without_libtpu_the_message_says_what_to_install(config_file, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else find(name)
    )
    assert train.main(["--config", str(config_file), "--compile-only", "v5p:2x2x1"]) == 2
    error = capsys.readouterr().err
    assert "pip install -r requirements-tpu.txt" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("scan_layers", [False, True])
def test_microbatches_and_layers_are_counted_as_often_as_they_run(monkeypatch, scan_layers):
    def made(scale, collectives=None):
        costs = (prices.Cost(10.0 * part + 6.0 * scale, part, 1.0 + scale) for part in (1, 2, 3))
        return prices.Price(*costs, 0.5 + 0.25 * scale, collectives or {})

    of_layers = {
        1: made(0, {"all-reduce": {"count": 3, "bytes": 8.0}}),
        2: made(
            1,
            {
                "all-reduce": {"count": 4, "bytes": 10.0},
                "all-gather": {"count": 1, "bytes": 2.0},
            },
        ),
    }
    in_loop = {2: made(0.625), 3: made(0.75)}  # a layer outside of the loop 0.125 s; inside 0.5

    def price_of_layers(config, mesh, target, layers, looped=False):
        return (in_loop if looped else of_layers)[layers]

    monkeypatch.setattr(prices, "price_of_layers", price_of_layers)
    training = {"gradient_accumulation": 2, "batch_size": 8}
    model = {"num_hidden_layers": 5, "scan_layers": scan_layers}
    config = make_config(model=model, training=training)
    assert prices.price(config, None, None) == prices.Price(
        (68.0, 2.0, 10.0),
        (88.0, 4.0, 10.0),
        (108.0, 6.0, 10.0),
        3.0,
        {"all-gather": {"count": 8, "bytes": 16.0}, "all-reduce": {"count": 14, "bytes": 32.0}},
        2 * 5 * 0.5 if scan_layers else 0.0,
    )


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("required for HLO temporaries (110.5G) exceeds available HBM (95.74G).", 110.5 * 2**30),
        ("Ran out of memory. Used 2.50M of 1.0M hbm.", 2.5 * 2**20),
        ("Ran out of memory.", 0),
    ],
)
def test_the_compilers_figure_is_read(message, wanted):
    assert memory.needed_bytes(message) == wanted


def test_without_cudnn_the_message_says_what_to_do_and_other_mistakes_are_not_hidden():
    def fails(message):
        def compile():
            raise RuntimeError(message)

        return compile

    with pytest.raises(InputError, match=r"^cuDNN is not installed: pip install .*or use xla$"):
        memory.memory_of(fails("cuDNN not found."), {}, 1)
    with pytest.raises(RuntimeError, match=r"^a mistake of ours$"):
        memory.memory_of(fails("a mistake of ours"), {}, 1)


def test_what_the_compiler_refuses_is_one_line():
    def refused():
        raise jax.errors.JaxRuntimeError("INTERNAL: Ragged all-to-all is not supported\nat 0x12")

    with pytest.raises(InputError, match=r"refuses this program \(.*supported\): try [^\n]*$"):
        memory.memory_of(refused, {}, 1)
