"""What generate.py does once its arguments are known to be good: load, answer, print, report."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax

from mixtral_jax import hosts, sharding
from mixtral_jax.command_line import StartUp, interruptions
from mixtral_jax.config import InputError, ModelConfig, check_mesh
from mixtral_jax.data.chat import encode_chat
from mixtral_jax.data.conversation import read_conversation
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.generation.answering import Event
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.output import (
    InOrder,
    Json,
    Rates,
    Shown,
    Stop,
    Text,
    cut,
    legend,
    painted,
    pieces,
    say_aside,
)
from mixtral_jax.generation.prompts import Asked, message, opening, told
from mixtral_jax.generation.request import Deployment, Request, Serving, check_request
from mixtral_jax.generation.results import Answer
from mixtral_jax.generation.rows import context_for
from mixtral_jax.interop.folders import recognise
from mixtral_jax.interop.models import open_checkpoint
from mixtral_jax.kernels import platform
from mixtral_jax.model.mixtral import chosen_kernels

MOST_ROWS = 64
"""Answers in progress at a time, where nothing else is asked for."""


class Refused(NamedTuple):
    """A prompt that cannot be answered."""

    reason: str
    tokens: int
    """Of the prompt; 0 where it has not come so far."""


class Style(NamedTuple):
    """How prompts are read and answers shown."""

    jsonl: bool = False
    """Answers as lines of JSON."""
    source: str = ""
    """The file that prompts are lines of, as messages name it."""
    strict: bool = True
    """Whether one prompt that cannot be answered stops all, before anything is loaded."""
    chat: bool = False
    """Whether texts are messages of a user's."""
    system: str = ""
    """With chat, what the model is told first."""
    show_routing: int | None = None
    """The layer whose experts the answers are coloured by."""


def run(
    checkpoint: str | pathlib.Path,
    asked: Sequence[Asked],
    style: Style,
    deployment: Deployment,
    serving: Serving,
) -> int:
    """Print what a checkpoint's model answers, on standard output.

    Starts JAX for the deployment's mesh, so call it once per process.

    Returns:
      The exit code: 1 if a request could not be answered, which standard error tells.
    Raises:
      InputError: for what a user can mend; no answer has been printed then.
    """
    deployed = deploy(checkpoint, deployment)
    hosts.same_program({**_told(deployed, style, deployment, serving), **told(asked)})
    layers, layer = deployed.config.num_hidden_layers, style.show_routing
    if layer is not None and not 0 <= layer < layers:
        raise InputError(f"--show-routing {layer} is not in 0..{layers - 1}, the model's layers")
    limit = deployed.context(serving)
    requests = [_request(one, deployed, style, limit) for one in asked]
    for one in requests:
        if isinstance(one, Refused):
            say_aside(f"error: {one.reason}")
    good = [request for request in requests if isinstance(request, Request)]
    if not good:
        if style.jsonl:
            _print_refused(Json(_shown(asked, requests)), asked, requests)
        return 1
    engine = deployed.start(sized(serving, good))
    answered = show(engine, asked, requests, style, deployed.start_up)
    return 0 if answered and len(good) == len(asked) else 1


def _told(
    deployed: Deployed, style: Style, deployment: Deployment, serving: Serving
) -> dict[str, str]:
    """For `hosts.same`: which checkpoint is asked, and how."""
    model = deployed.tokenizer.model_bytes + repr(deployed.config).encode()
    keys = {**style._asdict(), **vars(deployment), **vars(serving)}
    keys["the checkpoint"] = f"{deployed.path}, {hashlib.sha256(model).hexdigest()[:12]}"
    return {name: str(value) for name, value in keys.items()}


