"""generate.py on a small checkpoint: what it prints, and what it refuses."""

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from processes import on_two_hosts
from tiny import MODEL

import generate
from mixtral_jax import hosts, sharding
from mixtral_jax.config import MeshConfig
from mixtral_jax.generation import command, prompts
from mixtral_jax.generation import engine as engines
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.prompts import Asked
from mixtral_jax.generation.request import Deployment, Options, Request, Serving
from mixtral_jax.interop.own import find
from mixtral_jax.interop.own_arrays import load_model

ROOT = pathlib.Path(generate.__file__).parent
PROMPTS = ["def first", "", "x\x00\x1b[31m é\u20ac", " words in the"]
GREEDY = ["--temperature", "0", "--max-new-tokens", "9"]
ANSWERING = Options(9, temperature=0.0)


@pytest.fixture(scope="module")
def answers(run, tokenizer):
    """What greedy sampling gives for PROMPTS: whole texts decoded, without the prompts."""
    config = dataclasses.replace(MODEL, vocab_size=300)
    mesh = sharding.make_mesh()
    engine = Engine(load_model(find(run), config, mesh), tokenizer)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    requests = [Request((tokenizer.bos_id, *ids), ANSWERING) for ids in prompts]
    made = [answer.tokens for (answer,) in engine.generate(requests)]
    assert all(len(answer) == 9 for answer in made)
    whole = [tokenizer.decode(ids + answer) for ids, answer in zip(prompts, made, strict=True)]
    return [text[len(prompt) :] for text, prompt in zip(whole, PROMPTS, strict=True)]


def script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "generate.py", *arguments],
        capture_output=True,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


def test_the_script_prints_the_answer_alone(run, answers):
    """As a process of its own, on emulated devices, to a terminal that knows ASCII alone."""
    arguments = ["--checkpoint", run, "mesh.expert=2", "--prompt", PROMPTS[0], *GREEDY]
    done = script(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == answers[0].encode("ascii", "replace").decode() + "\n"
    said = done.stderr.decode()
    assert "on 2 x cpu" in said
    assert re.search(
        r"^\d+ prompt tokens; first token after [\d.]+ s, with compiling; 9 ", said, re.M
    )
    assert "tokens/s" in said
    assert re.search(r"^first token [\d.]+ s after the start: .*, prefill [\d.]+ s$", said, re.M)


@pytest.mark.slow
def test_two_hosts_answer_as_one(run, answers, tmp_path, unused_port):
    """2 processes x 2 devices, and more requests than rows: the first says it all."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    arguments = ["--checkpoint", run, *GREEDY, "--prompt-file", path, "--rows", "2"]
    mesh = ["mesh.data=2", "mesh.expert=2", "--format", "jsonl"]
    command = [sys.executable, "generate.py", *map(str, arguments), *mesh]
    (first, said), (second, _) = on_two_hosts(command, unused_port, subprocess.PIPE)
    assert lines_of(second) == []
    assert [json.loads(line)["text"] for line in lines_of(first)] == answers
    assert "on 4 x cpu" in said


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'temperature": "0.0"',
            'temperature": "1.0"',
            "temperature .0.0 on host 0, 1.0 on host 1.",
        ),
        ('prompts": "', 'prompts": "0', r"the prompts \(\w{12} on host 0, 0\w{12} on host 1\)"),
        ('rows": "None"', 'rows": "2"', "rows .None on host 0, 2 on host 1."),
        ("checkpoints/4, ", "checkpoints/3, ", "the checkpoint .*checkpoints/3, .* on host 1"),
    ],
    ids=["option", "prompt", "serving", "checkpoint"],
)
def test_hosts_that_are_asked_different_things_do_not_answer(
    run, refused, monkeypatch, old, new, said
):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "gather", lambda text: [text, text.replace(old, new)])
    refused(["--checkpoint", str(run), "--prompt", "a", "mesh.data=8", *GREEDY], said)


def lines_of(out):
    """Of JSON: Gloo, which connects the hosts' CPUs, speaks on standard output as well."""
    return [line for line in out.splitlines() if line.startswith("{")]


def test_the_script_reports_a_mistake_in_one_line(tmp_path):
    done = script("--checkpoint", tmp_path / "none", "--prompt", b"\xff")
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.decode().splitlines()[-1].startswith("error: checkpoint folder ")
    assert b"Traceback" not in done.stderr


def test_a_file_of_prompts_gives_each_answer_under_its_prompt(run, answers, main, capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    arguments = ["--checkpoint", str(run / "checkpoints" / "4"), "--prompt-file", str(path)]
    assert main([*arguments, *GREEDY, "mesh.expert=4", "model.exchange=padded"]) == 0
    expected = [f"> {prompt}\n{answer}\n\n" for prompt, answer in zip(PROMPTS, answers)]
    assert capsys.readouterr().out == "".join(expected)


def test_lines_of_json_are_answered_each_as_it_asks(run, answers, main, capsys, tmp_path):
    path = tmp_path / "requests.jsonl"
    lines = [
        json.dumps({"prompt": PROMPTS[0]}),
        '{"prompt": "a", "temprature": 1}',
        json.dumps({"id": "b", "prompt": PROMPTS[3], "n": 2, "echo": True, "logprobs": 1}),
        json.dumps({"prompt": "#" * 60}),
        json.dumps({"messages": [{"role": "user", "content": "words"}], "max_new_tokens": 2}),
        json.dumps({"prompt": PROMPTS[0], "stop": answers[0][3:5]}),
    ]
    path.write_text("\n".join(lines))
    arguments = ["--checkpoint", str(run), *GREEDY, "--prompt-file", str(path)]
    assert main([*arguments, "--format", "jsonl"]) == 1
    out, err = capsys.readouterr()
    made = [json.loads(line) for line in out.splitlines()]
    assert [one["id"] for one in made] == [1, 2, "b", "b", 4, 5, 6]
    assert made[0]["text"] == answers[0]
    assert made[0]["finish_reason"] == "length"
    assert "line 2: 'temprature' is no key of a request" in made[1]["error"]
    assert [one["text"] for one in made[2:4]] == [PROMPTS[3] + answers[3]] * 2  # greedy
    assert [len(one["logprobs"]) for one in made[2:4]] == [9, 9]
    assert made[4]["error"].startswith(f"{path} line 4 has 62 tokens")
    assert [made[i]["prompt_tokens"] for i in (1, 4)] == [0, 62]
    assert len(made[5]["tokens"]) == 2
    assert made[6]["text"] == answers[0].split(answers[0][3:5])[0]
    assert made[6]["stop"] == answers[0][3:5]
    mistakes = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(mistakes) == 2
    assert mistakes[0] == f"error: {made[1]['error']}"


def test_nothing_is_loaded_where_no_line_can_be_answered(run, main, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"nothing\n[]\n")))
    arguments = ["--checkpoint", str(run), "--prompt-file", "-", "--jsonl", *GREEDY]
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert not out
    assert [line[:30] for line in err.splitlines()] == [
        "error: standard input line 1: ",
        "error: standard input line 2: ",
    ]


