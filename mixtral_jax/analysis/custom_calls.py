"""Pallas kernels in a compiled program, and what the compiler's estimate makes of them.

The compiler looks into no kernel. One whose author states a cost is priced by it: grouped products
state that of every row of their buffer, in use or not, and of every expert's matrix. One without,
such as splash attention, is priced as the memory traffic of its arguments, its arithmetic as
nothing.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from mixtral_jax.analysis.chips import Chip
from mixtral_jax.analysis.collectives import shape_bytes

ATTENTION_UTILISATION = 0.5
"""Of the chip's peak, what splash attention is taken to reach: an assumption. Softmax takes turns
with the products, and a head of 128 fills half of the matrix unit of the newer chips."""

_CALL = re.compile(
    r"^\s*(?:ROOT )?%?([\w-]+?)(?:\.\d+)* = .* custom-call\(.*"
    r'custom_call_target="tpu_custom_call", operand_layout_constraints=\{(.*)$'
)
_COST = re.compile(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_SHAPE = re.compile(r"\b[a-z]+\d+\[([\d,]*)\]")
_GROUPED = re.compile(r"(^|_)t?gmm(_|$)|^ragged-dot")  # jvp_jit_gmm__ outside a loop
_ATTENTION = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")


_NAMELESS = re.compile(r'custom_call_target="(ConcatBitcast|ZeroCrop|SliceId)"')


def missing_seconds(text: str) -> int:
    """What the estimate lacks for calls of the compiler's own that it has no price for.

    They join slices of a fetched array, or belong to what goes between slices of chips; each counts
    as minus one second.
    """
    return len(_NAMELESS.findall(text))


class CustomCall(NamedTuple):
    """One Pallas kernel of a program."""

    name: str
    operands: tuple[tuple[int, ...], ...]
    """Their shapes."""
    flops: float
    """By its author's statement, as the bytes; 0 where there is none."""
    bytes: float
    matrices: float
    """Bytes of the operands of three dimensions: of a grouped product, the matrices."""


class Cost(NamedTuple):
    """What some kernels do, and for how long."""

    flops: float
    bytes: float
    seconds: float


def read_calls(text: str) -> list[CustomCall]:
    """The Pallas kernels of an optimized HLO program, each as often as it stands in the text."""
    calls = []
    for line in text.splitlines():
        if found := _CALL.match(line):
            operands = found[2].partition("}}")[0]
            types = [match[0] for match in _SHAPE.finditer(operands)]
            shapes = tuple(
                tuple(int(n) for n in dimensions.split(",") if n)
                for dimensions in _SHAPE.findall(operands)
            )
            matrices = sum(shape_bytes(one) for one, of in zip(types, shapes) if len(of) == 3)
            cost = _COST.search(line)
            flops, size = (float(n) for n in cost.groups()) if cost else (0.0, 0.0)
            calls.append(CustomCall(found[1], shapes, flops, size, matrices))
    return calls


def surplus(
    calls: list[CustomCall], share: float, chip: Chip, visited: float | None = None
) -> Cost:
    """What the estimate has too much for grouped products, of whose rows only a share is in use.

    Priced as the compiler prices a kernel: by its arithmetic or by its memory traffic, whichever
    takes longer, at the compiler's own rates. The gradient of the matrices by ragged_dot is no
    kernel, and does work on every row.

    Args:
      visited: of a device's experts, those that rows go to: the matrices of others are not read,
        and theirs once. None where many rows read them over and over.
    """
    grouped = [call for call in calls if _GROUPED.search(call.name)]
    stated = _total([_priced(call.flops, call.bytes, chip) for call in grouped])
    used = _total(
        [_priced(share * call.flops, _read(call, share, visited), chip) for call in grouped]
    )
    return Cost(*(had - has for had, has in zip(stated, used)))


def _read(call: CustomCall, share: float, visited: float | None) -> float:
    if visited is None:
        return share * call.bytes
    return share * (call.bytes - call.matrices) + visited * call.matrices


def _priced(flops: float, size: float, chip: Chip) -> Cost:
    return Cost(flops, size, max(flops / chip.priced_flops, size / chip.priced_bytes))


def _total(costs: list[Cost]) -> Cost:
    return Cost(*(sum(cost[i] for cost in costs) for i in range(3)))


def unpriced(calls: list[CustomCall], peak_flops: float) -> Cost:
    """The arithmetic of attention kernels that the compiler prices as nothing."""
    kinds = [
        (match[1], call)
        for call in calls
        if not call.flops and (match := _ATTENTION.search(call.name))
    ]
    fused = all(kind != "dq" for kind, _ in kinds)
    flops = sum(attention_flops(kind, call, fused) for kind, call in kinds)
    return Cost(flops, 0.0, flops / (ATTENTION_UTILISATION * peak_flops))


def attention_flops(kind: str, call: CustomCall, fused: bool) -> float:
    """Of one call of a splash attention kernel, causal.

    Products of [L, H] and [H, S] or [L, S] and [S, H]: forward two; backward five in a fused kernel
    (scores again, and the gradients of the weights, q, k and v), or three for q and four for k and
    v. The first operand has a number for each block of queries and keys; those above the diagonal
    are not computed.
    """
    products = {"fwd": 2, "dq": 3, "dkv": 5 if fused else 4}[kind]
    blocks = max(call.operands[0])
    queries = next(shape for shape in call.operands if len(shape) > 2 and shape != call.operands[0])
    length = queries[-2]
    scores = length**2 * (blocks + 1) / (2 * blocks)
    return products * 2 * scores * queries[-1] * math.prod(queries[:-2])
