"""Sample from a checkpoint: python generate.py --checkpoint runs/NAME --prompt TEXT

Answers go to standard output, all else (timings, progress, mistakes) to standard error. One answer
is printed as it is made; of several each has a line of `> ` and its prompt in front and an empty
line behind, in the order of the prompts. --format jsonl prints an object a line instead, with
tokens, log-probabilities and why the answer ended.

Prompts come from --prompt, or from --prompt-file (`-` is standard input): a text, one prompt a
line, or with --jsonl, or a name that ends in .jsonl, one object a line, {"prompt": "...",
"max_new_tokens": 20, "stop": ["\\n"]}, with any of the options below in place of the command's. A
bad line of JSON is named; the others are answered, and the exit code is 1.

With --chat, each prompt is a message of a user's, in the template of the checkpoint's tokenizer.
Without a prompt there is a conversation: a message a line on standard input, or several lines
between \"\"\" and \"\"\"; /new begins anew, with an empty history, /system TEXT with another system
prompt too; Ctrl-C stops an answer. The history is never cut: a message that the context has no room
for is not answered, which ends the program unless it reads from a terminal.

--score makes nothing: it tells the perplexity of the prompts.

With --compile-only v5p:2x2x1 nothing is generated: the programs of a config's model (--config) are
compiled for that TPU slice, which need not be there, and a report says what they take; for h200:1,
one of NVIDIA's GPUs, what they take of its memory.
"""

import argparse
import dataclasses
import io
import sys
from collections.abc import Iterable

try:
    from mixtral_jax.command_line import OutputError, Parser, report, unwritten, with_huge_pages
except ModuleNotFoundError as error:  # this Python is not that of the environment
    sys.exit(f"error: {error}")
from mixtral_jax.config import InputError
from mixtral_jax.generation import prompts, request

ONLY_COMPILED = ("report", "sequences", "slices", "prompt_length")
SERVED = ("part", "weights", "cache_dtype")
MADE = (
    *("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "n", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
    *("stop", "stop_token_id"),
)
"""What goes for the tokens that are made, of which --score has none."""
COMPILED = {"config", "overrides", "compile_only", "max_new_tokens", *SERVED, *ONLY_COMPILED}
"""What --compile-only reads."""


def make_parser() -> Parser:
    parser = Parser(__doc__)
    default = request.Options()

    def option(name, metavar, kind, help):
        value = getattr(default, name.replace("-", "_"))
        help = f"{help} (default {value})"
        add(f"--{name}", metavar=metavar, type=kind, default=value, help=help)

    model = parser.add_mutually_exclusive_group(required=True)
    help = "a run folder, one of its steps, or released weights"
    model.add_argument("--checkpoint", metavar="DIR", help=help)
    model.add_argument("--config", metavar="FILE", help="a model's sizes; with --compile-only")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="what to go on from; may be empty")
    given.add_argument("--prompt-file", metavar="FILE", help="prompts, one a line, or .jsonl")
    parser.add_argument(
        "--jsonl", action="store_true", help="--prompt-file has lines of JSON, whatever its name"
    )
    help = "prompts are a user's messages; without --prompt or --prompt-file, a conversation"
    parser.add_argument("--chat", action="store_true", help=help)
    parser.add_argument("--system", metavar="TEXT", help="with --chat: told first")

    add = parser.add_argument_group("sampling").add_argument
    option("max-new-tokens", "N", int, "most tokens to make")
    option("min-new-tokens", "N", int, "tokens to make before the answer may end")
    option("temperature", "T", float, "0 is greedy; above 1 is wilder than the model")
    option("top-k", "K", int, "choose from the K most likely tokens; 0 is all")
    option("top-p", "P", float, "choose from the fewest tokens that make up P; 1 is all")
    option("min-p", "P", float, "choose from tokens P times as likely as the likeliest; 0 is all")
    option("repetition-penalty", "R", float, "above 1: less of what prompt and answer have")
    option("presence-penalty", "R", float, "above 0: less of what the answer has")
    option("frequency-penalty", "R", float, "above 0: less of what it has, for each time")
    add("--logit-bias", metavar="ID=B", action="append", help="added to a logit; repeatable")
    add("--stop", metavar="TEXT", action="append", help="ends an answer, unseen; repeatable")
    add("--stop-token-id", metavar="ID", type=int, action="append", help="the same; repeatable")
    option("n", "N", int, "answers to each prompt")
    option("seed", "S", int, "the same seed gives the same answer, in any batch")

    add = parser.add_argument_group("what is told").add_argument
    add("--format", choices=["text", "jsonl"], default="text", help="of the answers")
    add("--echo", action="store_true", help="the prompt in front of its answer")
    add("--logprobs", metavar="N", type=int, help="with jsonl: log-probabilities, N likeliest")
    add("--prompt-logprobs", metavar="N", type=int, help="the same of the prompt; its perplexity")
    add("--score", action="store_true", help="only the prompt's perplexity")
    add("--show-routing", metavar="LAYER", type=int, help="colour tokens by a layer's experts")

    serving = request.Serving()
    add = parser.add_argument_group("memory and speed").add_argument
    help = "most answers in progress at a time (default: as many as answers, at most 64)"
    add("--rows", metavar="N", type=int, help=help)
    help = "most tokens of a prompt and its answer (default: what the prompts need)"
    add("--context", metavar="N", type=int, help=help)
    help = f"most tokens of a prompt between two steps of the others (default {serving.part})"
    add("--part", metavar="N", type=int, default=serving.part, help=help)
    add("--cache-dtype", metavar="TYPE", help="int8: the cache takes half of bfloat16's memory")
    add("--weights", metavar="TYPE", help="int8: the matrices take half of bfloat16's memory")
    place = "where to compute: mesh.expert=4, model.exchange=padded, model.compute_dtype=float32"
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=place)
    only = parser.add_argument_group("compile reports")
    only.add_argument("--compile-only", metavar="SLICE", help="compile for it, and stop")
    only.add_argument("--slices", metavar="N", type=int, default=1, help="that many of them")
    only.add_argument("--sequences", metavar="B", type=int, help="prompts in the batch")
    only.add_argument("--prompt-length", metavar="L", type=int, default=1024, help="their tokens")
    only.add_argument("--report", metavar="FILE", default="", help="the report, as JSON")
    return parser


