"""Answers as JSON, and where stop strings end a text."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax.generation.results import Answer, StopStrings, TokenLogProbability, to_json

INFINITY = float("inf")


def answer(**values):
    usual = {"request_name": "line 3", "id": 3, "index": 0, "prompt": "a", "text": "b"}
    return Answer(**{**usual, "tokens": [5, 6], "finish_reason": "length", **values})


def likely(logprob, top=()):
    return TokenLogProbability("t", 4, logprob, list(top))


# ---- perplexity --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("logprobs", "expected"),
    [
        ([None, math.log(0.5), math.log(0.125)], 4.0),
        ([0.0], 1.0),
        ([None, -1.0, -INFINITY], INFINITY),
        ([-1e4], INFINITY),
    ],
)
def test_perplexity_is_the_inverse_of_the_mean_probability(logprobs, expected):
    entries = [None if logprob is None else likely(logprob) for logprob in logprobs]
    assert answer(prompt_logprobs=entries).perplexity == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("entries", [None, [], [None]])
def test_without_log_probabilities_there_is_no_perplexity(entries):
    assert answer(prompt_logprobs=entries).perplexity is None


def test_answers_end_for_known_reasons():
    with pytest.raises(ValueError, match=r"finish_reason='eos' is not one of stop, length, error$"):
        answer(finish_reason="eos")


# ---- JSON --------------------------------------------------------------------------------------


def test_an_answer_is_a_line_of_json():
    assert to_json(answer()) == (
        '{"request_name": "line 3", "id": 3, "index": 0, "prompt": "a", "text": "b", '
        '"tokens": [5, 6], "finish_reason": "length", "prompt_tokens": 0, "cached_tokens": 0}'
    )


def test_every_key_has_its_place():
    whole = answer(
        finish_reason="stop",
        stop="\n",
        logprobs=[likely(-0.5, [("u", 7, -0.25), ("v", 8, -INFINITY)]), likely(-INFINITY)],
        prompt_logprobs=[None, likely(math.log(0.25))],
        error="none",
        prompt_tokens=2,
        cached_tokens=1,
    )
    values = json.loads(to_json(whole))
    assert list(values) == [
        *("request_name", "id", "index", "prompt", "text", "tokens", "finish_reason", "stop"),
        *("logprobs", "prompt_logprobs", "perplexity", "error", "prompt_tokens", "cached_tokens"),
    ]
    top = [
        {"token": "u", "id": 7, "logprob": -0.25},
        {"token": "v", "id": 8, "logprob": None},
    ]
    assert values["logprobs"] == [
        {"token": "t", "id": 4, "logprob": -0.5, "top": top},
        {"token": "t", "id": 4, "logprob": None, "top": []},
    ]
    assert values["prompt_logprobs"][0] is None
    assert values["perplexity"] == pytest.approx(4)
    assert values["stop"] == "\n"


def test_a_perplexity_without_bound_is_null():
    values = json.loads(to_json(answer(prompt_logprobs=[likely(-INFINITY)])))
    assert values["perplexity"] is None


def test_an_empty_list_of_log_probabilities_stays():
    assert json.loads(to_json(answer(logprobs=[], tokens=[])))["logprobs"] == []


@given(st.text(st.characters(), max_size=20))
def test_any_text_stays_on_one_line_and_comes_back(text):
    line = to_json(answer(text=text, prompt=text, id=text))
    assert len(line.splitlines()) == 1
    values = json.loads(line.encode())
    assert [values["text"], values["prompt"], values["id"]] == [text] * 3


def test_letters_are_not_escaped_but_breaks_are():
    text = "\u20ac\u2028\x85\udcff\U0001f600\n"
    assert '"text": "\u20ac\\u2028\\u0085\\udcff\U0001f600\\n"' in to_json(answer(text=text))


# ---- stop strings ------------------------------------------------------------------------------


def stream(stops, parts):
    """What each part and the end show, and the stop that is found."""
    stopping = StopStrings(stops)
    shown = [stopping.push(part) for part in parts]
    return [*shown, stopping.flush()], stopping.found


@pytest.mark.parametrize(
    ("stops", "parts", "shown", "found"),
    [
        ([], ["a", "", "bc"], ["a", "", "bc", ""], None),
        (["x"], ["ab", "cxd", "e"], ["ab", "c", "", ""], "x"),
        (["stop"], ["a st", "op b"], ["a ", "", ""], "stop"),
        (["stop"], ["a st", "ay"], ["a ", "stay", ""], None),
        (["stop"], ["a sto"], ["a ", "sto"], None),
        (["stop"], ["ssto", "stop"], ["s", "sto", ""], "stop"),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", "", ""], "aab"),
        (["abab!"], ["ababab", "!"], ["ab", "", ""], "abab!"),
        (["b", "a"], ["xab"], ["x", ""], "a"),
        # of those that begin together the longest, which has to be waited for
        (["\n", "\n\n"], ["a\n", "b"], ["a", "", ""], "\n"),
        (["\n", "\n\n"], ["a\n", "\n", "b"], ["a", "", "", ""], "\n\n"),
        (["\n", "\n\n"], ["a\n"], ["a", ""], "\n"),
        # the one that begins first, though another ends before it
        (["bc", "abcd"], ["xabc", "d"], ["x", "", ""], "abcd"),
        (["bc", "abcd"], ["xabc", "e"], ["x", "a", ""], "bc"),
        (["bc", "abcd"], ["xabc"], ["x", "a"], "bc"),
        (["ab", "ab"], ["ab"], ["", ""], "ab"),
    ],
)
def test_text_ends_at_the_first_stop_string(stops, parts, shown, found):
    assert stream(stops, parts) == (shown, found)


def test_a_stop_that_nothing_else_could_replace_is_found_at_once():
    stopping = StopStrings(["ab", "b", "bcd"])
    assert (stopping.push("xab"), stopping.found) == ("x", "ab")
    assert (stopping.push("c"), stopping.flush(), stopping.flush()) == ("", "", "")


def test_after_the_end_of_the_text_nothing_is_shown_twice():
    stopping = StopStrings(["abc"])
    assert [stopping.push("xab"), stopping.flush(), stopping.flush()] == ["x", "ab", ""]


def test_a_stop_counts_from_where_it_may_end():
    stopping = StopStrings(["ab", "bc"])
    assert [stopping.push("xab", ends=False), stopping.push("cab")] == ["xa", ""]
    assert stopping.found == "bc"


def test_a_stop_string_must_not_be_empty():
    with pytest.raises(ValueError, match="a stop string must not be empty"):
        StopStrings(["a", ""])


def test_long_stop_strings_take_no_longer():
    stopping = StopStrings(["a" * 10**5 + "b"])
    shown = "".join(stopping.push("a" * 1000) for _ in range(200))
    assert shown == "a" * 10**5
    assert [stopping.push("b"), stopping.flush()] == ["", ""]


LETTERS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


def expected(stops, text):
    """What is shown of a whole text, and the stop: the first match, and the longest of these."""
    matches = [(text.find(stop), -len(stop), stop) for stop in stops if stop in text]
    if not matches:
        return text, None
    start, _, stop = min(matches)
    return text[:start], stop


@given(STOPS, st.lists(LETTERS, max_size=6))
def test_streaming_shows_what_the_whole_text_says(stops, parts):
    shown, found = stream(stops, parts)
    assert ("".join(shown), found) == expected(stops, "".join(parts))


@given(STOPS, st.lists(LETTERS, max_size=6))
def test_no_more_is_held_back_than_must_be(stops, parts):
    """What is shown so far is all up to the first place where a stop has begun or may have."""
    stopping, text, shown = StopStrings(stops), "", ""
    for part in parts:
        text, shown = text + part, shown + stopping.push(part)
        begun = [
            start
            for start in range(len(text))
            for stop in stops
            if stop.startswith(text[start:]) or text.startswith(stop, start)
        ]
        assert shown == text[: min(begun, default=len(text))]


@given(STOPS, LETTERS, LETTERS)
def test_a_stop_is_found_as_soon_as_no_text_could_change_it(stops, text, more):
    stopping = StopStrings(stops)
    stopping.push(text)
    if stopping.found is not None:
        assert stopping.found == expected(stops, text + more)[1]
    elif expected(stops, text)[1] is not None:
        rests = [stop[begun:] for stop in stops for begun in range(len(stop))]
        assert any(expected(stops, text + rest) != expected(stops, text) for rest in rests)
