"""Does a model fit? Compile its prefill and decode for TPUs that are not there, and add up.

    python benchmarks/fit.py --model mixtral_8x7b --topology v5e:2x4 mesh.expert=8
    python benchmarks/fit.py --table       # the rows of docs/weights.md

One JSON line: bytes on each device of the weights, the cache and the compiler's temporaries, with
bf16 weights and cache. Needs libtpu (requirements-tpu.txt), not a TPU.
"""

from __future__ import annotations

import time
from functools import partial

import jax
import measure

from mixtral_jax import config_io
from mixtral_jax.analysis import generation_report
from mixtral_jax.analysis import topology as topologies
from mixtral_jax.analysis.memory import bytes_of, memory_of
from mixtral_jax.config import MeshConfig, check_mesh
from mixtral_jax.model.mixtral import chosen_kernels
from mixtral_jax.model.unstacked import whole_fits

GIB = 2**30
TABLE = [
    ("mixtral_8x7b", "v5e:2x4", {"expert": 8}, 8, 4096),
    ("mixtral_8x7b", "v5e:4x4", {"expert": 8, "tensor": 2}, 8, 4096),
    ("mixtral_8x7b", "v5p:2x2x1", {"expert": 4}, 8, 4096),
    ("mixtral_8x7b", "v6e:2x2", {"expert": 4}, 4, 4096),
    ("mixtral_8x7b", "v6e:2x4", {"expert": 8}, 8, 4096),
    ("mixtral_8x22b", "v5e:4x8", {"expert": 8, "tensor": 4}, 8, 4096, "padded"),
    ("mixtral_8x22b", "v5p:2x2x1", {"expert": 4}, 8, 4096),
    ("mixtral_8x22b", "v5p:2x2x2", {"expert": 8}, 8, 4096),
    ("mixtral_8x22b", "v6e:4x4", {"expert": 8, "tensor": 2}, 8, 4096),
]


def fit(
    model: str, topology: str, mesh_sizes: dict, batch: int, context: int, exchange: str = ""
) -> dict:
    """What `batch` sequences of `context` tokens, half of them prompt, take on each device."""
    config = config_io.from_dict(
        {
            "model": {
                **{"preset": model, "param_dtype": "bfloat16", "compute_dtype": "bfloat16"},
                "exchange": exchange,
            },
            "training": {"batch_size": MeshConfig(**mesh_sizes).batch_shards},
        }
    ).model
    check_mesh(config, MeshConfig(**mesh_sizes))
    target = topologies.get_slice(topology)
    mesh = topologies.make_mesh(MeshConfig(**mesh_sizes), target)

    began = time.perf_counter()
    asked = generation_report.Batch(batch, context // 2, context - context // 2)
    with jax.set_mesh(mesh):
        kernels = chosen_kernels(config, batch, asked.length)
    whole = whole_fits(generation_report.shapes_of(config, asked), mesh, target.limit)
    both = generation_report.two_programs(config, mesh, asked, whole)
    found = {
        kind: memory_of(partial(program.compile, mesh), program.arguments, target.limit)
        for kind, program in both.items()
    }
    peaks = {kind: one["bytes_per_device"]["total"] for kind, one in found.items()}
    params, progress, *_ = both["decode"].arguments
    return {
        "model": model,
        "topology": topology,
        "mesh": mesh_sizes,
        "exchange": kernels["exchange"],
        "batch": batch,
        "context": context,
        "weights_gib": round(bytes_of(params) / GIB, 2),
        "cache_gib": round(bytes_of(progress.cache) / GIB, 2),
        "prefill_gib": round(peaks["prefill"] / GIB, 2),
        "decode_gib": round(peaks["decode"] / GIB, 2),
        "chip_gib": round(target.limit / GIB),
        "fits": all(one["fits"] for one in found.values()),
        "compile_seconds": round(time.perf_counter() - began, 1),
    }


def main(argv: list[str] | None = None) -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--model", default="mixtral_8x7b")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--batch", type=measure.positive, default=8)
    parser.add_argument("--context", type=measure.positive, default=4096)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="mesh.axis=N, model.exchange=padded")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.table:
        for row in TABLE:
            measure.show("fit", fit(*row))
        return
    values = config_io.apply_overrides({}, arguments.overrides)
    mesh = config_io.section_from_dict("mesh", values.get("mesh"))
    result = fit(
        arguments.model,
        arguments.topology,
        {axis: getattr(mesh, axis) for axis in values.get("mesh", {})},
        arguments.batch,
        arguments.context,
        values.get("model", {}).get("exchange", ""),
    )
    measure.show("fit", result)


if __name__ == "__main__":
    measure.run(main)