def compile_only(arguments: argparse.Namespace) -> int:
    """Report on prefill and decode of a config's model, by default of a prompt for each share."""
    if arguments.config is None or arguments.compile_only is None:
        raise InputError("--compile-only SLICE and --config FILE belong together")
    if other := asked_for(arguments, vars(arguments).keys() - COMPILED):
        raise InputError(f"with --compile-only nothing is generated: leave out {', '.join(other)}")
    served = {name: getattr(arguments, name) for name in SERVED}
    request.Serving(**served)  # checks them
    from mixtral_jax.analysis import generation_report  # only now: it loads JAX

    config = generation_report.read_config(arguments.config, arguments.overrides)
    sequences = arguments.sequences
    if sequences is None:
        sequences = config.mesh.batch_shards
    asked = (sequences, arguments.prompt_length, arguments.max_new_tokens)
    batch = generation_report.Batch(*asked, **served)
    name, path, slices = arguments.compile_only, arguments.report, arguments.slices
    return generation_report.run(config, name, batch, path, slices)


def asked_for(arguments: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """The options among these that have other values than their defaults, as they are written."""
    parser, asked = make_parser(), []
    for name in sorted(names):
        value = getattr(arguments, name)
        if value != parser.get_default(name):
            values = value if isinstance(value, list) else [value]
            shown = [] if value is True else map(str, values)
            asked.append(" ".join([f"--{name.replace('_', '-')}", *shown]))
    return asked


def options_of(arguments: argparse.Namespace) -> request.Options:
    """What is asked of every prompt that does not say otherwise."""
    names = {field.name for field in dataclasses.fields(request.Options)}
    values = {name: value for name, value in vars(arguments).items() if name in names}
    values["stop"] = tuple(arguments.stop or ())
    values["stop_token_ids"] = tuple(arguments.stop_token_id or ())
    values["logit_bias"] = tuple(map(bias, arguments.logit_bias or ()))
    options = request.Options(**values)
    if arguments.score and (made := asked_for(arguments, MADE)):
        raise InputError(f"--score makes nothing: leave out {', '.join(made)}")
    return options


def scoring(options: request.Options) -> request.Options:
    """The same without anything made."""
    told = options.prompt_logprobs or 0
    nothing = {"max_new_tokens": 0, "min_new_tokens": 0, "n": 1, "logprobs": None}
    return dataclasses.replace(options, **nothing, prompt_logprobs=told)


def bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise InputError(f"--logit-bias {text} must look like ID=VALUE, such as 123=-5") from None


def read_prompts(
    arguments: argparse.Namespace, options: request.Options
) -> list[prompts.Asked] | None:
    """The prompts, or None for a conversation."""
    if arguments.system is not None and not arguments.chat:
        raise InputError("--system begins a conversation: add --chat")
    if arguments.jsonl and arguments.prompt_file is None:
        raise InputError(
            "--jsonl says that --prompt-file has lines of JSON: add --prompt-file FILE"
        )
    if arguments.prompt is not None:
        return [prompts.Asked("prompt 1", arguments.prompt, None, options, None, 1)]
    if arguments.prompt_file == prompts.STANDARD_INPUT:
        from mixtral_jax import sharding  # only now: it loads JAX

        if sharding.one_of_several():
            raise InputError(
                "--prompt-file -: each of several processes has a standard input of its own: name "
                "a file that all of them see"
            )
    if arguments.prompt_file is not None:
        return prompts.read(arguments.prompt_file, options, arguments.jsonl)
    if not arguments.chat:
        raise InputError("one of the arguments --prompt --prompt-file is required, or --chat")
    return None


def check_shown(
    arguments: argparse.Namespace, options: request.Options, asked: list[prompts.Asked] | None
) -> None:
    """Refuse what cannot be shown as it is asked for."""
    text = arguments.format == "text"
    if asked is None:
        told = (options.logprobs, options.prompt_logprobs, arguments.show_routing)
        if not text or any(value is not None for value in told):
            raise InputError("a conversation is text: give --prompt or --prompt-file")
        if options.n > 1:
            raise InputError(f"n={options.n}: a conversation has one answer to each message")
        if options.echo:
            raise InputError("--echo: a conversation shows what is asked already")
    if text and any(one.options.logprobs is not None for one in asked or ()):
        raise InputError("log-probabilities have no place in text: add --format jsonl")
    if not text and arguments.show_routing is not None:
        raise InputError("--show-routing colours text: leave out --format jsonl")


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = make_parser().parse_intermixed_args(argv)
        if arguments.compile_only is not None or arguments.config is not None:
            return compile_only(arguments)
        if only := asked_for(arguments, ONLY_COMPILED):
            raise InputError(f"{only[0]} needs --compile-only SLICE")
        if sys.stdout is None:
            raise OutputError("standard output cannot be written: it is closed")
        options = options_of(arguments)
        deployment = request.deployment_from_overrides(arguments.overrides)
        serving = request.Serving(
            arguments.rows,
            arguments.context,
            arguments.part,
            arguments.cache_dtype,
            arguments.weights,
        )
        asked = read_prompts(arguments, options)
        if arguments.score:
            options = scoring(options)
            asked = asked and [one._replace(options=scoring(one.options)) for one in asked]
        check_shown(arguments, options, asked)
        if arguments.format == "jsonl" and isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as JSON is, whatever the terminal knows
        from mixtral_jax.generation import chat, command  # only now: they load JAX

        system = arguments.system or ""
        if asked is None:
            chat.run(arguments.checkpoint, system, options, deployment, serving)
            return 0
        lines = prompts.is_jsonl(arguments.prompt_file or "", arguments.jsonl)
        style = command.Style(
            jsonl=arguments.format == "jsonl",
            source=prompts.name_of(arguments.prompt_file) if lines else "",
            strict=not lines,
            chat=arguments.chat,
            system=system,
            show_routing=arguments.show_routing,
        )
        return command.run(arguments.checkpoint, asked, style, deployment, serving)
    except InputError as error:
        return report(error)
    except (OutputError, BrokenPipeError) as error:
        return unwritten(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    with_huge_pages()
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal cannot
    sys.exit(main())
