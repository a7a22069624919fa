"""Files of prompts and of requests: what they ask, and what is said of those that are malformed."""

import io
import json
import re
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.config import InputError
from mixtral_jax.generation.prompts import LONGEST_LINE, Asked, read, read_jsonl, read_text
from mixtral_jax.generation.request import Options

DEFAULT = Options(9, temperature=0.25, stop=("a",))
USER = {"role": "user", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def standard_input(monkeypatch):
    """give(content): standard input holds these bytes."""

    def give(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))

    return give


# ---- text --------------------------------------------------------------------------------------

TEXTS = [
    (b"one\ntwo", ["one", "two"]),
    (b"one\r\n\r\n two \r\n", ["one", "", " two "]),
    (b"\xef\xbb\xbfa\x0bb\x1b[0m\xc2\x85c\x00\n", ["a\x0bb\x1b[0m\x85c\x00"]),
    (b"\n", [""]),
]


@pytest.mark.parametrize(("content", "prompts"), TEXTS)
def test_a_prompt_file_has_one_prompt_a_line(tmp_path, standard_input, content, prompts):
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert read_text(path) == prompts
    asked = [Asked(f"prompt {n}", t, None, DEFAULT, None, n) for n, t in enumerate(prompts, 1)]
    assert read(path, DEFAULT) == asked
    standard_input(content)
    assert read("-", DEFAULT) == asked


def test_unreadable_prompt_files_are_named(tmp_path, standard_input):
    path = tmp_path / "prompts.txt"
    with pytest.raises(InputError, match=r"prompts.txt cannot be read: No such file"):
        read_text(path)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_text(tmp_path)
    with pytest.raises(InputError, match=r"prompt file 'a\\x00b' cannot be read: .*null"):
        read_text("a\0b")
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"prompts.txt is empty"):
        read_text(path)
    path.write_bytes(b"fine\nfine\n\xff\n")
    with pytest.raises(InputError, match=r"prompts.txt line 3 is not UTF-8"):
        read_text(path)
    standard_input(b"")
    with pytest.raises(InputError, match=r"^standard input is empty: write one prompt a line$"):
        read_text("-")
    standard_input(b"fine\n\xff\n")
    with pytest.raises(InputError, match=r"^standard input line 2 is not UTF-8$"):
        read_text("-")


# ---- jsonl -------------------------------------------------------------------------------------


@pytest.fixture
def ask(tmp_path):
    """ask(content): what a .jsonl file of these bytes, or this text, asks."""

    def give(content):
        path = tmp_path / "asked.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_jsonl(path, DEFAULT)

    return give


CONTENT = b"""\xef\xbb\xbf{"prompt": "Once\\n", "max_new_tokens": 20, "stop": ["b", "c"]}\r
\r
 \t
{"id": "x", "messages": [%s], "logit_bias": {"12": -5}, "echo": true}
{"id": null, "prompt": "", "messages": null, "stop": []}
{"id": 7, "prompt": "\xe2\x82\xac\xe2\x80\xa8\\ud83d\\ude00\\u0000"}
{"messages": [%s], "tools": [%s]}""" % tuple(json.dumps(one).encode() for one in (USER, USER, TOOL))
REQUESTS = [
    Asked("line 1", "Once\n", None, Options(20, temperature=0.25, stop=("b", "c")), None, 1),
    Asked(
        *("line 4", None, [USER]),
        Options(9, temperature=0.25, stop=("a",), logit_bias=((12, -5),), echo=True),
        *(None, "x"),
    ),
    Asked("line 5", "", None, Options(9, temperature=0.25), None, 5),
    Asked("line 6", "\u20ac\u2028\U0001f600\0", None, DEFAULT, None, 7),
    Asked("line 7", None, [USER], DEFAULT, None, 7, [TOOL]),
]


def test_a_jsonl_file_has_one_request_a_line(ask, standard_input):
    assert ask(CONTENT) == ask(CONTENT + b"\n") == ask(CONTENT + b"\n\n") == REQUESTS
    standard_input(CONTENT)
    assert read_jsonl("-", DEFAULT) == REQUESTS


