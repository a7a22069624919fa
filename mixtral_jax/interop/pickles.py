"""Mistral's pickled weights, through the loader of PyTorch that runs no code of theirs."""

from __future__ import annotations

import importlib.util
import pathlib
import stat
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from mixtral_jax.command_line import one_line
from mixtral_jax.config import InputError
from mixtral_jax.interop.safetensors import TensorInfo
from mixtral_jax.interop.strict_json import quote, refuse_pointer

PATTERNS = ("consolidated.[0-9][0-9].pth", "consolidated.[0-9][0-9].pt")


def find(folder: pathlib.Path) -> list[pathlib.Path]:
    """The pickles of a folder: consolidated.00.pth, or consolidated.00.pt to .07.pt."""
    return next((found for p in PATTERNS if (found := sorted(folder.glob(p)))), [])


class PickleFile:
    """A file of tensors that torch.save wrote; the same interface as SafetensorsFile."""

    def __init__(self, path: pathlib.Path):
        """Raises InputError if PyTorch's weights_only loader refuses the file."""
        _check_file(path)
        import torch  # not a requirement of this project

        self.path = path
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise InputError(
                f"{one_line(path)} cannot be read as a file of weights only: {one_line(reason)}"
            ) from None
        if not isinstance(loaded, dict):
            raise InputError(
                f"{one_line(path)} holds a {type(loaded).__name__}, not tensors by name"
            )
        self._arrays = {name: _to_numpy(tensor, path, name) for name, tensor in loaded.items()}
        self.tensors, at = {}, 0
        for name, array in self._arrays.items():
            self.tensors[name] = TensorInfo(array.dtype, array.shape, at, at + array.nbytes)
            at += array.nbytes

    def array(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def prefetch(self, name: str) -> None:
        """Left to the system."""

    def release(self, name: str) -> None:
        """Left to the system, which may drop pages of a mapped file when it needs them."""

    def close(self) -> None:
        self._arrays = {}


def _check_file(path: pathlib.Path) -> None:
    """Refuse what PyTorch would wait for, or name in many words."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(f"{one_line(path)} is not a regular file: name a file of weights")
        with open(path, "rb") as file:
            refuse_pointer(file.read(99), one_line(path))
    except OSError as error:
        raise InputError(f"{one_line(path)} cannot be read: {error.strerror}") from None


def _to_numpy(tensor: object, path: pathlib.Path, name: object) -> np.ndarray:
    import torch

    where = f"{one_line(path)}: {quote(name)}"
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        raise InputError(f"{where} is a {type(tensor).__name__}, not a tensor")
    tensor = tensor.detach()  # a module's parameter
    try:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError):  # sparse, quantized, of float8 or without data
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise InputError(f"{where} is {kind}: NumPy cannot hold it as it is") from None


def open_pickles(paths: Sequence[pathlib.Path]) -> list[PickleFile]:
    """The files, if PyTorch is installed.

    Raises:
      InputError: saying what to install and to run, if it is not.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{one_line(paths[0])} is a pickle, which may run code when loaded: install PyTorch, "
            f"whose safe loader is used then, and convert it: pip install torch && python -m "
            f"mixtral_jax.interop.convert {one_line(paths[0].parent)} TARGET --to mistral"
        )
    return [PickleFile(path) for path in paths]
