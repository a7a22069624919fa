"""What several hosts tell each other; here they are threads of one process."""

import jax
import pytest
from processes import as_hosts

from mixtral_jax import hosts
from mixtral_jax.config import InputError


def test_each_host_hears_what_all_say(monkeypatch):
    texts = ["", "\u00e4\n", "a" * 999, "b"]
    assert as_hosts(monkeypatch, hosts.gather, *texts) == [texts] * 4
    assert as_hosts(monkeypatch, hosts.gather, "", "") == [["", ""]] * 2
    assert as_hosts(monkeypatch, hosts.on_any_host, False, True) == [True] * 2
    assert as_hosts(monkeypatch, hosts.on_any_host, False, False) == [False] * 2


def test_hosts_that_say_the_same_go_on(monkeypatch):
    said = {"a": "1", "b": "\u00e4"}
    assert as_hosts(monkeypatch, lambda one: hosts.same(one, ""), said, said) == [None] * 2
    assert as_hosts(monkeypatch, hosts.same_program, said, said) == [None] * 2


def test_every_host_says_what_differs_and_where(monkeypatch):
    most, other = {"a": "1", "b": "2"}, {"a": "1", "b": "3", "c": "4"}
    said = [most, other, *[most] * 5]
    errors = as_hosts(monkeypatch, lambda one: hosts.same(one, "do this"), *said)
    assert {str(error) for error in errors} == {
        "the hosts differ in b (2 on hosts 0, 2, 3, 4, ..., 3 on host 1); "
        "c (not there on hosts 0, 2, 3, 4, ..., 4 on host 1): do this"
    }
    assert {type(error) for error in errors} == {InputError}


def test_hosts_run_the_same_code(monkeypatch):
    def with_python(version):
        hosts.same_program({"python": version})

    (error, _) = as_hosts(monkeypatch, with_python, "1", "2")
    assert "the hosts differ in python (1 on host 0, 2 on host 1): give all" in str(error)
    monkeypatch.setattr(hosts.platform, "python_version", lambda: str(jax.process_index()))
    (error, _) = as_hosts(monkeypatch, with_python, "1", "1")
    assert "the version of Python (0 on host 0, 1 on host 1)" in str(error)


def test_all_hosts_leave_a_block_or_none(monkeypatch):
    def work(error):
        with hosts.together():
            if error is not None:
                raise error
        return "on"

    assert as_hosts(monkeypatch, work, None, None) == ["on"] * 2
    errors = as_hosts(monkeypatch, work, None, InputError("no file"), InputError("no disk"))
    assert [(type(e), str(e)) for e in errors] == [(InputError, "host 1: no file")] * 3
    missing, full = FileNotFoundError(2, "none"), OSError(28, "full")
    errors = as_hosts(monkeypatch, work, missing, None, full)
    assert errors[::2] == [missing, full]  # whose host knows what to say of them
    assert str(errors[1]) == "host 0: [Errno 2] none"
    with pytest.raises(InputError, match=r"^alone$"):
        work(InputError("alone"))
