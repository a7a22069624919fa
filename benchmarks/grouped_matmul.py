"""The experts' matrix product, by every body that runs here, beside one dense product of its size.

    python benchmarks/grouped_matmul.py [--rows 4096 --width 512 --hidden 1792 --experts 8]

Each row belongs to one of the experts, drawn at random. `forward` is the product; `gradients` is
the product and those of its two operands. The limit is a dense product (or three) of as many rows.
One JSON line for each body and pass; all of them take turns.
"""

from __future__ import annotations

import measure
from measure import InputError

DTYPES = ("float32", "bfloat16")


def bodies_here() -> list[str]:
    """The bodies that run on this platform."""
    from mixtral_jax.kernels import grouped_matmul, platform

    return [n for n, where in grouped_matmul.PLATFORMS.items() if platform() in where]


def works(arguments, bodies: list[str], dtype: str) -> dict:
    """{(body, pass): a function that does the work}; the limits' body is "dense"."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mixtral_jax.kernels.grouped_matmul import grouped_matmul

    rows, width, hidden = arguments.rows, arguments.width, arguments.hidden
    experts = arguments.experts
    drawn = np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts))
    sizes_E = jnp.asarray(drawn, jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)
    x_RD = jax.random.normal(keys[0], (rows, width), dtype)
    w_EDF = jax.random.normal(keys[1], (experts, width, hidden), dtype)
    g_RF = jax.random.normal(keys[2], (rows, hidden), dtype)

    def passes(product, w):
        def gradients(x_RD, w, g_RF):
            out_RF, pull = jax.vjp(product, x_RD, w)
            return out_RF, pull(g_RF)

        forward, backward = jax.jit(product), jax.jit(gradients)
        return {
            "forward": lambda: forward(x_RD, w),
            "gradients": lambda: backward(x_RD, w, g_RF),
        }

    def body(name):
        return lambda x_RD, w_EDF: grouped_matmul(x_RD, w_EDF, sizes_E, implementation=name)

    found = {("dense", k): f for k, f in passes(lambda x, w: x @ w, w_EDF[0]).items()}
    for name in bodies:
        found |= {(name, k): f for k, f in passes(body(name), w_EDF).items()}
    return found


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    for name, default in (("rows", 4096), ("width", 512), ("hidden", 1792), ("experts", 8)):
        parser.add_argument(f"--{name}", type=measure.positive, default=default)
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--only", nargs="+", help="bodies; all that run here by default")
    parser.add_argument("--turns", type=measure.positive, default=9)
    arguments = parser.parse_args(argv)
    from mixtral_jax import sharding
    from mixtral_jax.config import MeshConfig

    sharding.start(MeshConfig())
    import jax

    bodies = bodies_here()
    if unknown := [name for name in arguments.only or [] if name not in bodies]:
        raise InputError(f"--only {unknown[0]!r} does not run here: {', '.join(bodies)} do")
    bodies = arguments.only or bodies
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    found = measure.take_turns(works(arguments, bodies, dtype), arguments.turns)
    for name in bodies:
        for kind in ("forward", "gradients"):
            figures = measure.limited(found[name, kind], found["dense", kind])
            sizes = {k: getattr(arguments, k) for k in ("rows", "width", "hidden", "experts")}
            line = {"body": name, "pass": kind, **sizes, "dtype": dtype, **figures}
            work = 2 * arguments.rows * arguments.width * arguments.hidden
            flops = work * (3 if kind == "gradients" else 1)
            line["gigaflops_per_second"] = flops / found[name, kind] / 1e9
            measure.show("grouped matmul", {**line, "turns": arguments.turns})


if __name__ == "__main__":
    measure.run(main)
