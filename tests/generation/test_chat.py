"""generate.py --chat: prompts as messages, and conversations."""

import dataclasses
import io
import json
import os
import re
import signal
import sys

import jax
import pytest
from tiny import MODEL

import generate
from mixtral_jax import hosts, sharding
from mixtral_jax.config import InputError
from mixtral_jax.data.chat import encode_chat
from mixtral_jax.data.tokenizer import Tokenizer
from mixtral_jax.generation import chat as chats
from mixtral_jax.generation import command, prompts
from mixtral_jax.generation.answering import Task
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.prompts import Asked
from mixtral_jax.generation.request import Deployment, Options, Request, Serving
from mixtral_jax.interop.models import open_checkpoint

OPTIONS = Options(7, temperature=0.0)
GREEDY = ["--temperature", "0", "--max-new-tokens", "7", "--chat"]
SYSTEM = "Be brief."


def user(text):
    return prompts.message("user", text)


def assistant(text):
    return prompts.message("assistant", text)


@pytest.fixture(scope="module")
def v3():
    pytest.importorskip("mistral_common")
    return Tokenizer.from_name_or_file("mistral-v3")


@pytest.fixture(scope="module")
def v3_run(tmp_path_factory, save_run, v3):
    sizes = {"vocab_size": v3.vocab_size, "hidden_size": 8, "num_hidden_layers": 1}
    return save_run(tmp_path_factory.mktemp("v3"), {1: v3}, **sizes)


@pytest.fixture(scope="module", params=["v1", "v3"])
def checkpoint(request):
    """A run whose tokenizer has the template of one version, and ask(messages): its answer."""
    folder = request.getfixturevalue({"v1": "run", "v3": "v3_run"}[request.param])
    found, mesh = open_checkpoint(folder), sharding.make_mesh()
    config = command.model_config(found.config, Deployment())
    engine = Engine(found.load(config, mesh), found.tokenizer)
    assert found.tokenizer.version == request.param

    def ask(*messages):
        ids = encode_chat(found.tokenizer, messages)
        ((answer,),) = engine.generate([Request(tuple(ids), OPTIONS, goes_on=False)])
        return answer.text

    return str(folder), ask


def typed(monkeypatch, text):
    """Standard input that is not a terminal."""
    data = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# ---- with a model ------------------------------------------------------------------------------


def test_prompts_are_messages(checkpoint, main, capsys, tmp_path):
    folder, ask = checkpoint
    assert main(["--checkpoint", folder, *GREEDY, "--prompt", "words"]) == 0
    assert capsys.readouterr().out == ask(user("words")) + "\n"
    path = tmp_path / "prompts.txt"
    path.write_text("words\nin é\n", encoding="utf-8")
    told = ["--prompt-file", str(path), "--system", SYSTEM]
    assert main(["--checkpoint", folder, *GREEDY, *told]) == 0
    system = prompts.message("system", SYSTEM)
    answers = [ask(system, user("words")), ask(system, user("in é"))]
    expected = f"> words\n{answers[0]}\n\n> in é\n{answers[1]}\n\n"
    assert capsys.readouterr().out == expected
    lines = [{"messages": [user("words")]}, {"messages": [system, user("in é")]}]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert main(["--checkpoint", folder, *GREEDY, *told, "--jsonl", "--format", "jsonl"]) == 0
    made = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["text"] for line in made] == answers


