"""Each benchmark runs on tiny sizes and prints lines that the tables are made of."""

import importlib.util
import json
import pathlib
import sys
import types

import jax
import pytest

from mixtral_jax import sharding
from mixtral_jax.config import InputError

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
ABOUT = {"benchmark", "machine", "versions", "date"}


def loaded(name):
    """A benchmark's module; the folder must be where modules are looked for."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a benchmark's main in this process, whose devices have started; gives its lines."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sharding, "start", lambda mesh: None)
    import measure

    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(measure, "READ_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(measure, "PRODUCT_SIZE", {"cpu": 64})

    def run(name, *arguments):
        loaded(name).main(list(arguments))
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert lines
        for line in lines:
            assert line.keys() >= ABOUT
            assert line.get("seconds", 1) > 0
            if "limit_seconds" in line:
                share = line["limit_seconds"] / line["seconds"]
                assert line["of_limit"] == pytest.approx(share, rel=2e-3)
        return lines

    return run


def test_grouped_matmul(command):
    sizes = ("--rows", "21", "--width", "5", "--hidden", "7", "--experts", "3")
    lines = command("grouped_matmul", *sizes, "--turns", "2")
    found = {(line["body"], line["pass"]) for line in lines}
    passes = ("forward", "gradients")
    assert found == {(b, p) for b in ("ragged_dot", "blocks") for p in passes}
    for line in lines:
        work = 2 * 21 * 5 * 7 * (3 if line["pass"] == "gradients" else 1)
        expected = work / line["seconds"] / 1e9
        assert line["gigaflops_per_second"] == pytest.approx(expected, rel=2e-3)


def test_exchange_sends_what_the_law_says(command):
    sizes = ("--tokens", "6", "10", "--experts", "8", "--per-token", "3", "--width", "4")
    lines = command("exchange", *sizes, "--shards", "1", "4", "--turns", "2")
    assert [(line["body"], line["tokens"], line["shards"]) for line in lines] == [
        ("local", 6, 1),
        ("padded", 6, 4),
        ("local", 10, 1),
        ("padded", 10, 4),
    ]
    for line in lines:
        rows = {"local": 0, "padded": 2 * 3 * line["tokens"] * 2}[line["body"]]
        assert line["sent_bytes"] == line["expected_bytes"] == rows * 4 * 4


def test_the_law_of_the_ragged_exchange(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from exchange import expected_rows

    assert expected_rows("ragged", 10, 64, 2, 5) == 2 * 10 * 2 * 4 / 5
    assert expected_rows("ragged", 10, 64, 2, 1) == 0


TINY = """
model:
  {vocab_size: 64, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, head_dim: 4,
   num_attention_heads: 2, num_key_value_heads: 1, num_local_experts: 4, num_experts_per_tok: 2,
   max_position_embeddings: 64}
training: {batch_size: 2, sequence_length: 8}
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return str(path)


def test_train(command, tiny):
    step, scopes, *operations = command(
        "train", "--config", tiny, "--steps", "2", "--operations", "2", "mesh.expert=2"
    )
    assert step["benchmark"] == "train"
    assert step["devices"] == 2
    assert step["tokens_per_second"] == pytest.approx(2 * 8 / step["seconds"], rel=2e-3)
    assert {"initialise_seconds", "compile_seconds", "peak_bytes", "of_limit"} <= step.keys()
    shares = {key: share for key, share in scopes.items() if key.startswith("of_time_")}
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert shares["of_time_attention"] > 0
    assert len(operations) == 2