def _request(asked: Asked, deployed: Deployed, style: Style, limit: int) -> Request | Refused:
    """What the engine is asked, or why it cannot be."""
    tokenizer, count = deployed.tokenizer, 0
    try:
        if asked.error is not None:
            raise InputError(asked.error)
        messages = asked.messages
        if messages is None and style.chat:
            messages = [message("user", asked.text)]
        if messages and messages[0].get("role") != "system":
            messages = [*opening(style.system), *messages]
        if messages is None:
            request = Request((tokenizer.bos_id, *tokenizer.encode(asked.text)), asked.options)
        else:
            ids = encode_chat(tokenizer, messages, asked.tools)
            request = Request(tuple(ids), asked.options, bool(messages[-1].get("prefix")))
        count = len(request.tokens)
        check_request(request, deployed.config.vocab_size, limit, asked.name)
        return request
    except InputError as error:
        if style.strict:
            raise
        if asked.error is not None:  # which names the file and the line
            return Refused(asked.error, count)
        return Refused(_named(str(error), asked, style), count)


def _named(reason: str, asked: Asked, style: Style) -> str:
    """A reason that names what was asked, and where."""
    if not reason.startswith(asked.name):
        reason = f"{asked.name}: {reason}"
    return f"{style.source} {reason}".lstrip()


def sized(serving: Serving, requests: Sequence[Request]) -> Serving:
    """What requests need, where nothing else is asked for: few sizes, to compile few programs."""
    rows, context = serving.rows, serving.context
    if rows is None:
        answers = sum(request.options.n for request in requests)
        rows = min(MOST_ROWS, 1 << (answers - 1).bit_length())
    if context is None:
        longest = max(len(r.tokens) + r.options.max_new_tokens for r in requests)
        context = context_for(longest)
    return dataclasses.replace(serving, rows=rows, context=context)


def show(
    engine: Engine,
    asked: Sequence[Asked],
    requests: Sequence[Request | Refused],
    style: Style,
    start_up: StartUp,
) -> bool:
    """Answer requests, print the answers as they come, and say how fast.

    Returns: false if one ended for a reason that standard error tells.
    Raises:
      KeyboardInterrupt: after the event that comes next, or at the second Ctrl-C at once; on
        several hosts, on all of them, after one of the next TOGETHER events.
    """
    good = {n: request for n, request in enumerate(requests) if isinstance(request, Request)}
    numbers = list(good)
    printer = _printer(engine, asked, requests, style)
    answers = sum(request.options.n for request in good.values())
    live = sys.stderr.isatty() and not sys.stdout.isatty()
    rates = Rates(answers, lambda: start_up.end("prefill"), live)
    cached, answered = 0, True
    with interruptions() as stopped, Stop(stopped) as stop:
        stop.soon(_print_refused, printer, asked, requests)
        for event in engine.run(good.values()):
            number = numbers[event.request]
            if event.answer is not None:
                cached += event.answer.cached_tokens
                event.answer.request_name, event.answer.id = asked[number].name, asked[number].id
                if event.answer.error is not None:
                    answered = False
                    event.answer.error = _named(event.answer.error, asked[number], style)
                    say_aside(f"error: {event.answer.error}")
            rates.take(event)
            stop.soon(printer.take, event._replace(request=number))
            stop.after_event()
    say_aside(rates.report(sum(len(r.tokens) * r.options.n for r in good.values()), cached))
    say_aside(start_up.report(rates.made))
    return answered


def _printer(
    engine: Engine, asked: Sequence[Asked], requests: Sequence[Request | Refused], style: Style
) -> InOrder:
    prompts = _shown(asked, requests)
    if style.jsonl:
        return Json(prompts)
    if style.show_routing is None:
        return Text(prompts)
    layer, tokenizer = style.show_routing, engine.tokenizer
    say_aside(f"experts of layer {layer}: {legend(engine.config.num_local_experts)}")

    def paint(number: int, answer: Answer) -> str:
        prompt = requests[number]
        tokens = [*prompt.tokens, *answer.tokens]
        shown = pieces(tokenizer, tokens)
        if isinstance(answer.stop, str):  # the tokens go on with it
            own = shown[len(prompt.tokens) :]
            whole = own if prompt.goes_on else pieces(tokenizer, answer.tokens)
            unseen = len("".join(whole)) - len(answer.text)
            shown = cut(shown, len("".join(shown)) - unseen)
        return painted(shown, engine.experts(tokens, layer)[:, 0])

    return Text(prompts, paint)


