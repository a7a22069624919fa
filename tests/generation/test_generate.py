"""generate.py on a small checkpoint: what it prints, and what it refuses."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest
from tiny import MODEL

import generate
from mixtral_jax import sharding
from mixtral_jax.config import MeshConfig
from mixtral_jax.generation import command
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.request import Deployment, Options, Request
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
    engine = Engine(load_model(find(run), config, mesh), mesh, tokenizer.eos_id)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    requests = [Request((tokenizer.bos_id, *ids), ANSWERING) for ids in prompts]
    made = engine.generate(requests)
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
    assert "tokens/s" in said
    assert re.search(r"^first token [\d.]+ s after the start: .*, prefill [\d.]+ s$", said, re.M)


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


def test_tokens_are_printed_as_they_come(tokenizer, capsys):
    ids = tokenizer.encode("first words")
    prompt = Request((tokenizer.bos_id, *tokenizer.encode("def")))
    printed = []

    def steps():
        for token in ids:
            yield {0: token}
            printed.append(capsys.readouterr().out)

    command.print_answers(steps(), ["def"], [command.decoder_after(tokenizer, prompt)])
    assert "".join(printed) == " first words"
    assert all(printed)
    assert capsys.readouterr().out == "\n"


def test_arguments_reach_the_command(monkeypatch):
    got = []
    monkeypatch.setattr(command, "run", lambda *arguments: got.append(arguments))
    given = ["--temperature", "0.5", "--top-k", "4", "--top-p", ".25", "--seed", "6"]
    given += ["mesh.fsdp=2", "--max-new-tokens", "3", "--checkpoint", "here", "--prompt", ""]
    assert generate.main(given) == 0
    assert generate.main(["--checkpoint", "here", "--prompt=-x"]) == 0
    options = Options(max_new_tokens=3, temperature=0.5, top_k=4, top_p=0.25, seed=6)
    assert got[0] == ("here", [""], options, Deployment(MeshConfig(fsdp=2)))
    assert got[1] == ("here", ["-x"], Options(), Deployment())


def test_sampling_forgets_how_training_was_placed():
    trained = dataclasses.replace(MODEL, exchange="local", capacity_factor=1.0, remat="full")
    config = command.model_config(trained, Deployment(MeshConfig(expert=4)))
    assert config == MODEL
    config = command.model_config(trained, Deployment(exchange="padded", compute_dtype="bfloat16"))
    assert (config.exchange, config.compute_dtype) == ("padded", "bfloat16")


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
    (tmp_path / "7").mkdir()
    refused(["--checkpoint", str(tmp_path), *prompt], "checkpoint .*7 is damaged")
