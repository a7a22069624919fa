"""Rows to their experts and back: time, and bytes between devices, beside what they must take.

    python benchmarks/exchange.py [--tokens 2048] [--experts 8] [--per-token 2] [--shards 1 2 4 8]

All combinations of the lists given, on as many (emulated) devices as the largest of --shards; every
token goes to distinct experts, drawn at random. Measured is all between routing and the experts'
products and between these and the sum: laying rows out, sending, sorting, and the way back.

`sent_bytes` is what the program makes a device send, there and back; `expected_bytes` is the law,
2 T k (X - 1) / X rows, or for padded buckets, which are sized for the worst case, 2 (X - 1) T
min(k, E / X) rows. The limit on emulated devices, which share one memory, is reading and writing
all rows in use once each way at the measured read bandwidth; elsewhere the links, if
--link-gigabytes-per-second (out of one device, one way) is given.
"""

from __future__ import annotations

import itertools

import measure
from measure import InputError


def expected_rows(body: str, tokens: int, experts: int, per_token: int, shards: int) -> float:
    """Rows that a device sends to others, there and back."""
    if body == "padded":
        return 2 * (shards - 1) * tokens * min(per_token, experts // shards)
    return 2 * tokens * per_token * (shards - 1) / shards


def prepare(body: str, tokens: int, experts: int, per_token: int, shards: int, width: int, dtype):
    """(compiled program, its arguments): each device's tokens go to their experts and come back."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mixtral_jax import sharding
    from mixtral_jax.kernels import exchange as exchanges
    from mixtral_jax.kernels.rows import take_rows
    from mixtral_jax.model.moe import lay_out, rank_assignments

    exchange = exchanges.make(
        *(body, sharding.EXPERT, shards), tokens=tokens, experts=experts, per_token=per_token
    )

    def device(x_TD, ids_TC):
        ranked = rank_assignments(ids_TC, experts, None)
        plan = exchanges.plan(exchange, ranked.wanted_E)
        dispatch = lay_out(ids_TC, ranked, plan, exchange.send_rows)
        sent_SD = take_rows(x_TD, dispatch.token_S, dispatch.row_CT)
        received_RD = exchanges.send(exchange, plan, sent_SD)
        returned_SD = exchanges.send_back(exchange, plan, received_RD)
        return take_rows(returned_SD, dispatch.row_CT.reshape(-1), dispatch.assignment_S[None])

    mesh = sharding.make_mesh(expert=shards)
    random = np.random.default_rng(0)
    order = random.random((tokens * shards, experts)).argsort(axis=1)
    where = sharding.on(mesh, "batch")
    x = jnp.asarray(random.normal(size=(tokens * shards, width)), dtype)
    arguments = jax.device_put((x, order[:, :per_token].astype(np.int32)), where)
    with jax.set_mesh(mesh):
        spec = sharding.spec("batch")
        program = jax.jit(jax.shard_map(device, in_specs=(spec, spec), out_specs=spec))
        return program.lower(*arguments).compile(), arguments


def sent_bytes(compiled, devices: int) -> int:
    """Rows that the program makes a device send, in bytes, by its text."""
    from mixtral_jax.analysis.collectives import read_collectives

    found = read_collectives(compiled.as_text(), devices)
    return round(sum(one.sent_bytes for one in found if one.kind.endswith("all-to-all")))


def bodies(shards: int) -> list[str]:
    """Those that run here; local is for experts that are not spread over devices."""
    from mixtral_jax.kernels import exchange as exchanges
    from mixtral_jax.kernels import platform

    if shards == 1:
        return ["local"]
    names = ("padded", "ragged")
    return [name for name in names if platform() in exchanges.PLATFORMS[name]]


def lines(arguments, dtype: str) -> list[dict]:
    """One for each combination and body, all taking turns."""
    import jax
    import jax.numpy as jnp

    sizes = (arguments.tokens, arguments.experts, arguments.per_token, arguments.shards)
    found, works = [], {}
    for tokens, experts, per_token, shards in itertools.product(*sizes):
        for body in bodies(shards):
            asked = (body, tokens, experts, per_token, shards)
            compiled, operands = prepare(*asked, arguments.width, dtype)
            works[asked] = lambda compiled=compiled, operands=operands: compiled(*operands)
            row_bytes = arguments.width * jnp.dtype(dtype).itemsize
            line = dict(zip(("body", "tokens", "experts", "per_token", "shards"), asked))
            line |= {"width": arguments.width, "dtype": dtype}
            line["sent_bytes"] = sent_bytes(compiled, shards)
            line["expected_bytes"] = round(row_bytes * expected_rows(*asked))
            found.append(line)
    times = measure.take_turns(works, arguments.turns)
    emulated = jax.default_backend() == "cpu"
    rate = measure.read_rate() if emulated else None
    for line, asked in zip(found, works):
        body, tokens, _, per_token, shards = asked
        if emulated:
            moved = 4 * shards * tokens * per_token * row_bytes  # read and written, there and back
            limit = moved / rate
        else:
            links = arguments.link_gigabytes_per_second
            needed = row_bytes * expected_rows("ragged", *asked[1:])
            limit = needed / links / 1e9 if links and shards > 1 else None
        line |= {**measure.limited(times[asked], limit), "turns": arguments.turns}
    return found


def check(arguments) -> None:
    for experts, shards, per_token in itertools.product(
        arguments.experts, arguments.shards, arguments.per_token
    ):
        if experts % shards:
            raise InputError(f"--shards {shards} does not divide --experts {experts}")
        if per_token > experts:
            raise InputError(f"--per-token {per_token} is more than --experts {experts}")


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    listed = {"type": measure.positive, "nargs": "+"}
    parser.add_argument("--tokens", **listed, default=[2048], help="on each device")
    parser.add_argument("--experts", **listed, default=[8])
    parser.add_argument("--per-token", **listed, default=[2])
    parser.add_argument("--shards", **listed, default=[1, 2, 4, 8], help="devices")
    parser.add_argument("--width", type=measure.positive, default=512)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--turns", type=measure.positive, default=9)
    parser.add_argument("--link-gigabytes-per-second", type=measure.positive)
    arguments = parser.parse_args(argv)
    check(arguments)
    from mixtral_jax import sharding
    from mixtral_jax.config import MeshConfig

    sharding.start(MeshConfig(expert=max(arguments.shards)))
    import jax

    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    for line in lines(arguments, dtype):
        measure.show("exchange", line)


if __name__ == "__main__":
    measure.run(main)
