"""Loading and converting weights: speed against reading the file alone, and the host's memory.

    python benchmarks/load.py [--gigabytes 2] [--folder /tmp] [--repeats 3] [--sharded 1]

Writes a bf16 checkpoint of Mixtral's proportions with random weights in Hugging Face's form, then,
each in a process of its own and with the file cache emptied of it: reads the files, loads them onto
the devices, converts them to Mistral's form. One JSON line a figure; peak memory is the most that
was resident, and on CPU, where the devices' memory is the host's, the model's own size is in it.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import measure
from measure import InputError


def model_config(gigabytes: float):
    """Widths of a quarter of 8x7B's, and as many layers as the size asks for."""
    from mixtral_jax.config import ModelConfig

    sizes = {
        **{"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 7168},
        **{"num_attention_heads": 16, "num_key_value_heads": 4, "param_dtype": "bfloat16"},
    }
    one = ModelConfig(**sizes, num_hidden_layers=1).num_parameters
    two = ModelConfig(**sizes, num_hidden_layers=2).num_parameters
    layers = max(1, round((gigabytes * 1e9 / 2 - (2 * one - two)) / (two - one)))
    return ModelConfig(**sizes, num_hidden_layers=layers)


class RandomWeights:
    """Pieces of random weights, made when they are asked for."""

    def __init__(self, config):
        import ml_dtypes
        import numpy as np

        self.config = config
        self._dtype = np.dtype(ml_dtypes.bfloat16)
        self._random = np.random.default_rng(0)

    def dtype(self, piece):
        return self._dtype

    def read(self, piece, wanted):
        import numpy as np

        from mixtral_jax.interop import names

        sizes = names.sizes(self.config)
        shape = [sizes[letter] for letter in wanted]
        bits = self._random.integers(0, 256, size=(*shape, 2), dtype=np.uint8)
        bits[..., 1] = (bits[..., 1] & 0x81) | 0x3C  # magnitudes from 2^-7 to 2^-5
        return bits.view(self._dtype)[..., 0], wanted

    def release(self, piece):
        pass


def files_of(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob("*.safetensors"))


def forget(folder: pathlib.Path) -> None:
    """Write everything out, and empty the system's cache of the files."""
    os.sync()
    for path in files_of(folder):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: pathlib.Path, arguments) -> float:
    """Seconds to read the files alone, in large pieces."""
    buffer = memoryview(bytearray(16 << 20))
    began = time.perf_counter()
    for path in files_of(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def load(folder: pathlib.Path, arguments) -> float:
    from mixtral_jax import sharding
    from mixtral_jax.config import MeshConfig

    sharding.start(MeshConfig(expert=arguments.sharded))
    import jax

    from mixtral_jax.interop.models import open_checkpoint

    mesh = sharding.make_mesh(expert=arguments.sharded)
    jax.block_until_ready(jax.numpy.zeros(3) + 1)  # JAX itself has started
    memory("started")
    began = time.perf_counter()
    checkpoint = open_checkpoint(folder)
    model = checkpoint.load(checkpoint.config, mesh)
    jax.block_until_ready(jax.tree.leaves(model))
    return time.perf_counter() - began


def convert(folder: pathlib.Path, arguments) -> float:
    from mixtral_jax.interop.conversion import convert
    from mixtral_jax.interop.folders import Kind

    memory("started")
    target = folder.with_name("converted")
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    convert(folder, target, Kind.MISTRAL)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


STARTED = {}


def memory(key: str) -> None:
    """Note the resident memory, in bytes."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    STARTED[key] = pages * os.sysconf("SC_PAGE_SIZE")


def in_a_process(name: str, folder: pathlib.Path, arguments) -> dict:
    """One task in a process of its own."""
    forget(folder)
    command = [sys.executable, __file__, "--task", name, "--folder", str(folder)]
    command += ["--sharded", str(arguments.sharded)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # it has said why
        raise InputError(f"{name} ended with code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--folder", type=pathlib.Path, default=tempfile.gettempdir())
    parser.add_argument("--repeats", type=measure.positive, default=3)
    parser.add_argument("--sharded", type=measure.positive, default=1, help="expert axis")
    parser.add_argument("--task", choices=["read", "load", "convert"], help="(its own)")
    arguments = parser.parse_args(argv)
    if arguments.task:
        seconds = {"read": read, "load": load, "convert": convert}[arguments.task](
            arguments.folder, arguments
        )
        line = {"seconds": seconds, "peak": measure.peak_of_process(), **STARTED}
        if arguments.task == "load":  # where JAX has started
            line["about"] = measure.about_machine()
        print(json.dumps(line))
        return
    if not arguments.gigabytes > 0:
        raise InputError(f"--gigabytes {arguments.gigabytes:g} must be above 0")
    if not os.access(arguments.folder, os.W_OK):
        raise InputError(f"--folder {arguments.folder} is not a folder to write to")
    from mixtral_jax import sharding
    from mixtral_jax.config import MeshConfig
    from mixtral_jax.interop import saving

    sharding.start(MeshConfig())
    config = model_config(arguments.gigabytes)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        folder = pathlib.Path(work) / "huggingface"
        saving.write_huggingface(RandomWeights(config), {}, folder)
        size = sum(path.stat().st_size for path in files_of(folder))
        runs = {name: [] for name in ("read", "load", "convert")}
        for tasks in (("read", "load"), ("convert",)):  # writing keeps the disk busy for a while
            for _ in range(arguments.repeats):
                for name in tasks:
                    runs[name].append(in_a_process(name, folder, arguments))
    reading = statistics.median(r["seconds"] for r in runs["read"])
    for name, results in runs.items():
        seconds = statistics.median(r["seconds"] for r in results)
        line = {
            "task": name,
            "file_bytes": size,
            "devices": arguments.sharded,
            **measure.limited(seconds, reading),
            "gigabytes_per_second": size / seconds / 1e9,
            "turns": len(results),
        }
        if name != "read":
            most = statistics.median(r["peak"] - r["started"] for r in results)
            line["peak_over_start_bytes"] = round(most)
            line["largest_tensor_bytes"] = config.vocab_size * config.hidden_size * 2
        measure.show("load", line, runs["load"][0]["about"])


if __name__ == "__main__":
    measure.run(main)