def test_decode(command, tiny):
    lines = command(
        *("decode", "--config", tiny, "--batch", "1", "3", "--weights", "config", "int8"),
        *("--prompt", "5", "--new", "4", "--turns", "2"),
    )
    assert [line["batch"] for line in lines] == [1, 1, 3, 3]
    assert [line["weights"] for line in lines] == ["float32", "int8"] * 2
    for line in lines:
        assert line["tokens_per_second"] == pytest.approx(line["batch"] / line["seconds"], rel=2e-3)
        # All but the embedding and the experts: attention 16 (2 + 1 + 1) 4 + 2 4 16 = 384, router
        # 64, norms 48, head 1024; an expert 1152; a row of the embedding 16; the cache 8 a token.
        used = 4 * (1 - 0.5 ** line["batch"])
        weights, cache = 384 + 64 + 48 + 1024 + used * 1152 + line["batch"] * 16, 8 * (5 + 2)
        each = 1 if line["weights"] == "int8" else 4
        assert line["read_bytes"] == each * weights + 4 * line["batch"] * cache


def test_long_prompt(command, tiny):
    """Parts of 16 of a prompt of 40: the other rows make a token after each."""
    sizes = ("--prompt", "40", "--part", "16", "--others", "2")
    (line,) = command("long_prompt", "--config", tiny, *sizes)
    assert line["scores_bytes"] == 4 * 2 * 40**2
    assert line["cache_bytes"] == 3 * 8 * 4 * 64  # 41 places and 16 more, rounded up
    assert 0 < line["median_gap_seconds"] <= line["longest_gap_seconds"] < line["seconds"]
    assert 0 < line["median_gap_alone_seconds"] <= line["longest_gap_alone_seconds"]


def test_serve(command, tiny):
    """Each gives the same answers, and is compared with one row that has the same prompts."""
    lines = command(
        *("serve", "--config", tiny, "--requests", "3", "--rows", "1", "--prefix", "20"),
        *("--part", "16", "--turns", "2", "model.max_position_embeddings=256", "mesh.data=2"),
    )
    found = {line["name"]: line for line in lines}
    alone = ["one after another", "one after another, shared prefix"]
    computed = f"{alone[1]} computed each time"
    names = ["all at once", alone[0], "all at once, shared prefix", alone[1], computed]
    assert list(found) == names
    assert [found[name]["rows"] for name in names] == [2, 1, 2, 1, 1]  # one for each device
    assert [found[name]["times_one_after_another"] for name in alone] == [1, 1]
    tokens = {line["tokens"] for line in lines}
    assert len(tokens) == 1
    for line in lines:
        assert 3 * 16 <= line["tokens"] <= 3 * 128
        expected = line["tokens"] / line["seconds"]
        assert line["tokens_per_second"] == pytest.approx(expected, rel=2e-3)
        assert line["times_one_after_another"] > 0
        assert (line["requests"], line["turns"]) == (3, 2)


def test_peers(command, tiny):
    """Ours and the limit: processes of their own that take turns."""
    names = ["mixtral_jax bfloat16", "dense products"]
    ours, limit = command("peers", "train", "--config", tiny, "--steps", "2", "--only", *names)
    assert [ours["name"], limit["name"]] == names
    assert ours["of_limit"] == pytest.approx(limit["seconds"] / ours["seconds"], rel=1e-3)
    assert limit["of_limit"] == ours["times_of_first"] == 1
    for line in (ours, limit):
        assert line["turns"] == 2
        assert line["peak_bytes"] > 0


@pytest.mark.slow
def test_scaling_of_steps(command, tiny):
    lines = command("scaling", "steps", "--config", tiny, "--devices", "2", "--turns", "1")
    assert [line["devices"] for line in lines] == [2]
    assert lines[0]["of_limit"] == 1


def test_scaling_of_bytes(command):
    """On emulated devices the compiled program sends what the law of padded buckets says."""
    lines = command(
        *("scaling", "bytes", "--devices", "2", "--tokens", "6", "10", "--experts", "4"),
        *("--per-token", "3", "--width", "16", "--hidden", "8"),
    )
    for line, tokens in zip(lines, (6, 10), strict=True):
        assert line["body"] == "padded"
        assert line["exchanged_bytes"] == line["law_bytes"] == 4 * tokens * 2 * 16 * 4
        assert line["rows_in_use_bytes"] == 4 * tokens * 3 / 2 * 16 * 4