def test_answers_that_memory_does_not_hold_wait_and_it_is_said(run, main, capsys, monkeypatch):
    monkeypatch.setattr(engines, "rows_that_fit", lambda size, mesh: 1)
    assert main(["--checkpoint", str(run), "--prompt", "a", "--n", "3", *GREEDY]) == 0
    out, err = capsys.readouterr()
    assert out.count("> a (") == 3
    wanted = "answers in progress: 1, as memory does not hold the cache of 4; the others wait"
    assert wanted in err


def test_standard_input_has_a_prompt_a_line(run, answers, main, capsys, monkeypatch):
    text = f"{PROMPTS[0]}\n{PROMPTS[3]}\n".encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert main(["--checkpoint", str(run), "--prompt-file", "-", *GREEDY]) == 0
    expected = f"> {PROMPTS[0]}\n{answers[0]}\n\n> {PROMPTS[3]}\n{answers[3]}\n\n"
    assert capsys.readouterr().out == expected


def test_int8_weights_and_cache_change_a_texts_perplexity_a_little(run, main, capsys):
    found = []
    for more in ([], ["--weights", "int8"], ["--cache-dtype", "int8"]):
        assert main(["--checkpoint", str(run), "--score", "--prompt", PROMPTS[0], *more]) == 0
        out, err = capsys.readouterr()
        found.append(float(out.split()[1]))
        assert ("parameters in int8 on" in err) == ("--weights" in more)
    assert found[1:] == pytest.approx([found[0]] * 2, rel=0.02)
    assert len(set(found)) == 3


def test_a_text_is_scored(run, main, capsys):
    assert main(["--checkpoint", str(run), "--score", "--prompt", PROMPTS[0]]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"perplexity \d+\.\d{4} over \d+ tokens of the prompt\n", out)
    assert re.search(r"^\d+ prompt tokens; first answer after .*; 0 tokens made$", err, re.M)
    assert re.search(r"^first answer [\d.]+ s after the start: ", err, re.M)


