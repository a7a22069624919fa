"""Answers of a model whose weights are not all finite: they say so, and spoil no other."""

import dataclasses
import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import MODEL

from mixtral_jax import sharding
from mixtral_jax.generation.answering import Task
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.request import Options, Request
from mixtral_jax.model.mixtral import initialize

BAD = 30  # the token whose embedding is not finite
SHARED = (1, *range(2, 26))
SPOILED, GOOD = (*SHARED, BAD, 9), (*SHARED, 7, 8)
GREEDY = Options(4, temperature=0.0, logprobs=1)
SAID = "the logits of token 1 of the answer are not finite: a weight is NaN or infinite"


@pytest.fixture(scope="module", params=[np.nan, np.inf], ids=str)
def model(request):
    made = initialize(MODEL, jax.random.key(0), sharding.make_mesh())
    table = made.embedding_VD.get_value()
    made.embedding_VD[...] = table.at[BAD].set(jnp.float32(request.param))
    return made


@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_an_answer_says_so_and_spoils_no_other(model, cache_dtype):
    """Neither beside it, nor in its row after it, whose places still hold what it left."""
    engine = Engine(model, rows=1, part=32, cache_dtype=cache_dtype)
    good, short, spoiled = (Request(tokens, GREEDY) for tokens in (GOOD, GOOD[:2], SPOILED))
    batch = [good, short, spoiled, short, spoiled, good]
    answers = [one for (one,) in engine.generate(batch)]
    for answer in answers[2], answers[4]:
        assert (answer.finish_reason, answer.tokens) == ("error", [])
        assert answer.error.startswith(SAID)
    for answer, alone in (answers[3], answers[1]), (answers[5], answers[0]):
        assert (answer.error, answer.tokens) == (None, alone.tokens)
        assert (answer.logprobs, answer.cached_tokens) == (alone.logprobs, 0)
    together = Engine(model, rows=2, part=32, cache_dtype=cache_dtype)
    failed, beside = (one for (one,) in together.generate([spoiled, short]))
    assert (failed.finish_reason, beside.tokens) == ("error", answers[1].tokens)


def test_a_prompt_that_is_scored_says_so(model):
    scored = Options(0, prompt_logprobs=0)
    engine = Engine(model, rows=1, part=32)
    spoiled, good = (
        one for (one,) in engine.generate([Request(SPOILED, scored), Request(GOOD, scored)])
    )
    assert spoiled.error.startswith("the logits of the prompt are not finite")
    assert (good.finish_reason, good.error) == ("length", None)


def test_what_fills_a_part_up_does_not_reach_the_prompt():
    """Tokens 0, behind its end."""
    made = initialize(MODEL, jax.random.key(0), sharding.make_mesh())
    request = Request((1, 5, 6), dataclasses.replace(GREEDY, max_new_tokens=1))
    answers = []
    for value in (0, np.nan):
        made.embedding_VD[...] = made.embedding_VD.get_value().at[0].set(jnp.float32(value))
        answers += Engine(made, rows=1).generate([request])[0]
    assert answers[1] == answers[0]


# ---- of the command ----------------------------------------------------------------------------

PIECE = 299
ARGUMENTS = ["--temperature", "0", "--max-new-tokens", "5"]


@pytest.fixture
def fails(monkeypatch):
    """Each answer fails after one token, a piece of text."""
    push = Task.push

    def failing(task, token, found):
        return task.fail("token 2 of the answer") if task.tokens else push(task, PIECE, found)

    monkeypatch.setattr(Task, "push", failing)


def test_each_answer_of_a_prompt_is_printed_and_named(run, main, fails, capsys, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "n": 2}\n{"prompt": "b"}\n')
    arguments = ["--checkpoint", str(run), *ARGUMENTS, "--prompt-file", str(path)]
    assert main([*arguments, "--format", "jsonl"]) == 1
    out, err = capsys.readouterr()
    made = [json.loads(line) for line in out.splitlines()]
    assert [(one["request_name"], one["index"]) for one in made] == [
        *(("line 1", 0), ("line 1", 1), ("line 2", 0)),
    ]
    for one in made:
        assert one["tokens"] == [PIECE]
        assert one["error"].startswith(f"{path} {one['request_name']}: the logits of token 2 of")
        assert f"error: {one['error']}\n" in err


def test_a_text_that_was_begun_has_its_line_ended(run, main, fails, capsys):
    assert main(["--checkpoint", str(run), *ARGUMENTS, "--prompt", "a"]) == 1
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert "error: prompt 1: the logits of token 2 of the answer are not finite: " in err


def test_a_conversation_stays_as_it_was(run, main, fails, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n")))
    assert main(["--checkpoint", str(run), *ARGUMENTS, "--chat"]) == 2
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert err.splitlines()[-1].startswith("error: the logits of token 2 of the answer are not")
