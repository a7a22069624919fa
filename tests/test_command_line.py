"""train.py as its users run it: bad input is one line and exit code 2; a killed run goes on."""

import json
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from processes import environment, on_two_hosts

import train
from mixtral_jax import config_io, sharding
from mixtral_jax.interop import own

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "model": {
        "vocab_size": 512,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "max_position_embeddings": 64,
    },
    "training": {
        "steps": 20,
        "batch_size": 8,
        "sequence_length": 16,
        "schedule": "constant",
        "warmup_steps": 2,
        "log_every": 1,
        "checkpoint_every": 5,
        "validate_every": 10,
        "validation_batches": 50,
    },
    "data": {"train": "{stdlib}/email/*.py", "validation_fraction": 0.3, "tokenizer": "train"},
}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


def run_train(config, *overrides, env=None, check=True):
    """train.py in a process of its own, on a plain CPU."""
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(config), *overrides]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment(**(env or {})),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 or not check, done.stderr
    return done


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.hidden_sise=32"],
            "key model.hidden_sise; did you mean hidden_size",
        ),
        (["trainning.steps=3"], "key trainning; did you mean training"),
        (["training.steps=many"], "training.steps='many' must be a whole number"),
        (["training.steps=0"], "training.steps=0 must be at least 1"),
        (["mesh.expert=3"], "mesh.expert=3 does not divide model.num_local_experts=8"),
        (["mesh.tensor=4"], "mesh.tensor=4 does not divide model.num_key_value_heads=2"),
        (["mesh.data=3"], "do not split over"),
        (["model.exchange=carrier-pigeon"], "is not one of"),
        (["mesh.expert=2", "model.exchange=local"], "model.exchange=local cannot reach"),
        (["mesh.expert=2", "model.exchange=ragged"], "exchange=ragged does not run on cpu"),
        (["mesh.expert=8", "mesh.data=2", "training.batch_size=16"], "needs 16 devices"),
        (["data.train=/no/such/*.txt"], "/no/such/*.txt"),
        (["data.tokenizer=/no/such.model"], "/no/such.model"),
        (["data.tokenizer=README.md"], "README.md"),
        (["model.vocab_size=20000"], "model.vocab_size=20000"),
        (["run.resume_step=7"], "run.resume_step=7 is not a checkpoint"),
        (["training.profile_steps=9"], "must look like 10:12"),
        (["steps=3"], "must look like section.key=value"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_that_names_it(
    config_file, tmp_path, capfd, monkeypatch, overrides, message
):
    monkeypatch.setattr(sharding, "start", lambda mesh: None)  # the devices are there already
    monkeypatch.chdir(ROOT)
    folder = tmp_path / "run"
    code = train.main(["--config", str(config_file), *overrides, f"run.dir={folder}"])
    error = capfd.readouterr().err
    assert code == 2
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1, 2]", "must be a section"),
        ("a: b: c", "is not YAML"),
        ("", "must hold sections"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path, capfd, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert train.main(["--config", str(path)]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_config_file_is_named(capfd):
    assert train.main(["--config", "configs/nothing.yaml"]) == 2
    assert capfd.readouterr().err == "error: config configs/nothing.yaml does not exist\n"


def test_too_few_devices_end_the_program_in_one_line(config_file, tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    folder = tmp_path / "run"
    done = run_train(config_file, "mesh.expert=4", f"run.dir={folder}", env=flags, check=False)
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.startswith("error: a mesh of mesh.expert=4 needs 4 devices, and this machine has 2")
    assert "sharding.start(MeshConfig(expert=4)) before" in said
    assert "Traceback" not in done.stderr
    assert not folder.exists()


def test_help_and_mistakes_do_not_load_jax():
    code = """
import sys, train, generate
for main, arguments in ((train.main, ["--help"]), (generate.main, ["--help"])):
    try:
        main(arguments)
    except SystemExit:
        pass
assert train.main(["--config", "configs/quickstart.yaml", "training.steps=0"]) == 2
assert generate.main(["--checkpoint", "runs", "--prompt", "a", "--top-p", "2"]) == 2
sys.exit("jax" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", ["train.py", "generate.py"])
def test_a_python_without_the_packages_is_named_in_one_line(command):
    done = subprocess.run([sys.executable, "-S", command], cwd=ROOT, capture_output=True, text=True)
    assert re.fullmatch(r"error: \S+ has no jax: activate .*\n", done.stderr)


def test_a_start_is_timed_from_when_the_process_began():
    code = "import time; time.sleep(0.5); from mixtral_jax.command_line import StartUp as S"
    code += "; s = S(); time.sleep(0.2); s.end('a nap'); print(s.report('step'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    times = r"first step (.*) s after the start: loading the program (.*) s, a nap (.*) s\n"
    said = re.fullmatch(times, done.stdout)
    whole, loading, nap = map(float, said.groups())
    assert loading >= 0.5
    assert nap >= 0.2
    assert whole == pytest.approx(loading + nap, abs=0.11)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_of_the_project_is_valid(path):
    config = config_io.load(path)
    assert config.run.dir


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(config_file, tmp_path):
    """20 steps; and 10 or a few more, kill -9, and the rest."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run_train(config_file, "mesh.expert=4", f"run.dir={straight}")
    command = [sys.executable, "train.py", "--config", str(config_file), "mesh.expert=4"]
    process = subprocess.Popen([*command, f"run.dir={killed}"], cwd=ROOT, env=environment())
    deadline = time.monotonic() + 240
    while not (killed / own.FOLDER / "10").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert "resuming" in run_train(config_file, "mesh.expert=4", f"run.dir={killed}").stdout
    assert losses(killed) == losses(straight)
    assert sorted(losses(killed)) == list(range(1, 21))
    ends = [own.read_run(f / own.FOLDER / "20") for f in (killed, straight)]
    assert ends[0]["checksums"] == ends[1]["checksums"]
    assert ends[0]["data_state"] == ends[1]["data_state"]


def run_on_two_hosts(config, *overrides, port):
    """What two processes of four devices each say."""
    command = [sys.executable, "train.py", "--config", str(config), *overrides]
    return [said for said, _ in on_two_hosts(command, port)]


@pytest.mark.slow
def test_two_hosts_train_save_and_resume_as_one(config_file, tmp_path, unused_port):
    """2 processes x 4 devices against 1 x 8: the same losses, before and after resuming."""
    one, two = tmp_path / "one", tmp_path / "two"
    mesh = ["mesh.data=2", "mesh.expert=4", "training.steps=8"]
    run_train(config_file, *mesh, f"run.dir={one}")
    first = [*mesh[:2], "training.steps=5", f"run.dir={two}"]
    run_on_two_hosts(config_file, *first, port=unused_port)
    outputs = run_on_two_hosts(config_file, *mesh, f"run.dir={two}", port=unused_port + 1)
    assert "resuming" in outputs[0]
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    ends = [own.read_run(f / own.FOLDER / "8") for f in (one, two)]
    assert ends[0]["data_state"] == ends[1]["data_state"]


@pytest.mark.slow
def test_a_profile_is_written_also_of_the_last_step(config_file, tmp_path):
    """In its own process: the profiler does not get on with every libtpu that tests load."""
    steps = ["training.steps=3", "training.profile_steps=2:3", "training.validate_every=0"]
    done = run_train(config_file, *steps, f"run.dir={tmp_path}/run")
    assert re.search(
        r"^first step [\d.]+ s after the start: .*, compiling [\d.]+ s", done.stdout, re.M
    )
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_commands_run_in_huge_pages_and_an_environment_that_says_more_is_left_alone(tmp_path):
    """The program begins again once, with the arguments that it was given."""
    script = tmp_path / "show.py"
    script.write_text(
        "import os, sys\n"
        "from mixtral_jax.command_line import with_huge_pages\n"
        "with_huge_pages()\n"
        "print(os.environ.get('GLIBC_TUNABLES'), *sys.argv[1:])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("GLIBC_TUNABLES", None)

    def shown(**more):
        command = [sys.executable, "-W", "ignore", str(script), "a b", "--c"]
        made = subprocess.run(
            command, env={**environment, **more}, capture_output=True, text=True, check=True
        )
        return made.stdout.strip()

    glibc = platform.libc_ver()[0] == "glibc" and sys.platform == "linux"
    wanted = "glibc.malloc.hugetlb=1" if glibc else "None"
    assert shown() == f"{wanted} a b --c"
    assert shown(GLIBC_TUNABLES="glibc.malloc.check=0") == "glibc.malloc.check=0 a b --c"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_goes_back_to_the_system():
    """128 MB in blocks that glibc keeps, because something behind them is in use."""
    code = """
import ctypes
from mixtral_jax.command_line import give_back_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
blocks = [libc.malloc(64000) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 64000)
in_use = libc.malloc(64000)
for block in blocks:
    libc.free(block)
before = resident()
give_back_memory()
print(before - resident())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 100e6
