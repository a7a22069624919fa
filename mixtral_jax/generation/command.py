"""What generate.py does once its arguments are known to be good: load, answer, print, report."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax

from mixtral_jax import sharding
from mixtral_jax.command_line import StartUp
from mixtral_jax.config import InputError, ModelConfig, check_mesh
from mixtral_jax.data.tokenizer import StreamDecoder, Tokenizer
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.request import Deployment, Options, Request, check_requests
from mixtral_jax.interop.folders import recognise
from mixtral_jax.interop.models import open_checkpoint
from mixtral_jax.model.mixtral import chosen_kernels


def run(
    checkpoint: str | pathlib.Path, prompts: Sequence[str], options: Options, deployment: Deployment
) -> None:
    """Print how a checkpoint's model goes on from prompts, on standard output; see `print_answers`.

    Starts JAX for the deployment's mesh, so call it once per process.

    Raises:
      InputError: for what a user can mend; no answer has been printed then.
    """
    deployed = deploy(checkpoint, deployment)
    tokenizer = deployed.tokenizer
    ids = [(tokenizer.bos_id, *tokenizer.encode(prompt)) for prompt in prompts]
    requests = [Request(tokens, options) for tokens in ids]
    answer(deployed, prompts, requests, [decoder_after(tokenizer, r) for r in requests])


class Deployed(NamedTuple):
    """A checkpoint that fits its deployment, whose weights are still to be read."""

    tokenizer: Tokenizer
    config: ModelConfig
    start: Callable[[], Engine]
    """Reads the weights."""
    start_up: StartUp


def deploy(checkpoint: str | pathlib.Path, deployment: Deployment) -> Deployed:
    """Start JAX for a deployment's mesh and look at a checkpoint that is to run there.

    Raises:
      InputError: if there is none, or it does not fit.
    """
    start_up = StartUp()
    recognise(checkpoint)  # before JAX starts, which takes a while
    sharding.start(deployment.mesh)
    found = open_checkpoint(checkpoint)
    config, tokenizer = model_config(found.config, deployment), found.tokenizer
    if tokenizer is None:
        raise InputError(
            f"checkpoint {found.path} has no tokenizer: it was trained on synthetic data, or its "
            "folder lacks tokenizer.model"
        )
    mesh = sharding.mesh_from_config(deployment.mesh)
    with jax.set_mesh(mesh):
        chosen_kernels(config, sharding.batch_shards(), 1)

    start_up.end("checkpoint and devices")

    def start() -> Engine:
        engine = Engine(found.load(config, mesh), mesh, tokenizer.eos_id)
        place = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
        say(f"checkpoint {found.path}, {config.num_parameters:,} parameters on {place}")
        start_up.end("weights")
        return engine

    return Deployed(tokenizer, config, start, start_up)


def answer(
    deployed: Deployed,
    prompts: Sequence[str],
    requests: Sequence[Request],
    decoders: Sequence[StreamDecoder],
) -> None:
    """Print what the model answers to requests, each by its decoder, and say how fast.

    Raises:
      InputError: for requests that the model cannot answer; no weights have been read then.
    """
    config = deployed.config
    check_requests(requests, config.vocab_size, config.max_position_embeddings)
    steps = Timed(deployed.start().stream(requests), deployed.start_up)
    print_answers(steps, prompts, decoders)
    say(steps.report(sum(len(r.tokens) for r in requests)))
    say(deployed.start_up.report("token"))


def model_config(trained: ModelConfig, deployment: Deployment) -> ModelConfig:
    """A checkpoint's config for sampling: where the deployment says, and no token is ever dropped.

    Raises:
      InputError: if a size does not split over the deployment's mesh.
    """
    config = dataclasses.replace(trained.dropless(), exchange=deployment.exchange)
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
                write(part)
    ends = [decoder.flush() for decoder in decoders]
    if alone:
        write(ends[0] + "\n")
        return
    for prompt, text, end in zip(prompts, texts, ends, strict=True):
        write(f"> {prompt}\n{text}{end}\n\n")


class Timed:
    """Steps from Engine.stream, with the time that each took; the first one ends the start-up."""

    def __init__(self, steps: Iterable[dict[int, int]], start_up: StartUp):
        self._steps, self._start_up = steps, start_up
        self._made: list[int] = []
        self._times = [time.perf_counter()]

    def __iter__(self) -> Iterator[dict[int, int]]:
        for made in self._steps:
            if not self._made:
                self._start_up.end("prefill")
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


def write(text: str) -> None:
    """Print on the first host's standard output, at once."""
    if jax.process_index() == 0:
        print(text, end="", flush=True)


def say(text: str) -> None:
    """Print a line on the first host's standard error."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