def _print_refused(
    printer: InOrder, asked: Sequence[Asked], requests: Sequence[Request | Refused]
) -> None:
    for number, (one, refused) in enumerate(zip(asked, requests, strict=True)):
        if isinstance(refused, Refused):
            told = {"error": refused.reason, "prompt_tokens": refused.tokens}
            answer = Answer(one.name, one.id, 0, _text_of(one), "", [], "error", **told)
            printer.take(Event(number, 0, "", None, None, answer))


def _shown(asked: Sequence[Asked], requests: Sequence[Request | Refused]) -> list[Shown]:
    return [
        Shown(_text_of(one), one.options.n if isinstance(request, Request) else 1, one.options.echo)
        for one, request in zip(asked, requests, strict=True)
    ]


def _text_of(asked: Asked) -> str:
    if asked.text is not None:
        return asked.text
    said = [message for message in asked.messages or [] if message["role"] == "user"]
    return read_conversation(said[-1:]).turns[0].text if said else ""


# ---- checkpoints -------------------------------------------------------------------------------


class Deployed(NamedTuple):
    """A checkpoint that fits its deployment, whose weights are still to be read."""

    tokenizer: Tokenizer
    config: ModelConfig
    start: Callable[[Serving], Engine]
    """Reads the weights."""
    start_up: StartUp
    path: pathlib.Path

    def context(self, serving: Serving) -> int:
        """Most tokens of a prompt and its answer: what is asked for, or the model's own.

        Raises:
          InputError: if more is asked for than the model has.
        """
        most = self.config.max_position_embeddings
        if serving.context is not None and serving.context > most:
            raise InputError(
                f"context={serving.context} is more than the model's, which is {most}: leave it out"
            )
        return serving.context or most


def deploy(checkpoint: str | pathlib.Path, deployment: Deployment) -> Deployed:
    """Start JAX for a deployment's mesh and look at a checkpoint that is to run there.

    Raises:
      InputError: if there is none, or it does not fit.
    """
    start_up = StartUp()
    recognise(checkpoint)  # before JAX starts, which takes a while
    sharding.start(deployment.mesh)
    with hosts.together():
        found = open_checkpoint(checkpoint)
        config, tokenizer = model_config(found.config, deployment), found.tokenizer
        if tokenizer is None:
            raise InputError(
                f"checkpoint {found.path} has no tokenizer: it was trained on synthetic data, or "
                "its folder lacks tokenizer.model"
            )
    mesh = sharding.mesh_from_config(deployment.mesh)
    with jax.set_mesh(mesh):
        chosen_kernels(config, sharding.batch_shards(), 1)  # refuses what cannot run here
        if config.grouped_matmul and platform() == "cpu":
            raise InputError(
                f"model.grouped_matmul={config.grouped_matmul} does not matter on cpu, where "
                "sampling has each expert's matrices apart: leave it out"
            )
    start_up.end("checkpoint and devices")

    def start(serving: Serving) -> Engine:
        engine = Engine(
            found.load(config, mesh, serving.weights == "int8"),
            tokenizer,
            rows=serving.rows,
            context=serving.context,
            part=serving.part,
            cache_dtype=serving.cache_dtype,
            consume=True,
        )
        place = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
        kind = " in int8" if serving.weights else ""
        say_aside(f"checkpoint {found.path}, {config.num_parameters:,} parameters{kind} on {place}")
        if engine.rows < (serving.rows or 0):
            say_aside(
                f"answers in progress: {engine.rows}, as memory does not hold the cache of "
                f"{serving.rows}; the others wait"
            )
        start_up.end("weights")
        return engine

    return Deployed(tokenizer, config, start, start_up, found.path)


def model_config(trained: ModelConfig, deployment: Deployment) -> ModelConfig:
    """A checkpoint's config for sampling: where the deployment says, and no token is ever dropped.

    Raises:
      InputError: if a size does not split over the deployment's mesh.
    """
    kernels = {"exchange": deployment.exchange, "grouped_matmul": deployment.grouped_matmul}
    config = dataclasses.replace(trained.dropless(), **kernels)
    if deployment.compute_dtype is not None:
        config = dataclasses.replace(config, compute_dtype=deployment.compute_dtype)
    check_mesh(config, deployment.mesh)
    return config