@pytest.mark.tpu_compile
def test_fit_says_of_a_model_that_does_not_fit_what_it_needs(command, monkeypatch):
    pytest.importorskip("libtpu", reason="libtpu is not installed: nothing compiles for TPU here")
    from mixtral_jax.analysis import generation_report

    def refuse(*arguments):
        message = "RESOURCE_EXHAUSTED: HLO temporaries (30.50G) exceeds available HBM (15.75G)."
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(generation_report.Program, "compile", refuse)  # it takes a minute
    (line,) = command("fit", "--topology", "v5e:2x2", "mesh.expert=4")
    assert line["fits"] is False
    assert line["exchange"] == "padded"  # v5e has no ragged one
    assert line["prefill_gib"] == line["decode_gib"] == 30.5
    # All is split: were what is outside the experts whole on each device, less would fit still.
    assert line["weights_gib"] == pytest.approx(2 * 46_702_792_704 / 4 / 2**30, abs=0.01)


@pytest.mark.slow
def test_load(command, tmp_path):
    lines = command("load", "--gigabytes", "0.001", "--repeats", "1", "--folder", str(tmp_path))
    assert [line["task"] for line in lines] == ["read", "load", "convert"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("load", ["--gigabytes", "-1"], ["--gigabytes -1", "above 0"]),
        ("load", ["--folder", "/no/such"], ["--folder /no/such"]),
        ("train", ["--config", "no.yaml"], ["no.yaml"]),
        ("decode", ["--new", "1"], ["--new 1"]),
        ("long_prompt", ["--prompt", "100"], ["--prompt 100", "--part 256"]),
        ("serve", ["--prefix", "1000"], ["longest request", "context of 1024"]),
        ("peers", ["train", "--only", "me"], ["--only 'me'", "mixtral_jax"]),
        ("peers", ["sleep"], ["sleep", "train"]),
        ("scaling", ["steps", "--devices", "3"], ["expert=3"]),
        ("scaling", ["bytes", "--devices", "3"], ["--experts 8", "3 devices"]),
        ("scaling", ["bytes", "--topology", "v9"], ["'v9'"]),
        ("exchange", ["--shards", "3"], ["--shards 3", "--experts 8"]),
        ("exchange", ["--per-token", "9"], ["--per-token 9", "--experts 8"]),
        ("exchange", ["--tokens", "0"], ["--tokens", "'0'", "above 0"]),
        ("grouped_matmul", ["--only", "magic"], ["--only 'magic'", "blocks"]),
        ("grouped_matmul", ["--dtype", "int8"], ["--dtype", "int8", "float32"]),
    ],
)
def test_bad_flags_are_one_line(command, name, arguments, words):
    with pytest.raises(InputError, match=r"^.+$") as error:
        command(name, *arguments)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_a_mistake_ends_the_process_with_one_line(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import measure

    def main():
        raise InputError("--shards 3 is wrong")

    with pytest.raises(SystemExit) as ended:
        measure.run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --shards 3 is wrong\n"


def test_a_median_of_turns(monkeypatch):
    """Each is warmed up once, timed once for its repeats, and then all take turns."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import measure

    monkeypatch.setattr(measure, "LEAST_SECONDS", 0.0)
    called, clock = [], iter(range(10**6))
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    works = {name: lambda name=name: called.append(name) for name in ("a", "b")}
    assert measure.take_turns(works, 3) == {"a": 1, "b": 1}
    assert called == ["a", "a", "b", "b", *["a", "b"] * 3]


def test_of_two_steps_the_second_is_timed(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import turns

    clock, steps = [0.0], iter([7.0, 2.0])

    def step():
        clock[0] += next(steps)

    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock[0])
    assert turns.second_of_two(step)() == 2


def test_flags_for_xla_are_a_part_of_the_line(monkeypatch, capsys):
    """Otherwise runs with and without them look the same."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import measure

    measure.show("x", {"seconds": 1.0})
    monkeypatch.setattr(measure, "XLA_FLAGS", "--xla_a=b")
    measure.show("x", {"seconds": 1.0})
    plain, flagged = map(json.loads, capsys.readouterr().out.splitlines())
    assert flagged == {**plain, "xla_flags": "--xla_a=b"}


# ---- tables ------------------------------------------------------------------------------------


def table_of(monkeypatch, text):
    monkeypatch.syspath_prepend(str(FOLDER))
    import table

    return table.tables(table.read(text.splitlines()))


def test_a_table(monkeypatch):
    about = {"machine": "2 cores", "versions": "jax 1", "date": "2026-11-25"}
    lines = [
        {"benchmark": "x", "body": "a", "rows": 7, "seconds": 0.0125, "of_limit": 0.5, **about},
        {
            "benchmark": "x",
            "body": "b",
            "rows": 7,
            "seconds": 2.5,
            "sent_bytes": 3_000_000,
            **about,
        },
        {"benchmark": "y", "parameters": 123456, **about},
    ]
    actual = table_of(monkeypatch, "\n".join(map(json.dumps, lines)))
    assert actual == (
        "**x**: 2 cores; jax 1; 2026-11-25\n"
        "rows 7\n\n"
        "| body | time | of limit | sent bytes |\n"
        "| --- | --- | --- | --- |\n"
        "| a | 12.5 ms | 50.0% |  |\n"
        "| b | 2.5 s |  | 3 MB |\n\n"
        "**y**: 2 cores; jax 1; 2026-11-25\n\n"
        "| parameters |\n"
        "| --- |\n"
        "| 123,456 |"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["no lines"]),
        ('{"benchmark": "x"}', ["line 1"]),
        ("hello\n", ["line 1", "hello"]),
        ("[1]", ["line 1"]),
    ],
)
def test_what_is_no_line_of_a_benchmark_is_named(monkeypatch, text, words):
    with pytest.raises(InputError) as error:
        table_of(monkeypatch, text)
    assert all(word in str(error.value) for word in words)


