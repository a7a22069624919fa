"""The command convert: every direction bit for bit, and what it says, refuses and leaves."""

import dataclasses
import errno
import functools
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from checkpoint_files import (
    BF16,
    CONFIG,
    CONFIG_JSON,
    HUGGING_FACE,
    INDEX,
    MISTRAL,
    PARAMS_JSON,
    Drawn,
    tensors,
    write,
)

import mixtral_jax
from mixtral_jax import files
from mixtral_jax.config import InputError
from mixtral_jax.data.released import released_file
from mixtral_jax.data.tokenizer import Tokenizer, train_tokenizer
from mixtral_jax.interop import (
    convert,
    folders,
    models,
    names,
    own,
    own_arrays,
    safetensors,
    saving,
)

ROOT = pathlib.Path(__file__).parents[2]
FORMS = ("orbax", "huggingface", "mistral")
UNCARRIED = "not carried over: generation_config.json\n"  # which only Hugging Face's form has
SOURCES = {
    "float32": Drawn(),
    "bfloat16": Drawn(narrow=lambda piece: True),
    "mixed": Drawn(narrow=lambda piece: piece.parameter in names.EXPERTS),
}


@pytest.fixture
def done(main):
    """done(source, target, to, *flags): standard error, where all went well; gives the target."""

    def run(source, target, to, *flags):
        code, out, err = main(source, target, to, *flags)
        assert code == 0, err
        assert out.startswith(f"{target}: {to}, ")
        assert out.count("\n") == 1
        assert err in ("", UNCARRIED)
        return target

    return run


@pytest.fixture
def refused(main):
    """refused(source, target, to, *flags): the one line that is said, where nothing was done."""

    def run(source, target, to, *flags):
        before = snapshot(pathlib.Path(source).parent), snapshot(pathlib.Path(target).parent)
        code, out, err = main(source, target, to, *flags)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        after = snapshot(pathlib.Path(source).parent), snapshot(pathlib.Path(target).parent)
        assert after == before
        return err

    return run


def snapshot(folder):
    """Every file below a folder with its bytes, and every folder."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The same model by type of its tensors, in both released forms."""
    folder = tmp_path_factory.mktemp("sources")
    for kind, weights in SOURCES.items():
        write(folder / kind / "huggingface", "sharded", weights)
        write(folder / kind / "mistral", "mistral", weights)
    return folder


def same(one, other, dtype=None):
    """Tensor by tensor, bit for bit; or after a change of type."""
    one, other = tensors(one), tensors(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        array = array if dtype is None else array.astype(dtype)
        assert array.dtype == other[name].dtype, name
        assert array.tobytes() == other[name].tobytes(), name


# ---- every direction ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SOURCES)
def test_around_through_every_form_and_back(sources, done, tmp_path, kind):
    """Each form to each, itself too; those that files hold, compared with files made directly."""
    places = {form: sources / kind / form for form in FORMS[1:]}
    wide = np.float32 if kind == "mixed" else None  # the own form has one type for all
    places["orbax"] = done(places["huggingface"], tmp_path / "orbax", "orbax")
    for one, other in itertools.product(FORMS, repeat=2):
        target = done(places[one], tmp_path / f"{one}-{other}", other)
        if other != "orbax":
            same(places[other], target, wide if one == "orbax" else None)
        else:
            again = done(target, tmp_path / f"{one}-{other}-back", "mistral")
            same(places["mistral"], again, wide)
    config = own.load_extras(own.find(places["orbax"])).config.model
    assert config.param_dtype == ("bfloat16" if kind == "bfloat16" else "float32")
    assert dataclasses.replace(config, param_dtype="float32") == CONFIG


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("kind", SOURCES)
def test_a_change_of_type(sources, done, tmp_path, kind, to):
    """Rounded as NumPy rounds; from bfloat16 to float32 and back nothing changes."""
    source = sources / kind / "mistral"
    narrow = done(source, tmp_path / "narrow", to, "--dtype", "bf16")
    wide = done(narrow, tmp_path / "wide", to, "--dtype", "f32")
    again = done(wide, tmp_path / "again", to, "--dtype", "bf16")
    for folder, dtype in ((narrow, BF16), (wide, np.float32), (again, BF16)):
        native = done(folder, folder.with_name(f"{folder.name}-native"), "mistral")
        expected = {name: array.astype(BF16) for name, array in tensors(source).items()}
        for name, array in tensors(native).items():
            assert array.dtype == dtype
            assert array.tobytes() == expected[name].astype(dtype).tobytes(), name
    if to == "huggingface":
        types = [json.loads((f / CONFIG_JSON).read_text())["dtype"] for f in (narrow, wide, again)]
        assert types == ["bfloat16", "float32", "bfloat16"]


def test_what_is_beside_the_weights(sources, done, tmp_path):
    """Both configurations say the same model, whichever way they came."""
    there = done(sources / "mixed" / "huggingface", tmp_path / "there", "mistral")
    back = done(there, tmp_path / "back", "huggingface")
    assert folders.open_weights(there).config == folders.open_weights(back).config
    assert json.loads((back / CONFIG_JSON).read_text())["dtype"] == "float32"
    assert {path.name for path in there.iterdir()} == {MISTRAL, PARAMS_JSON}
    assert {path.name for path in back.iterdir()} == {
        *(HUGGING_FACE, CONFIG_JSON, "generation_config.json")
    }


# ---- sizes of files ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("5GB", 5 * 10**9), ("500MiB", 500 * 2**20), ("50KB", 50_000), ("1.5 kib", 1536)),
        *(("7", 7), ("7B", 7), ("2TB", 2 * 10**12), (" 3gb ", 3 * 10**9), ("0.5KB", 500)),
    ],
)
def test_a_size(text, expected):
    assert convert.size(text) == expected


