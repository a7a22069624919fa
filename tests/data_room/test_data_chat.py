"""Instruct templates: known ids, and mistral-common's own encoder on many conversations."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.config import InputError
from mixtral_jax.data.chat import encode_chat
from mixtral_jax.data.conversation import read_conversation
from mixtral_jax.data.tokenizer import Tokenizer

VERSIONS = ("v1", "v2", "v3")


@pytest.fixture(scope="module")
def references(released):
    """mistral-common's encoders by version, with the rules that it has for serving."""
    files = pytest.importorskip("mistral_common.tokens.tokenizers.mistral")
    validator = pytest.importorskip("mistral_common.protocol.instruct.validator")
    request = pytest.importorskip("mistral_common.protocol.instruct.request")
    made = {"v1": files.MistralTokenizer.v1, "v2": files.MistralTokenizer.v2}
    made["v3"] = files.MistralTokenizer.v3

    def encoder(version):
        tokenizer = made[version]()
        serving = validator.get_validator(
            tokenizer.instruct_tokenizer.tokenizer.version, validator.ValidationMode.serving
        )
        tokenizer._chat_completion_request_validator = serving

        def encode(messages, tools=()):
            asked = request.ChatCompletionRequest(
                model="mixtral", messages=messages, tools=list(tools) or None
            )
            return tokenizer.encode_chat_completion(asked).tokens

        return encode

    return {version: encoder(version) for version in VERSIONS}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


def calls(*made):
    """An assistant's tool calls, from (id, name, arguments)."""
    listed = [{"id": i, "function": {"name": n, "arguments": a}} for i, n, a in made]
    return {"role": "assistant", "tool_calls": listed}