def test_a_gpus_kernels_are_their_instructions_or_nobodys(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    train = loaded("train")
    kernels = {"loop_add.2": "loop_add.2", "loop_add_2": "loop_add.2", "dot.1": "dot.1"}

    def kernel(name, hlo_op):
        event = types.SimpleNamespace(name=name, stats=[("grid", 1), ("hlo_op", hlo_op)])
        return train.kernel_of(event, kernels)

    assert kernel("nvjet_sm90", "dot.1") == "dot.1"
    assert kernel("loop_add_2", "command_buffer_1") == "loop_add.2"
    assert kernel("nvjet_sm90", "command_buffer_1") == "nvjet_sm90"
    assert train.scope_of(train.UNATTRIBUTED) == "unattributed"
    assert train.scope_of("jit(step)/moe/experts/mul") == "experts"


def test_importing_measure_starts_no_jax():
    """Commands say what is wrong with their flags before they load JAX."""
    import subprocess

    code = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import measure, table"
    code += "; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER).returncode == 0


def test_the_parts_of_a_start_are_read_from_the_commands_own_line(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import startup

    from mixtral_jax.command_line import StartUp

    start_up = StartUp()
    start_up.end("checkpoint and devices")
    start_up.end("prefill")
    parts = startup.parts_of(f"text\n{start_up.report('token')}\nmore")
    names = ("seconds", "loading_the_program", "checkpoint_and_devices", "prefill")
    assert list(parts) == [names[0], *(f"{name}_seconds" for name in names[1:])]
    assert sum(parts.values()) == pytest.approx(2 * parts["seconds"], abs=0.3)
    with pytest.raises(ValueError, match="does not say"):
        startup.parts_of("nothing")