BAD_SIZES = ["", "GB", "5 GB GB", "-5GB", "0", "0GB", "0.1", "nan", "inf", "1e9", "5XB", "5,0GB"]
BAD_SIZES += ["9" * 400 + "GB", "5\nGB", "\u0665GB", "5GB" + "x" * 900]


@pytest.mark.parametrize("text", BAD_SIZES, ids=lambda text: repr(text)[:12])
def test_a_size_that_is_none(sources, refused, tmp_path, text):
    with pytest.raises(InputError, match="must look like 5GB or 500MiB"):
        convert.size(text)
    source = sources / "float32" / "mistral"
    said = refused(source, tmp_path / "x", "huggingface", f"--max-shard-size={text}")
    assert "--max-shard-size" in said
    assert len(said) < 300


def test_files_of_a_size(sources, done, tmp_path):
    source = sources / "mixed" / "mistral"
    target = done(source, tmp_path / "target", "huggingface", "--max-shard-size", "0.5KB")
    index = json.loads((target / INDEX).read_text())
    files = sorted(path.name for path in target.glob("*.safetensors"))
    count = len(files)
    assert count > 6
    assert files == [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    found = {}
    for name in files:
        with safetensors.SafetensorsFile(target / name) as file:
            found |= dict.fromkeys(file.tensors, name)
            size = sum(info.stop - info.start for info in file.tensors.values())
            assert size <= 500 or len(file.tensors) == 1
    assert index["weight_map"] == found
    total = sum(array.nbytes for array in tensors(target).values())
    assert index["metadata"]["total_size"] == total
    homes = {home for name, home in found.items() if "layers.1.block_sparse_moe.experts" in name}
    assert len(homes) > 1
    same(source, done(target, tmp_path / "back", "mistral"))
    one = done(target, tmp_path / "one", "huggingface", "--max-shard-size", str(total))
    assert [path.name for path in one.glob("*.safetensors")] == [HUGGING_FACE]
    assert not (one / INDEX).exists()


# ---- tokenizers and what lies beside -----------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words, the same again, a few words " * 9], 300)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, tokenizer):
    """Hugging Face's form with everything that may lie beside the weights, and more."""
    folder = tmp_path_factory.mktemp("spoken") / "source"
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size)
    write(folder, "single", Drawn(config), tokenizer)
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / name).write_text(f'{{"not ours": "{name}"}}\n\n')
    return folder


def test_tokenizer_files_come_along_byte_for_byte(spoken, done, main, tmp_path, tokenizer):
    copy = done(spoken, tmp_path / "copy", "huggingface", "--dtype", "bf16")
    for path in spoken.iterdir():
        if path.name not in (CONFIG_JSON, HUGGING_FACE):
            assert (copy / path.name).read_bytes() == path.read_bytes(), path.name
    code, out, err = main(spoken, tmp_path / "native", "mistral")
    assert (code, out.count("\n"), err.count("\n")) == (0, 1, 1)
    assert err.startswith("not carried over: ")
    left = {"chat_template.jinja", "special_tokens_map.json", "tokenizer.json"}
    assert left <= set(err.removeprefix("not carried over: ").strip().split(", "))
    native = tmp_path / "native"
    assert (native / "tokenizer.model").read_bytes() == tokenizer.model_bytes


