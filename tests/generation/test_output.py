"""What generate.py prints: in which order and how, and what becomes of it when it cannot."""

import io
import math
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from processes import as_hosts

from mixtral_jax.command_line import OutputError, interruptions
from mixtral_jax.generation import output
from mixtral_jax.generation.answering import Event
from mixtral_jax.generation.results import Answer, TokenLogProbability


def event(request, text, ends=False, **known):
    answer = Answer("", 1, 0, "", text, [5], "length", **known) if ends else None
    return Event(request, 0, text, 5, None, answer)


def test_answers_come_in_the_order_of_their_prompts_as_they_are_made(capsys):
    """The first is shown as it comes; what the second has made waits for its turn."""
    shown = output.Text([output.Shown("a", 1, False), output.Shown("b", 1, True)])
    said = []
    events = [(0, "A"), (1, "x"), (0, "B"), (1, "y", True), (0, "C", True)]
    for given in events:
        shown.take(event(*given))
        said.append(capsys.readouterr().out)
    assert said == ["> a\nA", "", "B", "", "C\n\n> b\nbxy\n\n"]


def test_any_number_of_answers_waits_for_the_first(capsys):
    count = 5000
    shown = output.Text([output.Shown("a", 1, False)] * count)
    for number in reversed(range(count)):
        shown.take(event(number, str(number), True))
    assert capsys.readouterr().out == "".join(f"> a\n{number}\n\n" for number in range(count))


def test_a_prompt_that_is_bos_alone_has_no_perplexity(capsys):
    output.Text([output.Shown("", 1, False)]).take(event(0, "", True, prompt_logprobs=[None]))
    assert capsys.readouterr().out == "nothing to score, the prompt is BOS alone\n"


@pytest.mark.parametrize(
    ("text", "echo", "painted", "expected"),
    [
        ("", False, None, "perplexity 2.0000 over 1 tokens of the prompt\n"),
        ("", True, None, "ab\nperplexity 2.0000 over 1 tokens of the prompt\n"),
        ("c", True, None, "abc\nperplexity 2.0000 over 1 tokens of the prompt\n"),
        ("c", False, "ABC", "ABC\nperplexity 2.0000 over 1 tokens of the prompt\n"),
    ],
)
def test_a_perplexity_has_a_line_of_its_own(capsys, text, echo, painted, expected):
    paint = None if painted is None else lambda number, answer: painted
    scored = [None, TokenLogProbability("b", 4, math.log(0.5), [])]
    given = event(0, text, True, prompt_logprobs=scored)
    output.Text([output.Shown("ab", 1, echo)], paint).take(given)
    assert capsys.readouterr().out == expected


def test_tokens_a_second_are_those_of_decoding_without_its_compiling(monkeypatch):
    """Two answers: their first tokens after 2 s, 10 s to compile decoding, then a step a second."""
    now = [0.0]
    monkeypatch.setattr(output.time, "perf_counter", lambda: now[0])
    rates = output.Rates(2, lambda: None, live=False)
    for step, wait in enumerate([2, 10, 1, 1]):
        now[0] += wait
        for request in range(2):
            rates.take(Event(request, 0, "", step, None, None))
    line = "7 prompt tokens; first token after 2.00 s, with compiling; 8 tokens made; 2.5 tokens/s"
    assert rates.report(7, 0) == line


# ---- of the command ----------------------------------------------------------------------------


def test_lines_of_json_are_utf_8_whatever_the_terminal_knows(run, main, monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii", errors="replace"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO('{"id": "é€"}'.encode())))
    arguments = ["--checkpoint", str(run), "--prompt-file", "-", "--jsonl", "--format", "jsonl"]
    assert main(arguments) == 1
    assert '"id": "é€"' in out.getvalue().decode("utf-8")


def test_output_that_cannot_be_written_is_one_line_and_exit_code_1(run, main, capsys, monkeypatch):
    """A full disk, and an output that was closed; nothing of it is left to be written again."""
    arguments = ["--checkpoint", str(run), "--prompt-file", "-", "--jsonl", "--format", "jsonl"]
    with open("/dev/full", "w") as full:
        for out, why in (full, "No space left on device"), (None, "it is closed"):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
            monkeypatch.setattr(sys, "stdout", out)
            assert main(arguments) == 1
            last = capsys.readouterr().err.splitlines()[-1]
            assert last == f"error: standard output cannot be written: {why}"


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_ends_the_answers_after_an_event_and_not_in_the_middle_of_work(
    run, main, capsys, monkeypatch, times
):
    """The second one at once. An exception may be swallowed where it comes, as by JAX."""
    taken = []

    def interrupted(self, event):
        taken.append(event)
        try:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            taken.append(None)
            raise

    monkeypatch.setattr(output.Rates, "take", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main(["--checkpoint", str(run), "--prompt", "a", "--max-new-tokens", "9"]) == 130
    assert len(taken) == times
    assert signal.getsignal(signal.SIGINT) is before
    assert len(capsys.readouterr().out) == (0 if times == 2 else len(taken[0].text))


def test_ctrl_c_stays_ignored_and_belongs_to_the_main_thread():
    def stopped():
        with interruptions() as event:
            if threading.current_thread() is threading.main_thread():
                os.kill(os.getpid(), signal.SIGINT)
            return event.is_set()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert not stopped()
    finally:
        signal.signal(signal.SIGINT, before)
    with ThreadPoolExecutor() as pool:
        assert not pool.submit(stopped).result()
    assert stopped()


def test_several_hosts_stop_after_the_same_event(monkeypatch):
    """Told to by Ctrl-C on one of them, or where what the first prints cannot be written."""

    def events(trouble):
        told, made = threading.Event(), 0

        def show():
            if trouble == "closed" and made == 3:
                raise OutputError("standard output cannot be written")

        try:
            with output.Stop(told) as stop:
                for made in range(2 * output.TOGETHER):
                    if trouble == "told" and made == 5:
                        told.set()
                    stop.soon(show)
                    stop.after_event()
        except (KeyboardInterrupt, OutputError) as error:
            return made + 1, type(error)
        return made + 1, None

    count = output.TOGETHER
    assert as_hosts(monkeypatch, events, None, None) == [(2 * count, None)] * 2
    assert as_hosts(monkeypatch, events, None, "told") == [(count, KeyboardInterrupt)] * 2
    ends = [(count, OutputError), (count, KeyboardInterrupt)]
    assert as_hosts(monkeypatch, events, "closed", None) == ends
    assert [events("told"), events("closed")] == [(6, KeyboardInterrupt), (4, OutputError)]


def test_what_cannot_be_printed_after_the_last_question_is_raised_at_the_end(monkeypatch):
    def closed():
        raise BrokenPipeError

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(BrokenPipeError), output.Stop(threading.Event()) as stop:
        stop.soon(closed)
