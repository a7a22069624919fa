"""Requests, options and overrides: every check that needs no model."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from mixtral_jax.config import InputError, MeshConfig
from mixtral_jax.generation.request import (
    Deployment,
    Options,
    Request,
    check_request,
    deployment_from_overrides,
)

NAN, INFINITY = float("nan"), float("inf")


IMPOSSIBLE = {
    "max_new_tokens": (0, -3, 2**31),
    "min_new_tokens": (-1, 129),
    "temperature": (-1.0, NAN, 2e6, INFINITY),
    "top_k": (-1, 2**31),
    "top_p": (1.5, 0.0, -0.1, NAN),
    "min_p": (1.5, -0.1, NAN),
    "repetition_penalty": (0.0, -1.0, 1e-7, 1e7, NAN, INFINITY),
    "presence_penalty": (-2.1, 2.1, NAN),
    "frequency_penalty": (-2.1, 2.1, NAN),
    "n": (0, 129),
    "seed": (-1, 2**32),
    "logprobs": (-1, 21),
    "prompt_logprobs": (-1, 21),
}
WHOLE = ["max_new_tokens", "min_new_tokens", "top_k", "n", "seed", "logprobs", "prompt_logprobs"]
NUMBERS = sorted(IMPOSSIBLE.keys() - WHOLE)
EVERY = [f.name for f in dataclasses.fields(Options)]


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in IMPOSSIBLE for value in IMPOSSIBLE[name]]
)
def test_impossible_options_are_named(name, value):
    with pytest.raises(InputError, match=f"^{name}={re.escape(str(value))} must "):
        Options(**{name: value})


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize(
    "value",
    [{"a": 1}, [1], object(), 3j, 10**5000, "x" * 10**6 + "\n"],
    ids=["object", "list", "thing", "complex", "huge", "long"],
)
def test_no_option_takes_every_type(name, value):
    with pytest.raises(InputError, match=rf"^{name}=.* must ") as caught:
        Options(**{name: value})
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("value", ["1", True, None, 1.0, 1], ids=repr)
def test_numbers_are_of_the_right_type(name, value):
    good = {
        **dict.fromkeys(WHOLE, type(value) is int),
        **dict.fromkeys(NUMBERS, type(value) in (int, float)),
        "echo": value is True,
    }
    if value is None:
        good |= {"logprobs": True, "prompt_logprobs": True}
    if good.get(name, False):
        assert getattr(Options(**{name: value}), name) is value
    else:
        with pytest.raises(InputError, match=f"^{name}={re.escape(repr(value))} must be (a|true)"):
            Options(**{name: value})


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"logit_bias": ((1, 2.0),) * 301}, "logit_bias=301 pairs of .* must be at most 300"),
        ({"logit_bias": ((1, 2.0), (1, 3))}, "logit_bias=1 must name a token once"),
        ({"logit_bias": ((1, 2, 3),)}, r"logit_bias=\(1, 2, 3\) must be a pair"),
        ({"logit_bias": (1,)}, "logit_bias=1 must be a pair"),
        ({"logit_bias": ((-1, 2),)}, "logit_bias=-1 must be a token id"),
        ({"logit_bias": ((2**31, 2),)}, "logit_bias=2147483648 must be a token id"),
        ({"logit_bias": ((True, 2),)}, "logit_bias=True must be a token id"),
        ({"logit_bias": ((1.0, 2),)}, "logit_bias=1.0 must be a token id"),
        *(
            ({"logit_bias": ((7, b),)}, rf"logit_bias={b!r} must be a number in -100..100.* 7$")
            for b in (100.5, -101, NAN, -INFINITY, "5", True, None)
        ),
        ({"stop": ("a",) * 17}, "stop=17 texts must be at most 16"),
        ({"stop": ("a", "")}, "stop='' must be text that is not empty"),
        ({"stop": ("a", 5)}, "stop=5 must be text"),
        ({"stop": ("a\udcff",)}, r"stop='a\\udcff' must be Unicode"),
        ({"stop_token_ids": tuple(range(17))}, "stop_token_ids=17 token ids must be at most 16"),
        ({"stop_token_ids": (1, -1)}, "stop_token_ids=-1 must be a token id"),
        ({"stop_token_ids": (2**31,)}, "stop_token_ids=2147483648 must be a token id"),
        ({"stop_token_ids": ("1",)}, "stop_token_ids='1' must be a token id"),
        ({"stop_token_ids": (False,)}, "stop_token_ids=False must be a token id"),
        ({"max_new_tokens": 3, "min_new_tokens": 4}, "=4 must be at most max_new_tokens=3"),
        ({"max_new_tokens": 0, "logprobs": 2}, "=0 must be at least 1, or 0 with prompt_logprobs"),
    ],
    ids=str,
)
def test_impossible_lists_and_pairs_of_options_are_named(wrong, said):
    with pytest.raises(InputError, match=said):
        Options(**wrong)


LOWEST = {
    **{"max_new_tokens": 1, "min_new_tokens": 0, "temperature": 0.0, "top_k": 0, "top_p": 1e-30},
    **{"min_p": 0, "repetition_penalty": 1e-6, "presence_penalty": -2, "frequency_penalty": -2.0},
    **{"logit_bias": ((0, -100),), "stop": ("\x00",), "stop_token_ids": (0,), "n": 1, "seed": 0},
    **{"logprobs": 0, "prompt_logprobs": 0, "echo": False},
}
HIGHEST = {
    **{"max_new_tokens": 2**31 - 1, "min_new_tokens": 2**31 - 1, "temperature": 1e6},
    **{"top_k": 2**31 - 1, "top_p": 1, "min_p": 1.0, "repetition_penalty": 1e6},
    **{"presence_penalty": 2.0, "frequency_penalty": 2, "n": 128, "seed": 2**32 - 1},
    "logit_bias": tuple((2**31 - 1 - i, 100.0) for i in range(300)),
    **{"stop": ("\U0010ffff" * 99,) * 16, "stop_token_ids": (2**31 - 1,) * 16},
    **{"logprobs": 20, "prompt_logprobs": 20, "echo": True},
}


@pytest.mark.parametrize("edge", [LOWEST, HIGHEST], ids=["lowest", "highest"])
def test_the_edges_of_options_are_possible(edge):
    assert list(edge.keys() ^ EVERY) == []
    assert hash(Options(**edge)) == hash(Options(**edge))
    assert Options.from_dict(as_json(edge), Options()) == Options(**edge)


def test_no_new_token_is_scoring():
    assert Options(0, prompt_logprobs=0).max_new_tokens == 0


# ---- options from JSON -------------------------------------------------------------------------


def as_json(values):
    pairs = values["logit_bias"]
    values = {**values, "logit_bias": {str(token): added for token, added in pairs}}
    return json.loads(json.dumps(values))


def test_json_overrides_the_default():
    default = Options(9, temperature=0.5, stop=("a",), logprobs=3)
    assert Options.from_dict({}, default) == default
    given = {"temperature": 1, "stop": "\n", "logprobs": None, "logit_bias": {"12": -5, "0": 0.5}}
    expected = Options(9, temperature=1, stop=("\n",), logit_bias=((12, -5), (0, 0.5)))
    assert Options.from_dict(given, default) == expected
    given = {"stop": ["b", "c"], "stop_token_ids": [4, 2], "logit_bias": {12: 1}}
    made = Options.from_dict(given, default)
    assert (made.stop, made.stop_token_ids, made.logit_bias) == (("b", "c"), (4, 2), ((12, 1),))
    assert given["stop"] == ["b", "c"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_tokens": 5}, "^'max_tokens' is no option; did you mean max_new_tokens\\?$"),
        ({"topp": 0.5}, "'topp' is no option; did you mean top_p"),
        ({"seed ": 5}, "'seed ' is no option; did you mean seed"),
        ({"\n" * 10**5: 5}, r"^'(\\n)+\.\.\. is no option; valid: max_new_tokens, .*, echo$"),
        ({"tools": []}, "'tools' is no option; valid: max_new_tokens, min_new_tokens"),
        ({"": 5}, "^'' is no option"),
        ({3: 5}, "^3 is no option"),
        ({"temperature": "hot"}, "^temperature='hot' must be a number$"),
        ({"temperature": None}, "^temperature=None must be a number$"),
        ({"seed": True}, "^seed=True must be a whole number$"),
        ({"stop": None}, "^stop=None must be a tuple .in JSON a list. of texts$"),
        ({"stop": ""}, "^stop='' must be text that is not empty$"),
        ({"stop": [["a"]]}, "^stop=list of 1 must be text"),
        ({"stop_token_ids": 3}, "^stop_token_ids=3 must be a tuple .in JSON a list. of token ids$"),
        ({"logit_bias": [[1, 2]]}, "^logit_bias=list of 1 must be an object of token ids, such as"),
        ({"logit_bias": {"a": 2}}, "^logit_bias='a' must have token ids as its keys, such as"),
        ({"logit_bias": {"-1": 2}}, "^logit_bias='-1' must have token ids as its keys"),
        ({"logit_bias": {"\u0663": 2}}, "must have token ids as its keys"),
        ({"logit_bias": {"1" * 5000: 2}}, "must have token ids as its keys"),
        ({"logit_bias": {10**5000: 2}}, "^logit_bias=a huge number must have token ids"),
        ({"logit_bias": {"1": 2, "01": 3}}, "^logit_bias=1 must name a token once"),
        ({"logit_bias": {"1": [2]}}, "^logit_bias=list of 1 must be a number in -100..100"),
        ({"max_new_tokens": 5}, "^min_new_tokens=7 must be at most max_new_tokens=5$"),
    ],
    ids=itertools.count(),
)
def test_json_that_is_no_option_is_refused(given, said):
    with pytest.raises(InputError, match=said) as caught:
        Options.from_dict(given, Options(9, min_new_tokens=7))
    assert str(caught.value).isprintable()


# ---- requests ----------------------------------------------------------------------------------


def request(length, new):
    return Request((1,) * length, Options(new))


@pytest.mark.parametrize(
    ("length", "new", "fix"), [(60, 5, "max_new_tokens=4 or less"), (64, 1, "shorten"), (90, 1, "")]
)
def test_a_prompt_beyond_the_context_is_refused_with_both_lengths(length, new, fix):
    with pytest.raises(InputError, match=r"^prompt 2 has ") as caught:
        check_request(request(length, new), 38, 64, "prompt 2")
    for part in (f"{length} tokens", f"max_new_tokens={new}", "context of 64", fix):
        assert part in str(caught.value)


@pytest.mark.parametrize(("length", "new"), [(60, 4), (1, 63), (63, 1)])
def test_what_just_fits_passes(length, new):
    check_request(request(length, new), 2, 64, "prompt 1")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (Request(()), " has no tokens"),
        (Request((1, 38)), ": token 38 is not in 0..37"),
        (Request((1, -1)), ": token -1 is not in 0..37"),
        (Request((1, 5.7)), ": token 5.7 is not a whole number"),
        (Request((1, True)), ": token True is not a whole number"),
        (Request("a"), ": token 'a' is not a whole number"),
        (Request(np.array([])), " has no tokens"),
        (Request(np.array([1, 38])), ": token 38 is not in 0..37"),
        (Request(np.array([1.0])), r": token .*1.0\)? is not a whole number"),
        (Request((1,), Options(logit_bias=((37, 1), (38, 1)))), ": the logit_bias of token 38 is"),
        (Request((1,), Options(stop_token_ids=(37, 40))), ": stop_token_ids: token 40 is not"),
    ],
)
def test_a_request_without_sense_is_refused_by_its_name(wrong, said):
    with pytest.raises(InputError, match=f"^line 7{said}"):
        check_request(wrong, 38, 640, "line 7")


def test_scoring_takes_a_whole_context():
    scoring = Options(0, prompt_logprobs=1)
    check_request(Request((1,) * 64, scoring), 2, 64, "prompt 1")
    with pytest.raises(InputError, match=r"has 65 tokens.* max_new_tokens=0 .*: shorten it"):
        check_request(Request((1,) * 65, scoring), 2, 64, "prompt 1")


# ---- where to compute --------------------------------------------------------------------------


def test_overrides_place_the_model():
    assert deployment_from_overrides([]) == Deployment(MeshConfig(), "", None)
    texts = ["mesh.expert=4", "model.exchange=padded", "mesh.tensor=2", "model.compute_dtype="]
    expected = Deployment(MeshConfig(expert=4, tensor=2), "padded", "")
    assert deployment_from_overrides(texts) == expected
    assert deployment_from_overrides(["model.compute_dtype=bfloat16"]).compute_dtype == "bfloat16"
    assert deployment_from_overrides(["model.grouped_matmul=blocks"]).grouped_matmul == "blocks"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "training.steps=3",
            r"training.steps cannot be set .* mesh.fsdp, .* model.grouped_matmul$",
        ),
        ("model.capacity_factor=1", "model.capacity_factor cannot be set"),
        ("mesh.exprt=2", "mesh.exprt cannot be set"),
        ("mesh.expert=four", "mesh.expert='four' must be a whole number"),
        ("mesh.expert=", "mesh.expert=None must be a whole number"),
        ("mesh.expert=true", "must be a whole number"),
        ("mesh.data=0", "mesh.data=0 must be at least 1"),
        ("model.exchange=fast", "model.exchange='fast' is not one of"),
        ("model.exchange=0", "model.exchange='0' is not one of"),
        ("model.compute_dtype=false", "model.compute_dtype='false' is not one of"),
        ("model.compute_dtype=int8", "model.compute_dtype='int8' is not one of"),
        ("hello", "'hello' must look like section.key=value"),
    ],
)
def test_other_overrides_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        deployment_from_overrides(["mesh.tensor=2", text])


def test_checking_arguments_needs_no_jax():
    code = "import sys, generate; assert generate.main(['--top-p', '2']) == 2; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mixtral_jax.generation.request" in done.stdout
    assert not {"jax", "numpy", "orbax"} & set(done.stdout.split())


@pytest.mark.parametrize("name", ["request", "prompts", "results"])
def test_what_is_asked_and_shown_needs_no_jax(name):
    code = f"import sys, mixtral_jax.generation.{name}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"mixtral_jax.generation.{name}" in done.stdout
    assert not {"jax", "numpy", "orbax"} & set(done.stdout.split())
