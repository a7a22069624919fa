"""Every test runs on eight emulated CPU devices, and an implicit change of rank is an error.

Those marked `gpu` interpret the kernels that they are about, and run them on an NVIDIA GPU with
JAX_PLATFORMS=cuda python -m pytest -m gpu
"""

import os
import pathlib
import socket
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# libtpu compiles here: it looks for no TPU, and another process may use it too.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# A command whose main is called here must not begin this process again (with_huge_pages).
os.environ.setdefault("GLIBC_TUNABLES", "")

import hypothesis
import jax
import pytest

from mixtral_jax import sharding

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "cpu":
        return
    for item in items:
        if not item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="runs on emulated CPU devices"))


def start_devices():
    """Eight devices, and a compiler in a hurry: most of a test's time is spent compiling.

    The flags are this process's alone. Programs that a test starts compile as they do for users.
    """
    if os.environ["JAX_PLATFORMS"] != "cpu":
        return
    before = os.environ.get("XLA_FLAGS")
    if jax.__version_info__[:2] == (0, 10):  # XLA aborts at a flag that it does not know
        os.environ["XLA_FLAGS"] = f"{before or ''} --xla_cpu_use_fusion_emitters=false"
    jax.config.update("jax_disable_most_optimizations", True)
    sharding.emulate_cpu_devices(8)
    assert len(jax.devices()) == 8, f"the tests need 8 CPU devices, here are {jax.devices()}"
    os.environ.pop("XLA_FLAGS", None)
    if before is not None:
        os.environ["XLA_FLAGS"] = before


start_devices()

# Programs compile once for the whole suite, those of the commands that tests start included; and
# the user's own cache is left alone.
_cache = tempfile.TemporaryDirectory(prefix="mixtral_jax-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
sharding.keep_compiled_programs()

# The same examples every time; compiling takes longer than hypothesis expects of a test.
hypothesis.settings.register_profile(
    "project",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("project")


MOST_MAPPINGS = 20_000  # Linux gives a process 65,530 of them, and XLA crashes at the next


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forget the programs of modules that have ended: each keeps several pieces of memory mapped.

    What is wanted again comes from the compilation cache on disk.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def optimized():
    """Compile as users do, for tests that look at the compiled program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def mesh(request):
    """A mesh (data, fsdp, expert, tensor), set; one device unless the parameter says more."""
    made = sharding.make_mesh(*getattr(request, "param", ()))
    with jax.set_mesh(made):
        yield made


@pytest.fixture
def unused_port():
    """A port that nothing listens on, and the next one too, most likely."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
