"""Pickles: without PyTorch, with code in them, and of other things than tensors."""

import os
import pickle

import numpy as np
import pytest
from checkpoint_faults import message_of
from checkpoint_files import (
    MISTRAL,
    tensors,
    write,
)

from mixtral_jax.config import InputError
from mixtral_jax.interop import folders, pickles


class Runs:
    """Unpickled without care, this makes a file."""

    def __init__(self, path):
        self._path = path

    def __reduce__(self):
        return os.mkdir, (str(self._path),)


@pytest.fixture
def pickled(tmp_path):
    """pickled(values): a folder in Mistral's form whose weights are a pickle of PyTorch's."""

    def make(values, config="mistral"):
        torch = pytest.importorskip("torch")
        folder = tmp_path / "pickled"
        write(folder, config)
        (folder / MISTRAL).unlink()
        torch.save(values(torch) if callable(values) else values, folder / "consolidated.00.pth")
        return folder

    return make


def test_pickles_without_torch_say_what_to_install(tmp_path, monkeypatch, refuses):
    folder = write(tmp_path / "pickles", "mistral")
    (folder / MISTRAL).rename(folder / "consolidated.00.pth")
    monkeypatch.setattr(pickles.importlib.util, "find_spec", lambda name: None)
    message = message_of(folder)
    assert str(folder / "consolidated.00.pth") in message
    command = f"python -m mixtral_jax.interop.convert {folder} TARGET --to mistral"
    assert f"pip install torch && {command}" in message
    assert refuses(folder) == f"error: {message}\n"


@pytest.mark.parametrize("form", ["zip", "old", "bare"])
def test_a_pickle_that_runs_code_is_refused_and_runs_none(pickled, tmp_path, form):
    torch = pytest.importorskip("torch")
    target = tmp_path / "ran"
    folder = pickled({"norm.weight": Runs(target)})
    path = folder / "consolidated.00.pth"
    if form == "old":
        torch.save({"a": Runs(target)}, path, _use_new_zipfile_serialization=False)
    if form == "bare":
        path.write_bytes(pickle.dumps({"a": Runs(target)}))
    message = message_of(folder)
    assert f"{path} cannot be read as a file of weights only" in message
    assert not target.exists()
    pickle.loads(pickle.dumps(Runs(target)))  # it would have
    assert target.exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1, 2], "holds a list, not tensors by name"),
        ({"a\nb": 7}, r"'a\nb' is a int, not a tensor"),
        ({3: 7}, "3 is a int, not a tensor"),
        (lambda torch: {"a": torch.zeros(2, 3).to_sparse()}, "'a'"),
        (lambda torch: {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, "'a'"),
        (
            lambda torch: {"a": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)},
            "'a'",
        ),
        (lambda torch: {"a": torch.zeros(2, 3, device="meta")}, "'a'"),
        (lambda torch: {"norm.weight": torch.zeros(3)}, "tensor"),
    ],
    ids=["list", "number", "key", "sparse", "float8", "quantized", "meta", "one"],
)
def test_a_pickle_of_something_else(pickled, values, words):
    folder = pickled(values)
    message = message_of(folder)
    assert str(folder) in message
    assert words in message


def test_parameters_in_a_pickle_are_tensors_too(pickled, tmp_path):
    torch = pytest.importorskip("torch")
    write(tmp_path / "native", "mistral")
    arrays = tensors(tmp_path / "native")
    made = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in arrays.items()}
    weights = folders.open_weights(pickled(made))
    for place in weights.places.values():
        np.testing.assert_array_equal(place.file.array(place.entry.name), arrays[place.entry.name])


def test_a_pickle_cut_short(pickled):
    folder = pickled({})
    path = folder / "consolidated.00.pth"
    for length in (0, 1, 99, -1):
        path.write_bytes(path.read_bytes()[:length])
        assert str(path) in message_of(folder)


def test_a_pickle_that_is_none(tmp_path):
    """Said before PyTorch looks: a named pipe would be waited for."""
    path = tmp_path / "consolidated.00.pth"
    os.mkfifo(path)
    with pytest.raises(InputError, match="is not a regular file"):
        pickles.PickleFile(path)
    path.unlink()
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(InputError, match="is a Git LFS pointer, not the file itself"):
        pickles.PickleFile(path)
