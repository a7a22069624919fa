"""What generate.py does once its arguments are known to be good: load, answer, print, report."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence

import jax

from mixtral_jax import sharding
from mixtral_jax.config import InputError, ModelConfig, check_mesh
from mixtral_jax.data.tokenizer import StreamDecoder, Tokenizer
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.request import Deployment, Options, Request, check_requests
from mixtral_jax.model.moe import check_exchange
from mixtral_jax.training.checkpoint import find, load_extras, load_model


def run(
    checkpoint: str | pathlib.Path, prompts: Sequence[str], options: Options, deployment: Deployment
) -> None:
    """Print the answers of a checkpoint's model on standard output; see `print_answers`.

    Starts JAX for the deployment's mesh, so call it once per process.

    Raises:
      InputError: for what a user can mend; no answer has been printed then.
    """
    path = find(checkpoint)
    sharding.start(deployment.mesh)
    answer(path, prompts, options, deployment)


def answer(
    path: pathlib.Path, prompts: Sequence[str], options: Options, deployment: Deployment
) -> None:
    """`run` for a checkpoint path from `find`, in a process that has enough devices."""
    extras = load_extras(path)
    config = model_config(extras.config.model, deployment)
    if extras.tokenizer is None:
        raise InputError(f"checkpoint {path} has no tokenizer: it was trained on synthetic data")
    requests = [
        Request((extras.tokenizer.bos_id, *extras.tokenizer.encode(prompt)), options)
        for prompt in prompts
    ]
    check_requests(requests, config.vocab_size, config.max_position_embeddings)
    mesh = sharding.mesh_from_config(deployment.mesh)
    with jax.set_mesh(mesh):
        check_exchange(config)
    engine = Engine(load_model(path, config, mesh), mesh, extras.tokenizer.eos_id)
    device = mesh.devices.flat[0].device_kind
    _say(f"checkpoint {path}, {config.num_parameters:,} parameters on {mesh.size} x {device}")
    steps = Timed(engine.stream(requests))
    print_answers(steps, prompts, [decoder_after(extras.tokenizer, r) for r in requests])
    _say(steps.report(sum(len(r.tokens) for r in requests)))


def model_config(trained: ModelConfig, deployment: Deployment) -> ModelConfig:
    """A checkpoint's config for sampling: where the deployment says, and no token is ever dropped.

    Raises:
      InputError: if a size does not split over the deployment's mesh.
    """
    config = dataclasses.replace(
        trained, capacity_factor=None, remat="none", exchange=deployment.exchange
    )
    if deployment.compute_dtype is not None:
        config = dataclasses.replace(config, compute_dtype=deployment.compute_dtype)
    check_mesh(config, deployment.mesh)
    return config


def decoder_after(tokenizer: Tokenizer, request: Request) -> StreamDecoder:
    """A decoder that has seen the prompt, so that an answer keeps the space it begins with."""
    decoder = StreamDecoder(tokenizer)
    for token in request.tokens:
        decoder.push(token)
    decoder.flush()
    return decoder


def print_answers(
    steps: Iterable[dict[int, int]], prompts: Sequence[str], decoders: Sequence[StreamDecoder]
) -> None:
    """Print what comes from Engine.stream, on the first host.

    One prompt: the answer alone, each token as it comes. Several: when all have ended, in their
    order, a line of `> ` and the prompt, then the answer, then an empty line.
    """
    alone = len(prompts) == 1
    texts = [""] * len(prompts)
    for made in steps:
        for row, token in made.items():
            part = decoders[row].push(token)
            texts[row] += part
            if alone:
                _write(part)
    ends = [decoder.flush() for decoder in decoders]
    if alone:
        _write(ends[0] + "\n")
        return
    for prompt, text, end in zip(prompts, texts, ends, strict=True):
        _write(f"> {prompt}\n{text}{end}\n\n")


class Timed:
    """Steps from Engine.stream, with the time that each took."""

    def __init__(self, steps: Iterable[dict[int, int]]):
        self._steps = steps
        self._made: list[int] = []
        self._times = [time.perf_counter()]

    def __iter__(self) -> Iterator[dict[int, int]]:
        for made in self._steps:
            self._made.append(len(made))
            self._times.append(time.perf_counter())
            yield made

    def report(self, prompt_tokens: int) -> str:
        """One line: time of the prefill, and tokens/s of decoding without its first step."""
        prefill = self._times[1] - self._times[0]
        line = f"{prompt_tokens} prompt tokens in {prefill:.2f} s, with compiling"
        made, seconds = sum(self._made[2:]), self._times[-1] - self._times[min(2, len(self._made))]
        rate = f"; then {made / seconds:.1f} tokens/s" if made else ""
        return f"{line}; {sum(self._made)} tokens made{rate}"


def _write(text: str) -> None:
    if jax.process_index() == 0:
        print(text, end="", flush=True)


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
