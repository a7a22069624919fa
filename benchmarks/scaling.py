"""How a step and what devices exchange grow with devices, tokens, experts and experts a token.

    python benchmarks/scaling.py steps [--devices 1 2 4 8] [--config benchmarks/peers.yaml]
    python benchmarks/scaling.py bytes --devices 2 4 8 [--tokens 1024] [--experts 8] [--per-token 2]
    python benchmarks/scaling.py bytes --topology v5e:2x4 v5e:4x4 v5e:4x8 --experts 8 64

`steps`: the same batch on more and more emulated devices, with experts spread over all of them;
each number of devices is a process, and they take turns. The law is the time of one device: the
cores are the same.

`bytes`: what one sparse layer makes a device send to others for its rows, forward and backward, all
combinations of the lists; compiled for emulated devices, or ahead of time for slices of TPU chips
(requirements-tpu.txt, no TPU). With more devices than experts, the rest of the mesh is fsdp. The
law, with T tokens a device, C experts a token, X devices along the expert axis: 4 T C (X - 1) / X
rows, however many experts and devices there are; of padded buckets, sized for the worst case,
4 (X - 1) T min(C, E / X).
"""

from __future__ import annotations

import itertools
import math

import measure
import ours
import turns
from exchange import expected_rows
from measure import InputError

from mixtral_jax.config import MeshConfig, ModelConfig


def steps(arguments) -> None:
    if arguments.of:
        config = ours.load(arguments.config, [*arguments.overrides, f"mesh.expert={arguments.of}"])
        turns.work(turns.second_of_two(ours.Training(config).step))
        return
    command = [__file__, "steps", "--config", arguments.config, *arguments.overrides]
    commands = {str(n): [*command, "--of", str(n)] for n in arguments.devices}
    for n in arguments.devices:  # what is wrong with one is said before any starts
        ours.load(arguments.config, [*arguments.overrides, f"mesh.expert={n}"])
    results = turns.compete(commands, arguments.turns)
    tokens = math.prod(
        getattr(ours.load(arguments.config, arguments.overrides).training, name)
        for name in ("batch_size", "sequence_length")
    )
    for one in results:
        line = {
            **{"config": arguments.config, "overrides": arguments.overrides},
            "devices": int(one.name),
            **measure.limited(one.seconds, results[0].seconds),
            "tokens_per_second": tokens / one.seconds,
            "peak_bytes": one.peak_bytes,
            "turns": arguments.turns,
        }
        measure.show("scaling steps", line, one.about)


# ---- bytes -------------------------------------------------------------------------------------


def layer(config: ModelConfig, mesh, tokens: int, options: dict | None):
    """The gradient of one sparse layer, compiled for a mesh."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from mixtral_jax import sharding
    from mixtral_jax.model.mixtral import compute_dtype
    from mixtral_jax.model.moe import MoE

    graphdef, state = nnx.split(nnx.eval_shape(lambda: MoE(config, jax.random.key(0))))
    where = sharding.on(mesh, "batch")

    def loss(params, x_BLD, real_BL):
        out_BLD, _ = nnx.merge(graphdef, params)(x_BLD, real_BL)
        return (out_BLD.astype(jnp.float32) ** 2).sum()

    with jax.set_mesh(mesh):
        dtype = compute_dtype(config)
        shape = (mesh.size, tokens)
        x_BLD = jax.ShapeDtypeStruct((*shape, config.hidden_size), dtype, sharding=where)
        real_BL = jax.ShapeDtypeStruct(shape, bool, sharding=where)
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        lowered = gradient.lower(sharding.placed_shapes(state, mesh), x_BLD, real_BL)
        return lowered.compile(compiler_options=options)


def bytes_of_layer(arguments, mesh, devices: str, sizes: tuple, options: dict | None) -> dict:
    """One line: what the compiled layer sends, and what the law says."""
    import jax
    import jax.numpy as jnp

    from mixtral_jax.analysis.collectives import read_collectives
    from mixtral_jax.model.mixtral import compute_dtype
    from mixtral_jax.model.moe import exchange_of

    tokens, experts, per_token = sizes
    config = ModelConfig(
        hidden_size=arguments.width,
        intermediate_size=arguments.hidden,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_local_experts=experts,
        num_experts_per_tok=per_token,
    )
    found = read_collectives(layer(config, mesh, tokens, options).as_text(), mesh.size)
    sent = {True: 0.0, False: 0.0}
    for one in found:
        sent[one.kind.endswith("all-to-all")] += one.sent_bytes
    with jax.set_mesh(mesh):
        exchange = exchange_of(config, tokens)
        row = arguments.width * jnp.dtype(compute_dtype(config)).itemsize
    asked = (tokens, experts, per_token, exchange.shards)
    return {
        **{"devices": devices, "expert_axis": exchange.shards, "body": exchange.implementation},
        **dict(zip(("tokens", "experts", "per_token"), sizes)),
        "exchanged_bytes": round(sent[True]),
        "law_bytes": round(2 * row * expected_rows(exchange.implementation, *asked)),
        "rows_in_use_bytes": round(2 * row * expected_rows("ragged", *asked)),
        "other_bytes": round(sent[False]),
    }


def bytes_(arguments) -> None:
    from mixtral_jax import sharding

    wanted = arguments.devices if not arguments.topology else [1]
    sharding.start(MeshConfig(data=max(wanted)))
    from mixtral_jax.analysis.prices import PRICED_WITH
    from mixtral_jax.analysis.topology import get_slice

    slices = [get_slice(name) for name in arguments.topology or ()]
    places = [(s.name, s.devices, PRICED_WITH) for s in slices]
    places = places or [(str(n), None, None) for n in wanted]
    lists = (places, arguments.tokens, arguments.experts, arguments.per_token)
    for (name, devices, options), *sizes in itertools.product(*lists):
        count = len(devices) if devices else int(name)
        spread = min(count, sizes[1])
        if sizes[1] % spread or count % spread or sizes[2] > sizes[1]:
            raise InputError(
                f"--experts {sizes[1]} and --per-token {sizes[2]} do not suit {count} devices"
            )
        mesh = sharding.make_mesh(expert=spread, fsdp=count // spread, devices=devices)
        line = bytes_of_layer(arguments, mesh, name, tuple(sizes), options)
        measure.show("scaling bytes", {"width": arguments.width, **line})


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    listed = {"type": measure.positive, "nargs": "+"}
    parser.add_argument("what", choices=("steps", "bytes"))
    parser.add_argument("--devices", **listed, default=[1, 2, 4, 8], help="emulated")
    parser.add_argument("--config", default=str(measure.HERE / "peers.yaml"), help="of steps")
    parser.add_argument("--turns", type=measure.positive, default=5, help="of steps")
    parser.add_argument("--of", type=measure.positive, help="(a process of this command's own)")
    parser.add_argument("--topology", nargs="+", help="of bytes: slices such as v5e:4x4")
    parser.add_argument("--tokens", **listed, default=[1024], help="of bytes, on each device")
    parser.add_argument("--experts", **listed, default=[8], help="of bytes")
    parser.add_argument("--per-token", **listed, default=[2], help="of bytes")
    parser.add_argument("--width", type=measure.positive, default=512, help="of bytes")
    parser.add_argument("--hidden", type=measure.positive, default=512, help="of bytes")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="of steps")
    arguments = parser.parse_intermixed_args(argv)
    {"steps": steps, "bytes": bytes_}[arguments.what](arguments)


if __name__ == "__main__":
    measure.run(main)