def test_no_line_makes_anything_where_texts_are_scored(run, main, capsys, monkeypatch):
    lines = b'{"prompt": "def", "max_new_tokens": 5, "min_new_tokens": 2, "n": 3}\n'
    tools = (
        b'{"messages": [{"role": "user", "content": "a"}], "tools": [{"function": {"name": "b"}}]}'
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines + tools)))
    arguments = ["--checkpoint", str(run), "--score", "--prompt-file", "-", "--jsonl"]
    assert main([*arguments, "--format", "jsonl"]) == 1
    scored, refused = map(json.loads, capsys.readouterr().out.splitlines())
    assert (scored["tokens"], scored["index"]) == ([], 0)
    assert scored["perplexity"] > 1
    assert "a v1 tokenizer has no template for tools" in refused["error"]


def test_routing_is_shown_in_colours(run, answers, main, capsys):
    """The text is what it is without them, and every token has a colour of the legend."""
    arguments = ["--checkpoint", str(run), "--prompt", PROMPTS[0], *GREEDY]
    assert main([*arguments, "--show-routing", "1"]) == 0
    out, err = capsys.readouterr()
    assert re.sub(r"\x1b\[[\d;]*m", "", out) == PROMPTS[0] + answers[0] + "\n"
    colours = set(re.findall(r"48;5;(\d+)m", out))
    legend = next(line for line in err.splitlines() if line.startswith("experts of layer 1:"))
    assert colours <= set(re.findall(r"48;5;(\d+)m", legend))
    assert len(colours) > 1


@pytest.mark.parametrize("more", [[], ["--chat"]], ids=str)
def test_what_a_stop_text_hides_is_not_shown_in_colours(run, main, capsys, more):
    arguments = ["--checkpoint", str(run), "--prompt", PROMPTS[0], *GREEDY, *more]
    assert main(arguments) == 0
    whole = capsys.readouterr().out
    stop = whole[3:5]
    assert main([*arguments, "--stop", stop, "--show-routing", "1"]) == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).removesuffix("\n")
    assert shown.endswith(whole.split(stop)[0])
    assert stop not in shown.removeprefix(PROMPTS[0])


def test_the_documented_program_runs(run, monkeypatch, capsys):
    """The examples of docs/generation.md, on another checkpoint."""
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", text, re.S)
    first, names = first.replace('"runs/quickstart"', repr(str(run))), {}
    exec(compile(first, "docs/generation.md", "exec"), names)
    assert capsys.readouterr().out.endswith("']\n")
    exec(compile(second, "docs/generation.md", "exec"), names)
    assert capsys.readouterr().out


def test_documented_options_exist():
    text = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")
    known = generate.make_parser().format_help()
    told = set(re.findall(r"--[a-z][a-z0-9-]+", text))
    assert len(told) > 20
    assert not [name for name in told if name not in known]
    assert not [key for key in prompts.KEYS if f"`{key}`" not in text]


def test_arguments_reach_the_command(monkeypatch):
    got = []
    monkeypatch.setattr(command, "run", lambda *arguments: got.append(arguments) or 0)
    given = ["--temperature", "0.5", "--top-k", "4", "--top-p", ".25", "--seed", "6", "--n", "2"]
    given += ["--min-p", ".1", "--repetition-penalty", "1.5", "--presence-penalty", "0.5"]
    given += ["--frequency-penalty", "-1", "--logit-bias", "3=-2.5", "--logit-bias", "4=1"]
    given += ["--stop", "a", "--stop", "b", "--stop-token-id", "7", "--min-new-tokens", "1"]
    given += ["--format", "jsonl", "--logprobs", "2", "--prompt-logprobs", "0", "--echo"]
    given += ["--rows", "3", "--context", "99", "--part", "32", "--cache-dtype", "int8"]
    given += ["--weights", "int8"]
    given += ["mesh.fsdp=2", "--max-new-tokens", "3", "--checkpoint", "here", "--prompt", ""]
    assert generate.main(given) == 0
    assert generate.main(["--checkpoint", "here", "--prompt=-x"]) == 0
    options = Options(
        *(3, 1, 0.5, 4, 0.25, 0.1, 1.5, 0.5, -1.0, ((3, -2.5), (4, 1.0)), ("a", "b"), (7,), 2, 6),
        *(2, 0, True),
    )
    asked = [Asked("prompt 1", "", None, options, None, 1)]
    serving = Serving(3, 99, 32, "int8", "int8")
    style = command.Style(jsonl=True)
    assert got[0] == ("here", asked, style, Deployment(MeshConfig(fsdp=2)), serving)
    asked = [Asked("prompt 1", "-x", None, Options(), None, 1)]
    assert got[1] == ("here", asked, command.Style(), Deployment(), Serving())


