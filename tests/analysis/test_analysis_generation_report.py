"""Reports of prefill and decode: of a tiny model on real compilations, and sums made by hand."""

import json

import jax
import pytest
import yaml
from tiny import MODEL, make_config

import generate
from mixtral_jax import sharding
from mixtral_jax.analysis import generation_report
from mixtral_jax.analysis.memory import bytes_of
from mixtral_jax.generation import command
from mixtral_jax.generation.request import Options, Request, Serving
from mixtral_jax.model.cache import places

TINY = ["--compile-only", "v5e:1x1", "--prompt-length", "9", "--max-new-tokens", "3"]


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    model = {**vars(MODEL), "num_hidden_layers": 1}
    path.write_text(yaml.safe_dump({"model": model, "data": {"source": "synthetic"}}))
    return path


@pytest.mark.tpu_compile
def test_prefill_and_decode_of_a_tiny_model(config_file, tmp_path, capsys, optimized):
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")
    file = tmp_path / "report.json"
    flags = ["--compile-only", "v5p:2x2x1", "--report", str(file), "--prompt-length", "12"]
    mesh = ["mesh.fsdp=2", "mesh.expert=2"]
    more = ["--sequences", "8", "--max-new-tokens", "3", "--weights", "int8"]
    assert generate.main(["--config", str(config_file), *flags, *more, *mesh]) == 0
    report, shown = json.loads(file.read_text()), capsys.readouterr().out
    prefill, decode = report["prefill"], report["decode"]
    for found in (prefill, decode):
        assert found["fits"] is True
        memory = found["bytes_per_device"]
        assert 0 < memory["arguments"] < memory["total"] < memory["limit"] == 95 * 2**30
        assert 0 < found["estimated_step_seconds"] < 1e-3
        assert found["collectives"]["ragged-all-to-all"]["count"] == 2  # there and back
    # Per token, a step of one is far dearer than a prompt of many.
    speed = decode["estimated_tokens_per_second_per_chip"]
    assert speed == pytest.approx(8 / 4 / decode["estimated_step_seconds"])
    assert prefill["estimated_tokens_per_second_per_chip"] > 3 * speed
    assert decode["limit_tokens_per_second_per_chip"] > speed
    assert "limit: tokens/s" in shown
    assert shown.count(" of the last part") == 1
    assert report["weights"] == "int8"