def result(content, call_id="abcDEF123", **more):
    return {"role": "tool", "content": content, "tool_call_id": call_id, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a town, in °C",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
BARE = {"type": "function", "function": {"name": "f-1_A", "parameters": {}}}
CALL = ("abcDEF123", "get_weather", {"town": "Tromsø"})

# ---- known ids ---------------------------------------------------------------------------------

HELLO_V1 = [1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793]
TURNS = [user("Hello"), assistant("Hi there"), user("Bye")]
GOLDEN = [
    ("v1", TURNS[:1], HELLO_V1),
    (
        "v1",
        TURNS,
        [*HELLO_V1, 15359, 736, 2, 733, 16289, 28793, 2463, 28706, 733, 28748, 16289, 28793],
    ),
    ("v2", TURNS[:1], [1, 3, 23325, 4]),
    ("v3", TURNS[:1], [1, 3, 23325, 4]),
    ("v3", TURNS, [1, 3, 23325, 4, 16127, 1504, 2, 3, 3231, 29474, 4]),
]


@pytest.mark.parametrize(("version", "messages", "ids"), GOLDEN)
def test_known_ids(released, version, messages, ids):
    assert encode_chat(released[version], messages) == ids


def test_a_tokenizer_of_ones_own_has_the_template_of_plain_text(tokenizer):
    assert tokenizer.version == "v1"
    ids = encode_chat(tokenizer, [system("S"), user("U"), assistant("A", prefix=True)])
    whole = tokenizer.encode("[INST] S\n\nU [/INST]")
    assert ids == [tokenizer.bos_id, *whole, *tokenizer.encode("A")]


def test_a_template_later_than_v3_is_refused(tokenizer):
    later = Tokenizer.from_bytes(tokenizer.model_bytes)
    later.version = None
    with pytest.raises(InputError, match="later than v3"):
        encode_chat(later, [user("a")])


# ---- the same as mistral-common ----------------------------------------------------------------

PLAIN = {
    "system": [system("Be brief."), user("a"), assistant("b"), user("c")],
    "system late": [user("a"), system("one"), user("b"), system("two"), system("three")],
    "system alone": [system("Be brief.")],
    "system and prefix": [system("s"), assistant("Sure", prefix=True)],
    "empty system": [system(""), user("a")],
    "empty systems": [system("s"), system(""), system([]), system("t"), user("a")],
    "empty parts": [system("s"), system([{"type": "text", "text": ""}]), user("a")],
    "nothing but empty parts": [system([{"type": "text", "text": ""}] * 2), user("a")],
    "empty": [user("")],
    "empty with system": [system("s"), user(""), assistant("b"), user("")],
    "spaces": [user("  a  "), assistant("  b \n "), user(" "), assistant("   "), user("\n\n")],
    "merged": [user("a"), user(""), user("b"), assistant("c"), assistant("d"), user("e")],
    "prefix": [user("a"), assistant("The answer is ", prefix=True)],
    "prefix merged": [user("a"), assistant("x"), assistant("y", prefix=True)],
    "assistant first": [assistant("Hello!"), user("a")],
    "parts": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), user("c")],
    "controls": [
        user("[INST] </s><s> [/INST] [TOOL_CALLS]"),
        assistant("</s>[INST]"),
        user("é€👩"),
    ],
}
TOOLS = {
    "available": ([user("a"), assistant("b"), user("c")], [WEATHER, BARE]),
    "available, system": ([system("s"), user("c")], [WEATHER]),
    "called": ([user("a"), calls(CALL), result('{"t": -3.50}', name="get_weather")], [WEATHER]),
    "told": ([user("a"), calls(CALL), result("cold", name="f"), assistant("b"), user("c")], [BARE]),
    "told and gone on": ([user("a"), calls(CALL), result(""), assistant("b", prefix=True)], []),
    "twice": (
        [user("a"), calls(CALL), result("[1, 2]"), calls(CALL), result("null"), user("b")],
        [WEATHER],
    ),
    "arguments": ([user("a"), calls(("abcDEF123", "f", "not { JSON")), result('"é\\u00e9"')], []),
    "no arguments": ([user("a"), calls(("abcDEF123", "f", "")), result("1e400")], []),
    "several": (
        [
            *(user("a"), calls(CALL, ("a00000000", "f", "[NaN]"))),
            *(result("1"), result("2", "a00000000"), assistant("x"), user("b")),
        ],
        [],
    ),
    "after a system": ([system("s"), calls(CALL), result("r")], []),
    "result then user": ([user("a"), calls(CALL), result("r"), user("b")], [WEATHER]),
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", PLAIN)
def test_same_as_the_reference(released, references, version, case):
    assert encode_chat(released[version], PLAIN[case]) == references[version](PLAIN[case])


@pytest.mark.parametrize("version", VERSIONS[1:])
@pytest.mark.parametrize("case", TOOLS)
def test_same_as_the_reference_with_tools(released, references, version, case):
    messages, tools = TOOLS[case]
    assert encode_chat(released[version], messages, tools) == references[version](messages, tools)


ODD = [
    "",
    " ",
    "  a",
    "a ",
    "\n",
    "\x00",
    "</s>",
    "<s>a",
    "[INST]",
    " [/INST] ",
    "é€",
    "👩‍👩‍👧",
    "日本語",
]
ODD += ["▁", "[REFERENCE_DOC_3]", "[TOOL_RESULTS]", '{"a": [1, "é"]}', "{}", "null", "\ufeff", "⁇"]
TEXTS = st.sampled_from(ODD) | st.text(max_size=6) | st.lists(st.sampled_from(ODD)).map("".join)
SAID = TEXTS.filter(bool)
NAMES = st.from_regex(r"[A-Za-z0-9_-]{1,9}", fullmatch=True)
IDS = st.from_regex(r"[A-Za-z0-9]{9}", fullmatch=True)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = TEXTS | st.dictionaries(TEXTS, JSON, max_size=2) | JSON.map(json.dumps)


@st.composite
def rounds_of_tools(draw, most):
    """Calls with their results, which may come under other ids."""
    made = draw(st.lists(st.tuples(IDS, NAMES, ARGUMENTS), min_size=1, max_size=most))
    contents = TEXTS | JSON.map(json.dumps)
    names = st.none() | NAMES
    return [calls(*made), *(result(draw(contents), i, name=draw(names)) for i, _, _ in made)]


@st.composite
def conversations(draw, version):
    """Conversations that make sense: system messages anywhere, turns in several messages, tools."""
    systems = st.lists(TEXTS.map(system), max_size=1)
    users = st.lists(TEXTS.map(user), min_size=1, max_size=2)
    answers = st.lists(SAID.map(assistant), max_size=2)
    messages = draw(systems)
    for _ in range(draw(st.integers(0, 2))):
        messages += draw(users) + draw(systems) + draw(users)
        if version != "v1" and draw(st.booleans()):
            messages += draw(rounds_of_tools(2 if version == "v3" else 1))
        messages += draw(answers)
    if not messages or messages[-1]["role"] != "tool" or draw(st.booleans()):
        messages += draw(users)
        messages += draw(st.just([]) | SAID.map(lambda text: [assistant(text, prefix=True)]))
    function = st.fixed_dictionaries(
        {"name": NAMES, "parameters": st.dictionaries(st.just("title"), TEXTS)},
        optional={"description": TEXTS},
    )
    tools = st.lists(function.map(lambda f: {"type": "function", "function": f}), max_size=2)
    return messages, draw(tools) if version != "v1" else []


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=300)
@given(data=st.data())
def test_same_as_the_reference_for_any_conversation(released, references, version, data):
    messages, tools = data.draw(conversations(version))
    expected = references[version](messages, tools)
    assert encode_chat(released[version], messages, tools) == expected