def test_an_answer_that_was_begun_keeps_its_space_and_an_echo_has_all_parts(
    v3, v3_run, main, capsys, tmp_path
):
    parts = [{"type": "text", "text": "How"}, {"type": "text", "text": "so?"}]
    begun = {**assistant("It"), "prefix": True}
    asked = {"messages": [{"role": "user", "content": parts}, begun], "echo": True}
    is_id = v3.encode("It is")[-1]
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({**asked, "logit_bias": {str(is_id): 100}, "max_new_tokens": 1}))
    arguments = ["--checkpoint", str(v3_run), "--prompt-file", str(path), "--temperature", "0"]
    assert main([*arguments, "--format", "jsonl"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "How\n\nso? is"


def test_a_conversation_keeps_its_history(checkpoint, main, capsys, monkeypatch):
    folder, ask = checkpoint
    typed(monkeypatch, "a\n\nb\r\n/new\nb")
    assert main(["--checkpoint", folder, *GREEDY]) == 0
    first, alone = ask(user("a")), ask(user("b"))
    assert first
    second = ask(user("a"), assistant(first), user("b"))
    out, err = capsys.readouterr()
    assert out == f"{first}\n{second}\n{alone}\n"
    assert ">" not in err  # a marker is for terminals
    assert "a new conversation\n" in err


def test_a_conversation_from_a_pipe_ends_where_the_context_does(run, main, capsys, monkeypatch):
    typed(monkeypatch, "a\nb\nc\nd\n")
    assert main(["--checkpoint", str(run), *GREEDY]) == 2
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    said = r"the conversation has \d+ tokens, BOS included, and with max_new_tokens=7 goes beyond"
    assert re.fullmatch(
        f"error: {said} the context of 64: begin anew with /new", err.splitlines()[-1]
    )


BAD = {
    "system": (["--prompt", "a", "--system", "b"], "--system begins a conversation: add --chat"),
    "text": ([*GREEDY, "--prompt", "a\udcff"], "text is not Unicode at character"),
    "system text": ([*GREEDY, "--system", "a\udcff"], "text is not Unicode at character"),
    "long": ([*GREEDY, "--prompt", "#" * 60], "prompt 1 has .* context of 64"),
    "no room": (
        ["--chat", "--max-new-tokens", "60"],
        r"the conversation has \d+ tokens, .* goes beyond the context of 64: use max_new_tokens=\d",
    ),
    "context": ([*GREEDY, "--context", "18"], "the context of 18: use max_new_tokens=2 or less"),
    "biased": ([*GREEDY, "--logit-bias", "999=1"], r"the conversation: .* 999 is not in 0\.\.299"),
    "two": ([*GREEDY, "--prompt", "a", "--prompt-file", "b"], "not allowed with argument"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, run, refused):
    refused(["--checkpoint", str(run), *BAD[case][0]], BAD[case][1])


def test_a_conversation_needs_one_process(run, refused, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(hosts, "gather", lambda text: [text] * 4)
    refused(
        ["--checkpoint", str(run), *GREEDY, "mesh.data=2", "mesh.expert=4"],
        "one of 4 processes: give --prompt or --prompt-f",
    )


def test_arguments_reach_the_command(monkeypatch):
    got = []
    monkeypatch.setattr(chats, "run", lambda *arguments: got.append(arguments))
    monkeypatch.setattr(command, "run", lambda *arguments: got.append(arguments) or 0)
    here = ["--checkpoint", "here", "--chat"]
    assert generate.main(here) == 0
    assert generate.main([*here, "--system", SYSTEM, "--prompt", ""]) == 0
    assert got[0] == ("here", "", Options(), Deployment(), Serving())
    asked = [Asked("prompt 1", "", None, Options(), None, 1)]
    style = command.Style(chat=True, system=SYSTEM)
    assert got[1] == ("here", asked, style, Deployment(), Serving())


# ---- conversations with an engine that says what it is told --------------------------------------


class Scripted:
    """An engine whose answers are given; a callable among the tokens is called in its place."""

    def __init__(self, tokenizer, *answers):
        self.answers = list(answers)
        self.tokenizer = tokenizer
        self.requests = []

    def stream(self, request):
        self.requests.append(request)
        return self._events(request, self.answers.pop(0))

    def _events(self, request, tokens):
        request = dataclasses.replace(request, options=Options(99))
        task = Task.begin(0, 0, request, self.tokenizer, self.tokenizer.eos_id)
        for token in tokens:
            if callable(token):
                token()
            else:
                yield task.push(token, None)
        if task.answer is None:
            yield task.end("stop", None)


def conversation(tokenizer, *answers, system="", context=MODEL.max_position_embeddings):
    engine = Scripted(tokenizer, *answers)
    return chats.Chat(engine, tokenizer, system, OPTIONS, context)


def asked(chat):
    """The ids that its engine has been given, request by request."""
    return [list(request.tokens) for request in chat._engine.requests]


def converse(chat, text, terminal=False):
    data = text if isinstance(text, bytes) else text.encode()
    chats.converse(chat, io.BytesIO(data), terminal)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_history_is_what_the_model_has_said(v3, capsys):
    """An answer's ids come again in the next request: its text begins with no space of its own."""
    chat = conversation(v3, v3.encode("Hi there"), v3.encode("日本 👩"), system=SYSTEM)
    converse(chat, "Hello\nBye\n")
    assert capsys.readouterr().out == "Hi there\n日本 👩\n"
    first, second = asked(chat)
    assert first == encode_chat(v3, [prompts.message("system", SYSTEM), user("Hello")])
    assert second[:8] == [1, 3, 23325, 4, 16127, 1504, 2, 3]
    assert chat.messages[1:] == [
        user("Hello"),
        assistant("Hi there"),
        user("Bye"),
        assistant("日本 👩"),
    ]


def test_an_answer_is_shown_as_it_comes(v3):
    chat = conversation(v3, v3.encode("né 𓀀!"))
    parts = []
    assert chat.reply("a", parts.append, lambda: False) == "né 𓀀!"
    assert [part for part in parts if part] == ["né", " ", "𓀀", "!"]


def test_ctrl_c_stops_the_answer_alone(v3, capsys):
    ids = v3.encode("one two three four")
    before = signal.getsignal(signal.SIGINT)
    chat = conversation(v3, [*ids[:2], interrupt, *ids[2:]], v3.encode("Five"))
    converse(chat, "count\ngo on\n", terminal=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out == "one two three\nFive\n"
    assert chat.messages == [
        user("count"),
        assistant("one two three"),
        user("go on"),
        assistant("Five"),
    ]


def test_the_second_ctrl_c_ends_the_program(v3):
    before = signal.getsignal(signal.SIGINT)
    chat = conversation(v3, [interrupt, interrupt, 2])
    with pytest.raises(KeyboardInterrupt):
        converse(chat, "a\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_empty_answer_joins_the_messages_around_it(v3, capsys):
    chat = conversation(v3, [], [v3.control_id("[TOOL_CALLS]")], v3.encode("A"))
    converse(chat, "a\nb\nc\n")
    out, err = capsys.readouterr()
    assert out == "\n\nA\n"
    assert err.count("the answer is empty: the next message is joined to this one\n") == 2
    assert asked(chat)[2] == encode_chat(v3, [user("a\n\nb\n\nc")])


def test_what_cannot_be_answered_leaves_the_history_alone_on_a_terminal(v3, capsys):
    chat = conversation(v3, v3.encode("A"), v3.encode("B"), v3.encode("C"), context=16)
    said = b"a\n" + b"b " * 9 + b"\n\xff\nb\n/new\n" + b"c " * 9 + b"\n" + b"d " * 20 + b"\nc\n"
    converse(chat, said, terminal=True)
    out, err = capsys.readouterr()
    assert out == "A\nB\nC\n"
    told = [line for line in err.replace("> ", "").splitlines() if line.startswith("not answered")]
    beyond = "goes beyond the context of 16"
    assert told[0].endswith(f"with max_new_tokens=7 {beyond}: begin anew with /new")
    assert told[1] == "not answered: line 3 of standard input is not UTF-8"
    assert told[2].endswith(f"{beyond}: use max_new_tokens=3 or less")
    assert told[3].endswith(f"{beyond}: shorten it")
    assert len(told) == 4
    assert chat.messages == [user("c"), assistant("C")]
    assert err.startswith(chats.HELP)
    assert err.count("> ") == 9  # a marker before each line, and before the end


def test_a_message_may_have_several_lines(v3):
    chat = conversation(v3, v3.encode("A"), v3.encode("B"), v3.encode("C"))
    converse(chat, 'a\n"""b\n\nc"""\n"""\n d\ne\n"""\n')
    said = [message["content"] for message in chat.messages if message["role"] == "user"]
    assert said == ["a", "b\n\nc", " d\ne"]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (b'"""a\nb\n', 'line 2: the message has no closing """'),
        (b'"""a\n\xff\n"""\n', "line 2 of standard input is not UTF-8"),
        (b'"""a\nb""" c\n', 'line 2: text follows the closing """'),
        (b'"""a""" b\n', 'line 1: text follows the closing """'),
    ],
)
def test_a_message_of_several_lines_that_is_none(v3, text, wrong):
    chat = conversation(v3)
    with pytest.raises(InputError, match=wrong):
        converse(chat, text)
    assert chat.messages == []


def test_a_conversation_begins_anew_with_another_system_prompt(v3, capsys):
    chat = conversation(v3, *map(v3.encode, "ABCD"), system=SYSTEM)
    converse(chat, "a\n/system  Be long.\nb\n/new\nc\n/system \nd\n")
    assert asked(chat)[1] == encode_chat(v3, [prompts.message("system", "Be long."), user("b")])
    assert asked(chat)[2] == encode_chat(v3, [prompts.message("system", "Be long."), user("c")])
    assert asked(chat)[3] == encode_chat(v3, [user("d")])
    err = capsys.readouterr().err
    assert "a new conversation, with a new system prompt\n" in err
    assert "a new conversation, without a system prompt\n" in err


def test_quoted_text_is_no_command_and_any_blank_follows_one(v3):
    chat = conversation(v3, *map(v3.encode, "ABC"))
    converse(chat, 'a\n"""/new"""\n""" """\n/system\tBe brief. \n"""\n/system b\n"""\n')
    first, *_ = prompts.opening("Be brief.")
    said = ["a", "/new"]
    assert asked(chat)[1] == encode_chat(v3, [user("a"), assistant("A"), user(said[1])])
    assert chat.messages == [first, user("/system b"), assistant("C")]


def test_a_conversation_wants_standard_input(run, refused, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    refused(["--checkpoint", str(run), *GREEDY], "standard input, .* is closed: give --prompt")


def test_what_cannot_be_answered_ends_a_conversation_from_a_pipe(v3, capsys):
    chat = conversation(v3, v3.encode("A"))
    with pytest.raises(InputError, match="line 2 of standard input is not UTF-8"):
        converse(chat, b"\xef\xbb\xbfa\n\xff\nb\n")
    assert capsys.readouterr().out == "A\n"
    assert chat.messages[0] == user("a")  # without the mark of its encoding
