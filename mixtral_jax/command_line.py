"""What the commands share: a line for a mistake, one for how long starting took, output, Ctrl-C."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from mixtral_jax.config import InputError, TrainingError


class OutputError(RuntimeError):
    """What is printed cannot be written; the message is one line. The exit code is 1."""


class Parser(argparse.ArgumentParser):
    """Shows the module's docstring as help, and raises mistakes like every other bad input."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str):
        raise InputError(f"{message}; see --help")


def one_line(path: object) -> str:
    """A path, or any text: as it is where it prints on one line, else with escapes."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def report(error: InputError | OutputError | TrainingError) -> int:
    """Say what is wrong, on standard error; returns the exit code."""
    print(f"error: {error}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1


def write(text: str) -> None:
    """Print on standard output, at once.

    Raises:
      BrokenPipeError: if whoever read it has gone.
      OutputError: if it cannot be written for another reason.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from None


def unwritten(error: OutputError | BrokenPipeError) -> int:
    """Say why standard output cannot be written, unless whoever read it has gone, and let go of it;
    returns the exit code."""
    if isinstance(error, OutputError):
        report(error)
    if sys.stdout is not None:  # what could not be written would be tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


@contextlib.contextmanager
def interruptions(*others: int) -> Iterator[threading.Event]:
    """Ctrl-C sets the event that this gives, where it would end the program; the second one does.

    An exception would come anywhere, in the middle of JAX's own work too, which may swallow it.
    Nothing sets it in another thread than the main one, or where the shell has Ctrl-C ignored.

    Args:
      others: signals that set it too.
    """
    event = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {}
    if threading.current_thread() is threading.main_thread():
        heard = [n for n in (signal.SIGINT, *others) if signal.getsignal(n) != signal.SIG_IGN]
        before = {number: signal.signal(number, note) for number in heard}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_huge_pages() -> None:
    """Begin this program again with memory in huge pages, on Linux, unless GLIBC_TUNABLES is set.

    XLA:CPU allocates its work space anew for each step, and the kernel clears it: in pages of 4 KiB
    a fifth of the time that a step of 2.2 GB takes. glibc asks for huge ones only if told at the
    start. For the first lines of a program, where it has read nothing and started nothing.
    """
    name, version = platform.libc_ver()
    known = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    if sys.platform == "linux" and known and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def give_back_memory() -> None:
    """Return to the system what has been freed, where the C library is glibc, which keeps it.

    Compiling a step takes half a gigabyte, which would count for good beside what a step takes.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


_IMPORTED = time.monotonic()


def seconds_since_start() -> float:
    """Seconds since this process began; where the system does not say, since this import."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()  # from the third on, see man proc
        ticks = int(fields[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - _IMPORTED


class StartUp:
    """What a command does before its first result, and when each part of it ended."""

    def __init__(self) -> None:
        self._ends = [("loading the program", seconds_since_start())]

    def end(self, part: str) -> None:
        """A part ends now, that began when the one before it ended."""
        self._ends.append((part, seconds_since_start()))

    def report(self, first: str) -> str:
        """For example: first step 6.1 s after the start: loading the program 1.5 s, data 0.4 s."""
        began, parts = 0.0, []
        for part, end in self._ends:
            parts.append(f"{part} {end - began:.1f} s")
            began = end
        return f"first {first} {began:.1f} s after the start: {', '.join(parts)}"