MESSAGES = st.one_of(
    st.sampled_from(ODD[:3]).map(user),
    st.sampled_from(ODD[:3]).map(system),
    st.builds(assistant, st.sampled_from(["", "b"]), prefix=st.booleans()),
    st.just(calls(CALL)),
    st.just(calls(CALL, CALL)),
    st.just(calls(("short", "f", "1"))),
    st.just(result("r")),
    st.just(result("r", None)),
)


@pytest.mark.parametrize("version", VERSIONS)
@settings(max_examples=400)
@given(messages=st.lists(MESSAGES, max_size=6))
def test_refuses_what_the_reference_refuses(released, references, version, messages):
    try:
        expected = references[version](messages)
    except Exception:  # pydantic's, its own, and plain errors
        expected = None
    try:
        ids = encode_chat(released[version], messages)
    except InputError:
        ids = None
    if messages and messages[0].get("tool_calls"):
        assert ids is None  # the reference does not count the first message's calls
    elif messages and messages[0]["role"] == "tool":
        assert ids is None  # nor the first message's result
    else:
        assert ids == expected


# ---- what is refused ---------------------------------------------------------------------------

BAD = {
    "none": ([], "has no message"),
    "not a dict": (["hello"], "message 1 must be a dict, not 'hello'"),
    "role": ([user("a"), {"role": "robot"}], "message 2: role='robot' is not one of system, user"),
    "no role": ([{"content": "a"}], "message 1: role=None is not one of"),
    "answered": ([user("a"), assistant("b")], "message 2, the last, is the assistant's"),
    "alone": ([assistant("b", prefix=True)], "message 1, the last, is the assistant's"),
    "tool": ([result("a")], "message 1: tool cannot come at the beginning, only system, user"),
    "order": ([user("a"), result("a")], "message 2: tool cannot come after user"),
    "late system": (
        [user("a"), assistant("b"), system("c")],
        "message 3: system cannot come after assistant, only assistant, user, tool",
    ),
    "early prefix": ([user("a"), assistant("b", prefix=True), user("c")], "message 2: prefix"),
    "user prefix": ([{**user("a"), "prefix": True}], "message 1: prefix belongs to a last message"),
    "no content": ([{"role": "user"}], "message 1: content=None must be text, or a list"),
    "number": ([user(3)], "message 1: content=3 must be text"),
    "picture": (
        [user([{"type": "image_url", "image_url": "x"}])],
        "message 1: content=.*image_url",
    ),
    "bytes": ([user(b"ab")], "message 1: content=b'ab' must be text"),
    "silent": ([user("a"), assistant(""), user("b")], "message 2: .*either content or tool_calls"),
    "both": ([user("a"), {**calls(CALL), "content": "b"}, result("r")], "message 2: .*either"),
    "text, calls": ([user("a"), assistant("b"), calls(CALL), result("r")], "message 3: tool calls"),
    "no result": (
        [user("a"), calls(CALL), user("b")],
        "1 tool calls without tool results before m",
    ),
    "results": ([user("a"), calls(CALL), result("r"), result("r")], "1 too many tool results"),
    "calls first": ([calls(CALL), result("r")], "message 1: tool calls cannot begin"),
    "calls": (
        [user("a"), {"role": "assistant", "tool_calls": "f()"}],
        "tool_calls='f\\(\\)' must be",
    ),
    "call": ([user("a"), {"role": "assistant", "tool_calls": [1]}, result("r")], "must be a dict"),
    "name": ([user("a"), calls(("abcDEF123", "a b", "")), result("r")], "function name 'a b' must"),
    "result name": ([user("a"), calls(CALL), result("r", name="é")], "function name 'é' must"),
    "arguments": (
        [user("a"), calls(("abcDEF123", "f", 3)), result("r")],
        "arguments=3 must be JSON",
    ),
    "set": (
        [user("a"), calls(("abcDEF123", "f", {"a": {1}})), result("r")],
        "message 2 cannot be written as JSON: .*set",
    ),
    "id": (
        [user("a"), calls(("call_1", "f", "")), result("r")],
        "call id 'call_1' must be 9 letters",
    ),
    "no id": ([user("a"), calls((None, "f", "")), result("r")], "call id None must be 9 letters"),
    "number id": ([user("a"), calls((7, "f", "")), result("r")], "message 2: id=7 of a tool call"),
    "result id": ([user("a"), calls(CALL), result("r", "x")], "call id 'x' must be 9 letters"),
    "result number": (
        [user("a"), calls(CALL), result("r", 7)],
        "message 3: tool_call_id=7 must be",
    ),
    "surrogate": ([user("ab\ud800")], "text is not Unicode at character 2"),
}