def test_a_tokenizer_through_the_own_form(spoken, done, main, tmp_path, tokenizer):
    code, _, err = main(spoken, tmp_path / "own", "orbax")
    assert code == 0
    left = err.removeprefix("not carried over: ").strip().split(", ")
    assert "tokenizer.model" not in left
    assert "generation_config.json" in left
    for form in FORMS[1:]:
        back = done(tmp_path / "own", tmp_path / form, form)
        assert (back / "tokenizer.model").read_bytes() == tokenizer.model_bytes
    again = done(tmp_path / "own", tmp_path / "again", "orbax")
    assert folders.load_tokenizer(again, 300).model_bytes == tokenizer.model_bytes


def test_files_that_are_nobodys_are_named(sources, main, tmp_path):
    source = pathlib.Path(shutil.copytree(sources / "float32" / "mistral", tmp_path / "source"))
    (source / "README.md").write_text("mine")
    (source / "a\nb").write_text("mine")
    (source / "adapter_model.safetensors").write_text("mine")
    (source / "other.pth").write_text("mine")
    code, _, err = main(source, tmp_path / "target", "huggingface")
    assert code == 0
    assert err.startswith("not carried over: ")
    left = set(err.removeprefix("not carried over: ").strip().split(", "))
    assert left == {r"'a\nb'", "README.md", "adapter_model.safetensors", "other.pth"}
    assert err.count("\n") == 1


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_a_version_of_mistrals_tokenizer_stays_itself(main, tmp_path, version):
    """v2 above all, whose pieces are v3's: only the file's name tells them apart."""
    pytest.importorskip("mistral_common")
    tokenizer = Tokenizer.from_name_or_file(f"mistral-{version}")
    sizes = {"vocab_size": tokenizer.vocab_size, "hidden_size": 2, "num_hidden_layers": 1}
    weights = Drawn(dataclasses.replace(CONFIG, **sizes), narrow=lambda piece: True)
    place = write(tmp_path / "mistral", "mistral", weights, tokenizer)
    original = pathlib.Path(released_file(f"mistral-{version}")).read_bytes()
    for number, form in enumerate(("orbax", "huggingface", "orbax", "mistral", "orbax", "orbax")):
        found = folders.load_tokenizer(place, tokenizer.vocab_size)
        assert found.version == version
        assert found.model_bytes == original
        # What tells AutoTokenizer of a tokenizer.model is made anew where it is wanted.
        assert main(place, tmp_path / f"{number}-{form}", form)[0] == 0
        place = tmp_path / f"{number}-{form}"
    assert mixtral_jax.load_model(place)[1].version == version


def test_checkpoints_from_before_there_was_a_version(spoken, main, tmp_path):
    main(spoken, tmp_path / "own", "orbax")
    run = own.read_run(own.find(tmp_path / "own"))
    assert set(run) == {"config", "data_state", "tokenizer", "files", "checksums"}


# ---- refusals ----------------------------------------------------------------------------------


def test_a_target_that_exists_is_left_alone(sources, refused, main, tmp_path):
    source = sources / "float32" / "mistral"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for to in FORMS:
        for name in ("full", "file", "link"):
            assert f"{tmp_path / name} exists already: name a new" in refused(
                source, tmp_path / name, to
            )
        assert "exists already" in refused(source, source, to)
        (tmp_path / to).mkdir()  # an empty one may be there
        assert main(source, tmp_path / to, to)[0] == 0
        assert any((tmp_path / to).iterdir())
        (tmp_path / f"{to}-behind").mkdir()
        (tmp_path / f"{to}-link").symlink_to(f"{to}-behind")  # so may one behind a link
        assert main(source, tmp_path / f"{to}-link", to)[0] == 0
        assert any((tmp_path / f"{to}-behind").iterdir())


