"""The engine's programs, each compiled once, and when they are needed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax

from mixtral_jax.generation.programs import functions
from mixtral_jax.model.mixtral import Mixtral


@functools.cache
def small_products() -> dict[str, str]:
    """Options with which XLA:CPU multiplies a few rows twice as fast; none where it has them not.

    Its products are of the YNNPACK library otherwise, which is as fast as Eigen from 64 rows on.
    """
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            jax.jit(lambda: 0).lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError:  # another version of XLA
            return {}
    return options


class Programs:
    """The programs of one model on one mesh, each compiled once for each of its shapes.

        extend(params, progress, rows, lanes, score=False) -> (progress, made)
        decode(params, progress, rows, alive_B) -> (progress, made)
        admit(progress, row_X, use_X, in_prompt_XV, bias_XV) -> progress
        copy(progress, source, target) -> progress; rows counted over all devices

    All give the memory of `progress` to their result.
    """

    def __init__(
        self, merge: Callable[[Any], Mixtral], mesh: jax.sharding.Mesh, options: dict[str, str]
    ):
        """Args: merge: makes the model of its parameters; options: of the compiler."""
        self._mesh, self._functions, self._options = mesh, functions(merge), options
        self._compiled: dict[tuple, Future] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str, *arguments, shape: tuple[int, ...] = (), **options):
        """Run a program; `shape` tells its shapes apart."""
        return self._future(name, arguments, shape, options).result()(*arguments)

    def begin(self, name: str, *arguments) -> None:
        """Compile a program in a thread of its own, while another one compiles here."""
        shapes = jax.tree.map(jax.typeof, arguments)
        arguments = jax.tree.map(
            lambda a, t: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=a.sharding),
            arguments,
            shapes,
        )
        call = partial(self._future, name, arguments, (), {})
        threading.Thread(target=call, daemon=True).start()

    def __len__(self) -> int:
        """How many have been compiled."""
        return len(self._compiled)

    def _future(self, name: str, arguments, shape: tuple[int, ...], options: dict) -> Future:
        key = (name, shape, *sorted(options.items()))
        future = mine = None
        try:
            with self._lock:
                future = self._compiled.get(key)
                if future is None:
                    future = mine = self._compiled[key] = Future()
            if mine is not None:
                with jax.set_mesh(self._mesh):
                    lowered = self._functions[name].lower(*arguments, **options)
                    mine.set_result(lowered.compile(compiler_options=self._options))
        except BaseException as error:  # Ctrl-C too, anywhere: no one may wait for it for ever
            if mine is None or mine.done():
                raise
            with self._lock:
                del self._compiled[key]
            mine.set_exception(error)
        return future