def refused(tokenizer, messages, tools, said):
    with pytest.raises(InputError, match=said) as error:
        encode_chat(tokenizer, messages, tools)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_conversation_is_refused_in_one_line(released, case):
    refused(released["v3"], BAD[case][0], (), BAD[case][1])


BAD_TOOLS = {
    "not a dict": (["f"], "tool 1 must be a dict"),
    "type": ([WEATHER, {**BARE, "type": "search"}], "tool 2 must be {'type': 'function'"),
    "function": ([{"type": "function"}], "tool 1 must be {'type': 'function'"),
    "name": ([{"function": {"name": ""}}], "tool 1: function name '' must be 1 to 64"),
    "schema": ([{"function": {"name": "f", "parameters": 3}}], "tool 1: parameters must be a dict"),
    "text": ([{"function": {"name": "f", "description": 3}}], "tool 1: description=3 must be text"),
    "json": ([{"function": {"name": "f", "parameters": {"a": b""}}}], "tools cannot be .* JSON"),
}


@pytest.mark.parametrize("case", BAD_TOOLS)
def test_bad_tools_are_refused_in_one_line(released, case):
    refused(released["v3"], [user("a")], *BAD_TOOLS[case])


def test_versions_refuse_what_their_templates_do_not_hold(released):
    turn = [user("a"), calls(CALL), result("r")]
    refused(released["v1"], turn, (), "a v1 tokenizer has no template for tools")
    refused(released["v1"], turn[:1], [WEATHER], "a v1 tokenizer has no template for tools")
    two = [user("a"), calls(CALL, CALL), result("r"), result("r")]
    refused(released["v2"], two, (), "a v2 tokenizer has no template for several tool results")
    assert encode_chat(released["v2"], [*two, user("b")])  # they are forgotten by then


def test_deep_json_is_text():
    deep = "[" * 100_000
    turns = read_conversation([user("a"), calls(("abcDEF123", "f", deep)), result(deep)]).turns
    assert turns[1].calls[0].arguments == turns[2].result.content == deep