def test_a_target_that_cannot_be(sources, refused, tmp_path):
    source = sources / "float32" / "mistral"
    (tmp_path / "file").write_text("")
    for to in FORMS:
        assert "cannot be written: " in refused(source, tmp_path / "file" / "x", to)
        assert "cannot be written: File name too long" in refused(
            source, tmp_path / ("n" * 300), to
        )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(sources, refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    for to in FORMS:
        said = refused(sources / "float32" / "mistral", tmp_path / "locked" / "x", to)
        assert "cannot be written: Permission denied" in said


def test_no_permission(sources, refused, tmp_path, monkeypatch):
    """The same where the tests run as root, whom nothing stops."""

    def deny(self, *arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "mkdir", deny)
    for to in FORMS:
        said = refused(sources / "float32" / "mistral", tmp_path / "x", to)
        assert f"{tmp_path / 'x'} cannot be written: Permission denied" in said


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


WRITES = {
    "tensors": (safetensors, "_write"),
    "json": (saving, "_write_json"),
    "tokenizer": (saving, "_write_tokenizer"),
    "fsync": (files.os, "fsync"),
}


@pytest.mark.parametrize("to", FORMS[1:])
@pytest.mark.parametrize("write", WRITES)
def test_a_disk_that_fills_up(sources, refused, tmp_path, monkeypatch, write, to):
    monkeypatch.setattr(*WRITES[write], full)
    said = refused(sources / "bfloat16" / "huggingface", tmp_path / "target", to)
    assert "cannot be written: No space left on device" in said


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError(f"Failed to write 9 bytes to file 5: [os_error_code='{errno.ENOSPC}'] ..."),
    ],
    ids=["os", "tensorstore"],
)
def test_a_disk_that_fills_up_under_orbax(sources, refused, tmp_path, monkeypatch, error):
    save = own_arrays.ocp.CompositeCheckpointHandler.save

    def fail(self, directory, *arguments, **keywords):
        save(self, directory, *arguments, **keywords)
        assert any(tmp_path.iterdir())
        raise error

    monkeypatch.setattr(own_arrays.ocp.CompositeCheckpointHandler, "save", fail)
    said = refused(sources / "float32" / "huggingface", tmp_path / "target", "orbax")
    assert f"{tmp_path / 'target'} cannot be written: No space left on device" in said


@pytest.mark.parametrize("to", FORMS)
def test_ctrl_c_leaves_nothing(sources, main, tmp_path, monkeypatch, to):
    def interrupt(*arguments, **keywords):
        assert to == "mistral" or any(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_write_json", interrupt)
    monkeypatch.setattr(own_arrays.ocp.CompositeCheckpointHandler, "save", interrupt)
    code, out, err = main(sources / "float32" / "huggingface", tmp_path / "target", to)
    assert (code, out, err) == (130, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("terminal", [False, True])
def test_a_bar_is_for_terminals(sources, main, tmp_path, monkeypatch, to, terminal):
    bar = functools.partial(models.tqdm.tqdm, mininterval=0)
    monkeypatch.setattr(models.tqdm, "tqdm", lambda *a, **k: bar(*a, **{**k, "delay": 0}))
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    code, out, err = main(sources / "float32" / "huggingface", tmp_path / "target", to)
    assert (code, out.count("\n")) == (0, 1)
    err = err.removesuffix("" if to == "huggingface" else UNCARRIED)
    assert bool(err) == ("B/s]" in err) == terminal
    assert "\n" not in err
    assert not err.rpartition("\r")[2]  # it is gone when all is done


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--to", "gguf"], "invalid choice: 'gguf'"),
        ([], "the following arguments are required: --to"),
        (["--to", "orbax", "--dtype", "f16"], "invalid choice: 'f16'"),
        (["--to", "orbax", "--upcycle", "many"], "invalid int value: 'many'"),
        (["--to", "orbax", "--experts"], "--experts"),
        (["--to", "orbax", "--experts-per-token", "3"], "--experts-per-token 3 needs --upcycle N"),
        (["--to", "orbax", "--seed", "0"], "--seed 0 needs --upcycle N"),
        (["--to", "mistral", "--max-shard-size", "5GB"], "'5GB' needs --to huggingface"),
    ],
)
def test_flags(sources, capsys, tmp_path, flags, words):
    assert convert.main([str(sources / "float32" / "mistral"), str(tmp_path / "x"), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not list(tmp_path.iterdir())


def test_the_command_as_a_process_of_its_own(sources, tmp_path):
    command = [sys.executable, "-m", "mixtral_jax.interop.convert"]
    source = sources / "mixed" / "huggingface"
    flags = [str(source), str(tmp_path / "target"), "--to", "mistral"]
    here = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([*command, *flags], capture_output=True, text=True, cwd=ROOT, env=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'target'}: mistral, 2 files, ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == UNCARRIED
    same(sources / "mixed" / "mistral", tmp_path / "target")
