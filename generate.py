"""Sample from a checkpoint: python generate.py --checkpoint runs/NAME --prompt TEXT

On standard output, one prompt gives its answer as it is made; a file of prompts gives, for each in
turn, a line of `> ` and the prompt, then the answer, then an empty line. Everything else, timings
included, goes to standard error.

With --chat, each prompt is a message of a user's, in the template of the checkpoint's tokenizer.
Without a prompt there is a conversation: a message a line on standard input, up to its end; /new
begins anew, with an empty history; Ctrl-C stops an answer. The history is never cut: a message that
the context has no room for is not answered, which ends the program unless it reads from a terminal.

With --compile-only v5p:2x2x1 nothing is generated: the programs of a config's model (--config) are
compiled for that TPU slice, which need not be there, and a report says what they take.
"""

import argparse
import os
import sys

from mixtral_jax.command_line import Parser, report, with_huge_pages
from mixtral_jax.config import InputError
from mixtral_jax.generation import request


def make_parser() -> Parser:
    parser = Parser(__doc__)
    default = request.Options()

    def option(name, metavar, kind, help):
        value = getattr(default, name.replace("-", "_"))
        help = f"{help} (default {value})"
        parser.add_argument(f"--{name}", metavar=metavar, type=kind, default=value, help=help)

    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", metavar="DIR", help="a run folder, or one of its steps")
    model.add_argument("--config", metavar="FILE", help="a model's sizes; with --compile-only")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", metavar="TEXT", help="what to go on from; may be empty")
    prompts.add_argument("--prompt-file", metavar="FILE", help="prompts, one a line")
    add("--chat", action="store_true", help="prompts are messages; without one, converse")
    add("--system", metavar="TEXT", help="what a conversation is told first; with --chat")
    option("max-new-tokens", "N", int, "most tokens to make")
    option("temperature", "T", float, "0 is greedy; above 1 is wilder than the model")
    option("top-k", "K", int, "choose from the K most likely tokens; 0 is all")
    option("top-p", "P", float, "choose from the fewest tokens that make up P; 1 is all")
    option("seed", "S", int, "the same seed gives the same answer, in any batch")
    place = "where to compute: mesh.expert=4, model.exchange=padded, model.compute_dtype=float32"
    add("overrides", nargs="*", metavar="section.key=value", help=place)
    only = parser.add_argument_group("compile reports")
    only.add_argument("--compile-only", metavar="SLICE", help="compile for a TPU slice, and stop")
    only.add_argument("--slices", metavar="N", type=int, default=1, help="that many of them")
    only.add_argument("--sequences", metavar="B", type=int, help="prompts in the batch")
    only.add_argument("--prompt-length", metavar="L", type=int, default=1024, help="their tokens")
    only.add_argument("--report", metavar="FILE", default="", help="the report, as JSON")
    return parser


def compile_only(arguments: argparse.Namespace) -> int:
    """Report on prefill and decode of a config's model, by default of a prompt for each share."""
    if arguments.config is None or arguments.compile_only is None:
        raise InputError("--compile-only SLICE and --config FILE belong together")
    from mixtral_jax.analysis import generation_report  # only now: it loads JAX

    config = generation_report.read_config(arguments.config, arguments.overrides)
    sequences = arguments.sequences
    if sequences is None:
        sequences = config.mesh.batch_shards
    batch = generation_report.Batch(sequences, arguments.prompt_length, arguments.max_new_tokens)
    name, path, slices = arguments.compile_only, arguments.report, arguments.slices
    return generation_report.run(config, name, batch, path, slices)


def read_prompts(arguments: argparse.Namespace) -> list[str] | None:
    """The prompts, or None for a conversation."""
    if arguments.system is not None and not arguments.chat:
        raise InputError("--system begins a conversation: add --chat")
    if arguments.prompt is not None:
        return [arguments.prompt]
    if arguments.prompt_file is not None:
        return request.read_prompts(arguments.prompt_file)
    if not arguments.chat:
        raise InputError("one of the arguments --prompt --prompt-file is required, or --chat")
    return None


def main(argv: list[str] | None = None) -> int:
    try:
        arguments = make_parser().parse_intermixed_args(argv)
        if arguments.compile_only is not None or arguments.config is not None:
            return compile_only(arguments)
        if arguments.report:
            raise InputError(f"--report {arguments.report} needs --compile-only SLICE")
        options = request.Options(
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
        )
        deployment = request.deployment_from_overrides(arguments.overrides)
        prompts = read_prompts(arguments)
        from mixtral_jax.generation import chat, command  # only now: they load JAX

        if arguments.chat:
            system = arguments.system or ""
            chat.run(arguments.checkpoint, prompts, system, options, deployment)
        else:
            command.run(arguments.checkpoint, prompts, options, deployment)
    except InputError as error:
        return report(error)
    except BrokenPipeError:  # whoever read the answer has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    with_huge_pages()
    sys.stdout.reconfigure(errors="replace")  # a model may say what the terminal cannot
    sys.exit(main())