@pytest.mark.tpu_compile
def test_what_is_too_large_to_price_is_not_estimated(config_file, tmp_path, capsys, monkeypatch):
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")

    def price_of(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory on HBM")

    monkeypatch.setattr(generation_report, "price_of", price_of)
    file = tmp_path / "report.json"
    flags = ["--compile-only", "v5e:1x1", "--report", str(file), "--prompt-length", "12"]
    flags += ["--sequences", "1", "--max-new-tokens", "3"]
    assert generate.main(["--config", str(config_file), *flags]) == 0
    report, shown = json.loads(file.read_text()), capsys.readouterr().out
    for kind in ("prefill", "decode"):
        assert report[kind]["fits"] is True
        assert report[kind]["estimated_step_seconds"] is None
        assert "whole cache" in report[kind]["not_estimated"]
    assert shown.count("no estimates") == 2
    assert "limit: tokens/s" in shown


def read(config, batch) -> float:
    mesh = sharding.mesh_from_config(config.mesh)
    decode = generation_report.two_programs(config.model, mesh, batch, True)["decode"]
    cache = bytes_of(decode.arguments[1].cache)
    return generation_report.read_bytes(config, batch, decode) - cache


def test_bytes_that_a_step_of_decoding_reads():
    mesh = {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2}
    config = make_config(mesh=mesh, training={"batch_size": 8})
    # Four sequences visit two of four experts each: 1 - (1/2)^4 of them are read.
    experts = 2 * 4 * 3 * 24 * 20 * 15 / 16 / (2 * 2)
    attention, head = 2 * 24 * 6 * (4 + 2 + 2 + 4), 24 * 38
    whole = 2 * 24 * 4 + 5 * 24  # routers and norms
    wide = 4 * (experts + (attention + head) / 2 + whole)
    # In int8 every output channel has a scale in float32.
    scales = 2 * 4 * (2 * 20 + 24 * 2) * 15 / 16 / (2 * 2) + (2 * 6 * (4 + 2 + 2) + 38) / 2 + 2 * 24
    narrow = experts + (attention + head) / 2 + 4 * (whole + scales)
    batch = generation_report.Batch(8, 10, 3)
    assert read(config, batch) == wide
    assert read(config, batch._replace(weights="int8")) == narrow


def test_a_cache_in_int8(config_file):
    model = generation_report.read_config(str(config_file), []).model
    mesh = sharding.make_mesh()

    def cache(**narrow):
        batch = generation_report.Batch(2, 10, 3, **narrow)
        decode = generation_report.two_programs(model, mesh, batch, True)["decode"]
        return bytes_of(decode.arguments[1].cache)

    assert cache(cache_dtype="int8") / cache() == (6 + 4) / (6 * 4)  # values and a scale


def test_the_grouped_product_of_training_is_passed_over(config_file):
    trained = config_file.with_name("trained.yaml")
    trained.write_text(
        config_file.read_text().replace("grouped_matmul: ''", "grouped_matmul: hopper")
    )
    assert "hopper" in trained.read_text()
    for overrides, expected in (([], ""), (["model.grouped_matmul=blocks"], "blocks")):
        config = generation_report.read_config(str(trained), overrides)
        assert config.model.grouped_matmul == expected


def test_the_cache_is_as_large_as_the_command_makes_it(config_file):
    request = Request(tuple(range(9000)), Options(max_new_tokens=300))
    serving = command.sized(Serving(), [request])
    longer = ["model.max_position_embeddings=32768"]
    model = generation_report.read_config(str(config_file), longer).model
    batch = generation_report.Batch(1, 9000, 300)
    decode = generation_report.two_programs(model, sharding.make_mesh(), batch, True)["decode"]
    assert places(serving.context) == jax.tree.leaves(decode.arguments[1].cache)[0].shape[-2]


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--compile-only", "v9:2x2"], "'v9:2x2' must look like v5p:4x4x4"),
        (["--compile-only", "v5p:2x2x1"], "the mesh has 1 devices and v5p:2x2x1 has 4"),
        (["--compile-only", "v5e:1x1", "--sequences", "0"], "--sequences 0 must be at least 1"),
        (["--compile-only", "v5e:1x1", "--prompt-length", "99"], "--prompt-length 99 and"),
        (
            ["--compile-only", "v5e:2x2", "mesh.fsdp=4", "--sequences", "3"],
            "--sequences 3 do not split over mesh.data * mesh.fsdp * mesh.expert = 4",
        ),
        (
            [*TINY, "model.grouped_matmul=hopper"],
            "model.grouped_matmul=hopper does not run on tpu",
        ),
        (
            [*TINY, "model.attention=xla"],
            "model.attention=xla does not matter",
        ),
        ([*TINY, "model.grouped_matmul=blocks"], "model.grouped_matmul=blocks is a loop"),
        ([], "--compile-only SLICE and --config FILE belong together"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(config_file, capsys, flags, message):
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")
    assert generate.main(["--config", str(config_file), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "option",
    ["--report r.json", "--slices 2", "--sequences 3", "--prompt-length 9"],
)
def test_a_report_wants_a_slice(capsys, option):
    assert generate.main(["--checkpoint", "x", "--prompt", "a", *option.split()]) == 2
    assert f"{option} needs --compile-only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--weights int8 --temperature -3", "leave out --temperature -3.0"),
        ("--weights int4", "weights='int4' must be int8, or left out"),
        ("--cache-dtype int4", "cache_dtype='int4' must be int8, or left out"),
        ("--chat --stop a --stop b --prompt x", "leave out --chat, --prompt x, --stop a b"),
        ("--part 10", "part=10 must be a power of two, 16 or more"),
    ],
)
def test_what_a_report_does_not_read_is_refused(capsys, flags, message):
    """Before the config is read, and JAX loaded."""
    assert generate.main(["--config", "x", "--compile-only", "v5e:1x1", *flags.split()]) == 2
    assert capsys.readouterr().err.endswith(f"{message}\n")
