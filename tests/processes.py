"""The commands in processes of their own, on a plain CPU; and several hosts as threads."""

import os
import pathlib
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from jax.experimental import multihost_utils

ROOT = pathlib.Path(__file__).parents[1]


def environment(**more):
    """This process's, without its devices; compiling in a hurry, as the other tests do."""
    here = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    return {**here, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true", **more}


def on_two_hosts(command, port, stderr=subprocess.STDOUT):
    """[(stdout, stderr)] of two processes that are one run; each has half of the devices."""
    processes = []
    for rank in range(2):
        env = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(rank),
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=environment(**env), **pipes)
        processes.append(process)
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return outputs


def as_hosts(monkeypatch, work, *arguments):
    """What work(argument) returns or raises on each of several hosts, which are threads here."""
    count, here, told = len(arguments), threading.local(), {}
    meeting = threading.Barrier(count, timeout=60)

    def allgather(x):
        told[here.number] = np.asarray(x)
        meeting.wait()
        gathered = np.stack([told[number] for number in range(count)])
        meeting.wait()
        return gathered

    def one(number):
        here.number = number
        try:
            return work(arguments[number])
        except Exception as error:
            return error

    with monkeypatch.context() as patch, ThreadPoolExecutor(count) as pool:
        patch.setattr(jax, "process_count", lambda: count)
        patch.setattr(jax, "process_index", lambda: here.number)
        patch.setattr(multihost_utils, "process_allgather", allgather)
        return list(pool.map(one, range(count)))
