"""Requests, options, overrides and prompt files: every check that needs no model."""

import subprocess
import sys

import pytest

from mixtral_jax.config import InputError, MeshConfig
from mixtral_jax.generation.request import (
    Deployment,
    Options,
    Request,
    check_requests,
    deployment_from_overrides,
    read_prompts,
)

NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"top_p": p} for p in (1.5, 0.0, -0.1, NAN)),
        *({"temperature": t} for t in (-1.0, NAN, 2e6, INFINITY)),
        *({"top_k": k} for k in (-1, 2**31)),
        *({"max_new_tokens": n} for n in (0, -3)),
        *({"seed": s} for s in (-1, 2**32)),
    ],
    ids=str,
)
def test_impossible_options_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"^{name}={value} must "):
        Options(**wrong)


def test_the_edges_of_options_are_possible():
    Options(max_new_tokens=1, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    Options(temperature=1e6, top_k=2**31 - 1, top_p=1e-30, seed=2**32 - 1)


def request(length, new):
    return Request((1,) * length, Options(new))


@pytest.mark.parametrize(
    ("length", "new", "fix"), [(60, 5, "max_new_tokens=4 or less"), (64, 1, "shorten"), (90, 1, "")]
)
def test_a_prompt_beyond_the_context_is_refused_with_both_lengths(length, new, fix):
    with pytest.raises(InputError) as caught:
        check_requests([request(3, 4), request(length, new)], 38, 64)
    for part in ("prompt 2", f"{length} tokens", f"max_new_tokens={new}", "context of 64", fix):
        assert part in str(caught.value)


def test_what_just_fits_passes():
    check_requests([request(60, 4), request(1, 63), request(63, 1)], 2, 64)


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        ([], "no request"),
        ([Request((1,)), Request(())], "prompt 2 has no tokens"),
        ([Request((1, 38))], "token 38 is not in 0..37"),
        ([Request((1, -1))], "token -1 is not in 0..37"),
    ],
)
def test_requests_without_sense_are_refused(requests, said):
    with pytest.raises(InputError, match=said):
        check_requests(requests, 38, 640)


def test_overrides_place_the_model():
    assert deployment_from_overrides([]) == Deployment(MeshConfig(), "", None)
    texts = ["mesh.expert=4", "model.exchange=padded", "mesh.tensor=2", "model.compute_dtype="]
    expected = Deployment(MeshConfig(expert=4, tensor=2), "padded", "")
    assert deployment_from_overrides(texts) == expected
    assert deployment_from_overrides(["model.compute_dtype=bfloat16"]).compute_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training.steps=3", r"training.steps cannot be set .* mesh.fsdp, .* model.compute_dtype$"),
        ("model.capacity_factor=1", "model.capacity_factor cannot be set"),
        ("mesh.exprt=2", "mesh.exprt cannot be set"),
        ("mesh.expert=four", "mesh.expert='four' must be a whole number"),
        ("mesh.expert=", "mesh.expert=None must be a whole number"),
        ("mesh.expert=true", "must be a whole number"),
        ("mesh.data=0", "mesh.data=0 must be at least 1"),
        ("model.exchange=fast", "model.exchange='fast' is not one of"),
        ("model.compute_dtype=int8", "model.compute_dtype='int8' is not one of"),
        ("hello", "'hello' must look like section.key=value"),
    ],
)
def test_other_overrides_are_refused(text, said):
    with pytest.raises(InputError, match=said):
        deployment_from_overrides(["mesh.tensor=2", text])


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\n\r\n two \r\n", ["one", "", " two "]),
        (b"\xef\xbb\xbfa\x0bb\x1b[0m\xc2\x85c\x00\n", ["a\x0bb\x1b[0m\x85c\x00"]),
        (b"\n", [""]),
    ],
)
def test_a_prompt_file_has_one_prompt_a_line(tmp_path, content, prompts):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert read_prompts(path) == prompts


def test_unreadable_prompt_files_are_named(tmp_path):
    path = tmp_path / "prompts.txt"
    with pytest.raises(InputError, match=r"prompts.txt cannot be read: No such file"):
        read_prompts(path)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_prompts(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"prompts.txt is empty"):
        read_prompts(path)
    path.write_bytes(b"fine\nfine\n\xff\n")
    with pytest.raises(InputError, match=r"prompts.txt line 3 is not UTF-8"):
        read_prompts(path)


def test_checking_arguments_needs_no_jax():
    code = "import sys, generate; assert generate.main(['--top-p', '2']) == 2; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "mixtral_jax.generation.request" in done.stdout
    assert not {"jax", "numpy", "orbax"} & set(done.stdout.split())