def test_sampling_forgets_how_training_was_placed():
    training = {"exchange": "local", "capacity_factor": 1.0, "remat": "full"}
    trained = dataclasses.replace(MODEL, **training, grouped_matmul="megablox", attention="xla")
    config = command.model_config(trained, Deployment(MeshConfig(expert=4)))
    assert config == MODEL
    config = command.model_config(trained, Deployment(exchange="padded", compute_dtype="bfloat16"))
    assert (config.exchange, config.compute_dtype) == ("padded", "bfloat16")
    assert (
        command.model_config(trained, Deployment(grouped_matmul="blocks")).grouped_matmul
        == "blocks"
    )


BAD = {
    "no prompt": ([], "one of the arguments --prompt --prompt-file is required"),
    "two": (["--prompt", "a", "--prompt-file", "b"], "not allowed with argument"),
    "option": (["--prompt", "a", "--top-p", "1.5"], "top_p=1.5 must be above 0 and at most 1"),
    "word": (["--prompt", "a", "--top-k", "two"], "argument --top-k: invalid int value: 'two'"),
    "flag": (["--prompt", "a", "--topp", "1"], "unrecognized arguments: --topp"),
    "override": (["--prompt", "a", "training.steps=1"], "training.steps cannot be set"),
    "file": (["--prompt-file", "/none.txt"], "prompt file /none.txt cannot be read"),
    "text": (["--prompt", "a\udcff", *GREEDY], "text is not Unicode at character 1"),
    "long": (["--prompt", "#" * 60, *GREEDY], "has 62 tokens, BOS included, .* context of 64"),
    "devices": (["--prompt", "a", *GREEDY, "mesh.data=16"], "needs 16 devices, .* has 8"),
    "size": (["--prompt", "a", *GREEDY, "mesh.expert=3"], "mesh.expert=3 does not divide"),
    "exchange": (["--prompt", "a", *GREEDY, "model.exchange=ragged"], "ragged does not run on cpu"),
    "kernel": (["--prompt", "a", *GREEDY, "model.grouped_matmul=blocks"], "not matter on cpu"),
    "bias": (["--prompt", "a", "--logit-bias", "3"], "--logit-bias 3 must look like ID=VALUE"),
    "biased": (["--prompt", "a", "--logit-bias", "999=1", *GREEDY], "999 is not in 0..299"),
    "part": (["--prompt", "a", "--part", "100"], "part=100 must be a power of two"),
    "cache": (["--prompt", "a", "--cache-dtype", "int4"], "cache_dtype='int4' must be int8"),
    "weights": (["--prompt", "a", "--weights", "int4"], "weights='int4' must be int8"),
    "context": (["--prompt", "a", "--context", "8", *GREEDY], "context of 8"),
    "beyond": (["--prompt", "a", "--context", "65", *GREEDY], "context=65 .* model's, which is 64"),
    "negative": (["--prompt", "a", "--temperature", "-1"], "temperature=-1.0 must lie in 0..1e6"),
    "told": (["--prompt", "a", "--logprobs", "1"], "add --format jsonl"),
    "layer": (["--prompt", "a", "--show-routing", "2", *GREEDY], "--show-routing 2 is not in 0..1"),
    "coloured": (["--prompt", "a", "--format", "jsonl", "--show-routing", "0"], "leave out --form"),
    "scored": (
        *(["--prompt", "a", "--score", "--max-new-tokens", "50", "--n", "2", "--stop", "b"],),
        "--score makes nothing: leave out --max-new-tokens 50, --n 2, --stop b",
    ),
    "silent": (["--chat", "--score"], "a conversation is text"),
    "likely": (["--chat", "--logprobs", "1"], "a conversation is text"),
    "lines": (["--prompt", "a", "--jsonl"], "has lines of JSON: add --prompt-file FILE"),
    "echo": (["--chat", "--echo"], "--echo: a conversation shows what is asked already"),
    "several": (["--chat", "--n", "2"], "n=2: a conversation has one answer to each message"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, run, refused):
    arguments, said = BAD[case]
    refused(["--checkpoint", str(run), *arguments], said)


def test_bad_checkpoints_are_one_line_and_exit_code_2(run, refused, tmp_path):
    prompt = ["--prompt", "a", *GREEDY]
    refused(["--checkpoint", str(tmp_path), *prompt], "holds no checkpoint")
    refused(["--checkpoint", str(ROOT), *prompt], "holds no checkpoint")
    untold = run / "checkpoints" / "3"
    refused(["--checkpoint", str(untold), *prompt], "has no tokenizer")
    (tmp_path / "7" / "run").mkdir(parents=True)
    refused(["--checkpoint", str(tmp_path), *prompt], "checkpoint .*7 is damaged")