def test_the_suffix_chooses_or_an_argument(tmp_path, standard_input):
    for name, requests in [("a.jsonl", True), (".JSONL", True), ("a.json", False), ("a", False)]:
        path = tmp_path / name
        path.write_bytes(b'{"prompt": "b"}\n')
        for path_given in path, str(path):
            for jsonl in False, True:
                (asked,) = read(path_given, DEFAULT, jsonl)
                assert asked.text == ("b" if requests or jsonl else '{"prompt": "b"}')
    standard_input(CONTENT)
    assert read("-", DEFAULT, jsonl=True) == REQUESTS


# What is wrong, as the line that stands there, its values in JSON, or its messages.
LINES = {
    "text": (b"Once", "this line is not JSON: Expecting value at character 0; write an object"),
    "cut": (b'{"prompt": "a"', "this line is not JSON: .*; write an object in UTF-8"),
    "two": (b'{"prompt": "a"} {}', "this line is not JSON: Extra data"),
    "bytes": (b'{"prompt": "\xff"}', "this line is not UTF-8: byte 12 of it; write an object in"),
    "twice": (b'{"prompt": "a", "n": 2, "n": 3}', "this line: 'n' stands there twice; .* once"),
    "bias twice": (b'{"prompt": "", "logit_bias": {"1": 2, "1": 2}}', "'1' stands there twice"),
    "deep": (b'{"prompt": ' + b"[" * 10**5, "this line is JSON that is nested too deeply"),
    "digits": (b'{"prompt": ' + b"1" * 5000 + b"}", "a number with thousands of digits"),
    "long": (b" " * LONGEST_LINE + b"{}", "this line has 16777218 bytes: use at most 16777216"),
    "content deep": (
        b'{"messages": [{"role": "user", "content": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        "message 1: content=|nested too deeply",
    ),
}
VALUES = {
    "list": (["a"], "this line must be a JSON object, not list of 1; write an object"),
    "null": (None, "this line must be a JSON object, not None; write"),
    "neither": ({"n": 2}, "there is no prompt and no messages: write one, such as"),
    "nothing": ({}, "there is no prompt and no messages: write one, such as"),
    "both": ({"prompt": "", "messages": [USER]}, "both .*: leave one out$"),
    "number": ({"prompt": 5}, "prompt=5 must be text$"),
    "ids": ({"prompt": [1, 5]}, "prompt=list of 2 must be text$"),
    "half": ({"prompt": "a\ud83d"}, r"'a\\ud83d' holds half a surrogate pair: write whole"),
    "messages": ({"messages": "Hi"}, r"messages='Hi' must be a list, such as \[{"),
    "tools": ({"messages": [USER], "tools": TOOL}, r"tools=dict of 2 must be a list, such as \[{"),
    "tools half": ({"messages": [USER], "tools": ["\udc00"]}, "holds half a surrogate pair"),
    "tool": ({"messages": [USER], "tools": [5]}, "tool 1 must be a dict, not 5$"),
    "told": ({"prompt": "a", "tools": [TOOL]}, "tools belong to messages, and there is a prompt"),
    "id list": ({"id": [1], "prompt": "a"}, r"id=list of 1 must be text or a whole number$"),
    "id number": ({"id": 1.5, "prompt": "a"}, r"id=1.5 must be text or a whole number$"),
    "id bool": ({"id": True, "prompt": "a"}, r"id=True must be text or a whole number$"),
    "id half": ({"id": "\udc00", "prompt": "a"}, r"id='\\udc00' must be text or a whole"),
    "key": ({"promt": "a"}, "'promt' is no key of a request; did you mean prompt\\?$"),
    "option": ({"prompt": "a", "max_tokens": 2}, "did you mean max_new_tokens\\?$"),
    "value": ({"prompt": "a", "top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
    "nan": ({"prompt": "a", "top_p": float("nan")}, "top_p=nan must be above 0"),
    "type": ({"prompt": "a", "seed": "1"}, "seed='1' must be a whole number$"),
    "together": ({"prompt": "a", "min_new_tokens": 10}, "10 must be at most max_new_tokens=9$"),
}
CONVERSATIONS = {
    "no message": ([], "the conversation has no message: begin it"),
    "message": (["Hi"], "message 1 must be a dict, not 'Hi'$"),
    "role": ([{"role": "bot", "content": ""}], "message 1: role='bot' is not one"),
    "no role": ([{"content": ""}], "message 1: role=None is not one"),
    "content": ([{"role": "user"}], "message 1: content=None must be text"),
    "content long": (
        [{"role": "user", "content": ["x" * 10**6]}],
        r"message 1: content=\['xxx.* \.\.\. xx.* must be text",
    ),
    "content half": (
        [{"role": "user", "content": [{"type": "text", "text": "\udc00"}]}],
        r"'\\udc00' holds half a surrogate pair",
    ),
    "last": (
        [USER, {"role": "assistant", "content": "a"}],
        "message 2, the last, is the assistant's: end with one of the user's",
    ),
}
VALUES |= {name: ({"messages": m}, said) for name, (m, said) in CONVERSATIONS.items()}
MALFORMED = LINES | {name: (json.dumps(v).encode(), said) for name, (v, said) in VALUES.items()}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_line_is_told_and_the_others_stand(ask, tmp_path, case):
    line, said = MALFORMED[case]
    before, asked, after = ask(b'{"prompt": "b"}\n\n' + line + b'\n{"prompt": "c"}')
    assert (before.text, before.error) == ("b", None)
    assert (after.text, after.error, after.id) == ("c", None, 4)
    assert asked == Asked("line 3", None, None, DEFAULT, asked.error, 3)
    start = f"{tmp_path / 'asked.jsonl'} line 3: "
    assert asked.error.startswith(start)
    assert re.search(said, asked.error.removeprefix(start)), asked.error
    assert asked.error.isprintable()
    assert len(asked.error) < 450 + len(start)


def test_a_malformed_line_keeps_its_id(ask, standard_input):
    (asked,) = ask('{"id": "mine", "prompt": 5}')
    assert (asked.id, asked.name) == ("mine", "line 1")
    standard_input(b'\n{"id": "mine"}')
    (asked,) = read("-", DEFAULT, jsonl=True)
    assert asked.error.startswith("standard input line 2: there is no prompt")


def test_unreadable_jsonl_files_are_named(tmp_path, ask, standard_input, monkeypatch):
    with pytest.raises(InputError, match=r"^prompt file .*none.jsonl cannot be read: No such file"):
        read(tmp_path / "none.jsonl", DEFAULT)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_jsonl(tmp_path, DEFAULT)
    for content in "", "\n\r\n  \n", "\ufeff":
        with pytest.raises(InputError, match=r"asked.jsonl is empty: write one object a line"):
            ask(content)
    standard_input(b"")
    with pytest.raises(InputError, match=r"^standard input is empty: write one object a line"):
        read_jsonl("-", DEFAULT)
    sys.stdin.close()
    with pytest.raises(InputError, match=r"^standard input cannot be read: .* closed"):
        read_jsonl("-", DEFAULT)
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match=r"^standard input cannot be read: it is closed"):
        read_jsonl("-", DEFAULT)
    broken = types.SimpleNamespace(buffer=types.SimpleNamespace(read=fail))
    monkeypatch.setattr(sys, "stdin", broken)
    with pytest.raises(InputError, match=r"^standard input cannot be read: Input/output error$"):
        read_text("-")


def fail():
    raise OSError(5, "Input/output error")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "1"]), inner)
    ),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["prompt", "messages", "tools", "id", "stop", "n", "logit_bias", "echo", "role"]
)


@given(st.lists(st.dictionaries(KEYS, JSON, max_size=3) | JSON, min_size=1, max_size=4))
def test_any_json_is_answered(lines):
    content = "\n".join(json.dumps(line) for line in lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(content.encode())))
        asked = read_jsonl("-", DEFAULT)
    assert len(asked) == len(lines)
    for one in asked:
        assert [one.text, one.messages, one.error].count(None) == 2
        assert one.error is None or one.error.isprintable()


def test_standard_input_is_not_read_by_each_of_several_hosts(refused, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    refused(["--checkpoint", "here", "--prompt-file", "-"], "name a file that all of them see")
