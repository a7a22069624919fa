"""The host's free memory, from files as Linux writes them."""

import os

import pytest

from mixtral_jax.generation.free_memory import free_memory

MEMINFO = "MemTotal:       32000 kB\nMemFree:          100 kB\nMemAvailable:    20000 kB\n"
HOST = 20000 * 1024
V1 = "4:memory:/outer/inner\n1:cpu:/\n0::/\n"
LIMIT, USED = "memory.limit_in_bytes", "memory.usage_in_bytes"
GROUPS = {
    "none": ({}, HOST),
    "v2": (
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/memory.current": "3000\n",
            "sys/fs/cgroup/outer/memory.max": "9000\n",
            "sys/fs/cgroup/outer/memory.current": "8000\n",
            "sys/fs/cgroup/outer/memory.stat": "anon 5\nactive_file 20\ninactive_file 300\n",
        },
        1320,
    ),
    "v1": (
        {
            "proc/self/cgroup": V1,
            f"sys/fs/cgroup/memory/outer/inner/{LIMIT}": "7000\n",
            f"sys/fs/cgroup/memory/outer/inner/{USED}": "6000\n",
            "sys/fs/cgroup/memory/outer/inner/memory.stat": (
                "active_file 1\ntotal_active_file 20\ntotal_inactive_file 300\n"
            ),
        },
        1320,
    ),
    "a container's own": (
        {
            "proc/self/cgroup": V1,
            f"sys/fs/cgroup/memory/{LIMIT}": "7000\n",
            f"sys/fs/cgroup/memory/{USED}": "9000\n",
            "sys/fs/cgroup/memory/memory.stat": "total_active_file 0\ntotal_inactive_file 0\n",
        },
        0,
    ),
    "no limit": (
        {
            "proc/self/cgroup": V1,
            f"sys/fs/cgroup/memory/{LIMIT}": f"{2**63 - 4096}\n",
            f"sys/fs/cgroup/memory/{USED}": "9000\n",
            "sys/fs/cgroup/memory/memory.stat": "total_active_file 0\ntotal_inactive_file 0\n",
        },
        HOST,
    ),
}


@pytest.mark.parametrize("case", GROUPS)
def test_memory_that_caches_files_is_free_and_limits_hold(case, tmp_path):
    files, expected = GROUPS[case]
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == expected


def test_where_nothing_tells_free_pages_count(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 5, "SC_PAGE_SIZE": 7}.get)
    assert free_memory(tmp_path) == 35
