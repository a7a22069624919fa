"""What the benchmarks share: turns and medians, the machine's limits, and the lines they print.

A line is one JSON object: `benchmark`, the sizes, the figures, `xla_flags` if XLA_FLAGS says any,
and last `machine`, `versions` and `date`. Where a limit is known, `limit_seconds` is the time that
the machine would need if it did nothing but that work, and `of_limit` is limit_seconds / seconds: 1
is perfect.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from mixtral_jax import command_line
from mixtral_jax.config import InputError

HERE = pathlib.Path(__file__).resolve().parent
LEAST_SECONDS = 0.02  # of a turn: work that is shorter is repeated within it
READ_BYTES = {"cpu": 2**29, "gpu": 2**32, "tpu": 2**31}  # far more than any cache holds
PRODUCT_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}  # of a square matrix
XLA_FLAGS = os.environ.get("XLA_FLAGS", "").strip()  # as the user gave them


# ---- commands ----------------------------------------------------------------------------------


def run(main: Callable[[], None]) -> None:
    """A command's main; bad input is one line on standard error, and the exit code 2."""
    command_line.with_huge_pages()
    try:
        main()
    except InputError as error:
        sys.exit(command_line.report(error))


def parser(description: str) -> argparse.ArgumentParser:
    return command_line.Parser(description)


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def need(package: str, how: str) -> None:
    """Raises: InputError if a package is not installed."""
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        raise InputError(f"{package} is not installed: {how}") from None


# ---- time --------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any], calls: int = 1) -> float:
    """Of one call of several in a row, until the arrays that they return are there."""
    import jax

    began = time.perf_counter()
    for _ in range(calls):
        result = work()
    jax.block_until_ready(result)
    return (time.perf_counter() - began) / calls


def take_turns(works: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """The median seconds of each, after one call to warm up, all taking turns.

    So a noisy machine is noisy for all of them.
    """
    calls, times = {}, {name: [] for name in works}
    for name, work in works.items():
        seconds(work)  # compiles
        calls[name] = max(1, math.ceil(LEAST_SECONDS / seconds(work)))
    for _ in range(turns):
        for name, work in works.items():
            times[name].append(seconds(work, calls[name]))
    return {name: statistics.median(found) for name, found in times.items()}


# ---- limits ------------------------------------------------------------------------------------


def reading() -> tuple[Callable[[], Any], int]:
    """(a function that reads a large array, its bytes): with all cores (CPU), or one device."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    here = jax.default_backend()
    size = READ_BYTES.get(here, READ_BYTES["cpu"])
    if here == "cpu":  # NumPy in threads: XLA:CPU sums with one
        cores = os.cpu_count() or 1
        parts = np.array_split(np.ones(size // 4, np.float32), 2 * cores)
        pool = ThreadPoolExecutor(cores)
        return lambda: list(pool.map(np.add.reduce, parts)), size
    array, total = jnp.ones(size // 4, jnp.float32), jax.jit(jnp.sum)
    return lambda: total(array), size


def read_rate() -> float:
    """Bytes/s of `reading`."""
    read, size = reading()
    return size / take_turns({"": read}, 5)[""]


def product_rate(dtype: str) -> float:
    """FLOP/s of one large dense product on one device."""
    import jax
    import jax.numpy as jnp

    size = PRODUCT_SIZE.get(jax.default_backend(), PRODUCT_SIZE["cpu"])
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)  # of ones a GPU makes more
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / take_turns({"": lambda: product(x, x)}, 5)[""]


# ---- lines -------------------------------------------------------------------------------------


def show(benchmark: str, figures: dict[str, Any], about: dict[str, str] | None = None) -> None:
    """Print one line, floats to four digits. `about` is that of another process, if it worked."""
    flags = {"xla_flags": XLA_FLAGS} if XLA_FLAGS else {}
    line = {"benchmark": benchmark, **figures, **flags, **(about or about_machine())}
    print(json.dumps(_rounded(line)), flush=True)


def limited(found: float, limit: float | None) -> dict[str, float]:
    """A time beside its limit, for a line."""
    if limit is None:
        return {"seconds": found}
    return {"seconds": found, "limit_seconds": limit, "of_limit": limit / found}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, list | tuple) else value


def about_machine() -> dict[str, str]:
    """Hardware, versions and date of a line, by torch where this process uses it, else by JAX."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{_cpu_model()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    if accelerators := _accelerators():
        machine = f"{accelerators}; host {machine}"
    versions = [f"Python {platform.python_version()}"]
    for package in ("jax", "torch", "transformers"):
        if package in sys.modules:
            versions.append(f"{package} {metadata.version(package)}")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"machine": machine, "versions": ", ".join(versions), "date": date}


def _accelerators() -> str:
    """How many of which, or nothing."""
    if torch := sys.modules.get("torch"):
        count = torch.cuda.device_count()
        return f"{count} x {torch.cuda.get_device_name(0)}" if count else ""
    import jax

    device = jax.devices()[0]
    return "" if device.platform == "cpu" else f"{jax.device_count()} x {device.device_kind}"


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def peak_bytes() -> int:
    """The most memory in use so far: of the first accelerator, or else of this process."""
    if torch := sys.modules.get("torch"):
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    elif jax := sys.modules.get("jax"):
        found = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in found:
            return found["peak_bytes_in_use"]
    return peak_of_process()


def peak_of_process() -> int:
    """The most host memory that was resident, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
