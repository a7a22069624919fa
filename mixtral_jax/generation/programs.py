"""What the engine runs on the devices: parts of prompts, decoding steps, and moving of rows.

    extend  parts of prompts, in as many lanes on each device that the cache's rows are split over:
            fills the cache, and makes a row's first token where its prompt ends
    decode  one more token for every row that is live
    admit   what a row remembers of its prompt and has as bias, where a request asks for it
    copy    the cache of one row into another, for a prompt that begins as one before it

Padding, rows that are not live and lanes without a part belong to segment 0: no expert works on
them, and nothing of them is written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mixtral_jax import sharding
from mixtral_jax.generation.sampling import (
    History,
    LogProbabilities,
    Parameters,
    log_probabilities,
    penalize,
    row_keys,
    sample,
)
from mixtral_jax.model.cache import Cached, spec_of
from mixtral_jax.model.mixtral import Mixtral

NOTHING = -1
"""In the place of a token: none was made. In the place of an id: there is none."""
TOP = 20
"""Log-probabilities of the most likely tokens that are given, where any are wanted."""
ENDS = 17
"""Most ids that end an answer: EOS and 16 of a request's own."""


class RowOptions(NamedTuple):
    """What the requests in the rows ask; a row of each B, split as the batch."""

    seed_B: jax.Array
    """uint32."""
    least_B: jax.Array
    """int32 tokens to make before the answer may end."""
    ends_BN: jax.Array
    """int32 ids that end it, or NOTHING."""
    logprobs_B: jax.Array
    """bool, whether log-probabilities are wanted."""
    parameters: Parameters


class Progress(NamedTuple):
    """What a program hands to the next one, which reuses its memory."""

    cache: Cached | tuple[Cached, ...]
    token_B: jax.Array
    """The newest token, which the cache does not hold yet."""
    position_B: jax.Array
    """Its place."""
    made_B: jax.Array
    """Tokens made so far."""
    live_B: jax.Array
    """False before the prompt's end, and after the answer's."""
    history: History
    bias_BV: jax.Array
    biased_B: jax.Array
    """Whether a row has another bias than 0."""


class Lanes(NamedTuple):
    """Parts of prompts in Y lanes, which are split as the batch is."""

    tokens_YL: jax.Array
    next_YL: jax.Array
    """The token after each, whose log-probability is wanted where prompts are scored."""
    row_Y: jax.Array
    """Which row, counted on the device."""
    start_Y: jax.Array
    """Place of the first token."""
    count_Y: jax.Array
    """Tokens; 0 where a lane has nothing to do."""
    last_Y: jax.Array
    """Whether the prompt ends here, and an answer begins."""


class Made(NamedTuple):
    """What a program shows to the host; the same on every device."""

    token_B: jax.Array
    """The token that each row, or lane, made, or NOTHING: where it is not live, and where its
    logits are not finite."""
    logprobs: LogProbabilities
    """Of these tokens, where any row wants them; otherwise zeros."""
    prompt: LogProbabilities | None
    """Of next_YL, where prompts are scored: a dimension L after the first."""


def functions(merge: Callable[[Any], Mixtral]) -> dict[str, Callable]:
    """The programs of a model, which `merge` makes of its parameters, to be lowered with the mesh
    set."""
    donated = {"donate_argnames": "progress"}
    return {
        "extend": jax.jit(partial(extend, merge), static_argnames="score", **donated),
        "decode": jax.jit(partial(decode, merge), **donated),
        "admit": jax.jit(admit, **donated),
        "copy": jax.jit(copy, **donated),
    }


def empty(model: Mixtral, rows: int, places: int, dtype: jnp.dtype | None = None) -> Progress:
    """A Progress in which nothing is live; with the mesh set, under jit.

    Args:
      rows: a multiple of the devices that the batch is split over.
      places: of each row, from model.cache.places.
      dtype: the cache's; what is computed in by default.
    """

    def full(value, dtype, *more):
        return jnp.full((rows, *more), value, dtype, out_sharding=sharding.spec("batch"))

    vocabulary = model.config.vocab_size
    history = History(full(False, bool, vocabulary), full(0, jnp.int32, vocabulary))
    return Progress(
        model.empty_cache(rows, places, dtype),
        *(full(0, jnp.int32) for _ in range(3)),
        full(False, bool),
        history,
        full(0, jnp.float32, vocabulary),
        full(False, bool),
    )


def extend(
    merge, params, progress: Progress, rows: RowOptions, lanes: Lanes, *, score: bool = False
):
    """Run parts of prompts; see the module."""
    model: Mixtral = merge(params)
    places_1L = jnp.arange(lanes.tokens_YL.shape[1], dtype=jnp.int32)[None]
    positions_YL = lanes.start_Y[:, None] + places_1L
    segments_YL = (places_1L < lanes.count_Y[:, None]).astype(jnp.int32)
    last_Y = jnp.maximum(lanes.count_Y - 1, 0)
    at = None if score else last_Y
    out = model.forward(lanes.tokens_YL, positions_YL, segments_YL, progress.cache, at, lanes.row_Y)
    logits_YLV = sharding.shard(out.logits_BLV, "batch", None, None)

    def body(logits_YLV, last_Y, lanes, rows, progress):
        prompt = None
        if score:
            prompt = _of_each(logits_YLV, lanes.next_YL)
            logits_YLV = jnp.take_along_axis(logits_YLV, last_Y[:, None, None], axis=1)
        mine, own = jax.tree.map(lambda array: array[lanes.row_Y], (rows, progress))
        own = own._replace(made_B=jnp.zeros_like(own.made_B))
        token_Y, logprobs, own = _choose(logits_YLV[:, 0], mine, own, lanes.last_Y)
        own = own._replace(position_B=lanes.start_Y + lanes.count_Y)
        to_Y = jnp.where(lanes.last_Y, lanes.row_Y, progress.token_B.size)  # others: dropped
        changed = jax.tree.map(lambda a, new: a.at[to_Y].set(new, mode="drop"), progress, own)
        return changed, Made(token_Y, logprobs, prompt)

    small = progress._replace(cache=None)
    small, made = _on_each_device(body, logits_YLV, last_Y, lanes, rows, small)
    return small._replace(cache=out.cache), _shown(made)


def decode(merge, params, progress: Progress, rows: RowOptions, alive_B: jax.Array):
    """One more token in each row that is live; see the module.

    Args:
      alive_B: false for rows that the host has ended.
    """
    model: Mixtral = merge(params)
    live_B = progress.live_B & alive_B
    out = model.forward(
        progress.token_B[:, None],
        progress.position_B[:, None],
        live_B.astype(jnp.int32)[:, None],
        progress.cache,
    )
    logits_BV = sharding.shard(out.logits_BLV[:, 0], "batch", None)

    def body(logits_BV, live_B, rows, progress):
        progress = progress._replace(position_B=progress.position_B + live_B)
        token_B, logprobs, progress = _choose(logits_BV, rows, progress, live_B)
        return progress, Made(token_B, logprobs, None)

    small, made = _on_each_device(body, logits_BV, live_B, rows, progress._replace(cache=None))
    return small._replace(cache=out.cache), _shown(made)


def admit(progress: Progress, row_X, use_X, in_prompt_XV, bias_XV) -> Progress:
    """Set a row's history and bias on each device, where use_X says so."""

    def body(history, bias_BV, biased_B, row_X, use_X, in_prompt_XV, bias_XV):
        new = History(in_prompt_XV, jnp.zeros_like(history.made_BV[:1]))
        put = partial(_put_row, row_X[0], use_X)
        biased_X = (bias_XV != 0).any(axis=1)
        return jax.tree.map(put, history, new), put(bias_BV, bias_XV), put(biased_B, biased_X)

    history, bias_BV, biased_B = _on_each_device(
        *(body, progress.history, progress.bias_BV, progress.biased_B),
        *(row_X, use_X, in_prompt_XV, bias_XV),
    )
    return progress._replace(history=history, bias_BV=bias_BV, biased_B=biased_B)


def copy(progress: Progress, source: jax.Array, target: jax.Array) -> Progress:
    """Put the cache of row `source` into row `target`, wherever they lie."""
    stacked = isinstance(progress.cache, Cached)
    axis, spec = (1 if stacked else 0), spec_of(stacked)

    def body(cache, source, target):
        def one(array):
            rows = array.shape[axis]
            first = lax.axis_index(sharding.BATCH_AXES) * rows

            def mine(row):
                return (row >= first) & (row < first + rows), jnp.clip(row - first, 0, rows - 1)

            has, at = mine(source)
            row = lax.dynamic_slice_in_dim(array, at, 1, axis)
            row = lax.psum(jnp.where(has, row, 0), sharding.BATCH_AXES).astype(array.dtype)
            wants, at = mine(target)
            before = lax.dynamic_slice_in_dim(array, at, 1, axis)
            return lax.dynamic_update_slice_in_dim(array, jnp.where(wants, row, before), at, axis)

        return jax.tree.map(one, cache)

    whole = sharding.spec()
    run = jax.shard_map(body, in_specs=(spec, whole, whole), out_specs=spec, check_vma=False)
    return progress._replace(cache=run(progress.cache, source, target))


# ---- within a device ---------------------------------------------------------------------------


def _on_each_device(body: Callable, *arguments):
    """Arrays that are split as the batch, and results that are."""
    rows = sharding.spec("batch")
    return jax.shard_map(body, in_specs=rows, out_specs=rows, check_vma=False)(*arguments)


def _put_row(row, use_1, array, new):
    """An array with a new row, if it is to be used."""
    use = use_1.reshape((1,) * new.ndim)
    before = lax.dynamic_slice_in_dim(array, row, 1)
    chosen = jnp.where(use, new, before).astype(array.dtype)
    return lax.dynamic_update_slice_in_dim(array, chosen, row, axis=0)


def _shown(made: Made) -> Made:
    return jax.tree.map(lambda a: sharding.shard(a, *[None] * a.ndim), made)


def _of_each(logits_YLV, token_YL) -> LogProbabilities:
    """Log-probabilities of a token at each place, with a dimension L after the first."""
    width = logits_YLV.shape[-1]
    flat = log_probabilities(logits_YLV.reshape(-1, width), token_YL.reshape(-1), min(TOP, width))
    return jax.tree.map(lambda a: a.reshape(*token_YL.shape, *a.shape[1:]), flat)


def _choose(logits_BV, rows: RowOptions, progress: Progress, live_B):
    """Sample where live: (token_B or NOTHING, log-probabilities, the new progress).

    Logits that are not finite end the answer, with NOTHING.
    """
    vocabulary = logits_BV.shape[1]
    logits_BV = logits_BV.astype(jnp.float32)
    row_B1 = jnp.arange(logits_BV.shape[0])[:, None]
    early_B = progress.made_B < rows.least_B
    forbids_BN = early_B[:, None] & (rows.ends_BN != NOTHING)
    changed_BV = penalize(
        *(logits_BV, rows.parameters, progress.history, progress.bias_BV),
        *(progress.biased_B & live_B, jnp.where(forbids_BN, rows.ends_BN, vocabulary)),
    )
    token_B = sample(row_keys(rows.seed_B, progress.made_B), changed_BV, rows.parameters)

    def wanted():
        return log_probabilities(logits_BV, token_B, min(TOP, vocabulary))

    shapes = jax.eval_shape(wanted)
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    logprobs = lax.cond((rows.logprobs_B & live_B).any(), wanted, lambda: nothing)

    finite_B = jnp.isfinite(logits_BV).all(axis=1)
    ended_B = (token_B[:, None] == rows.ends_BN).any(axis=1) | ~finite_B
    one_B = live_B.astype(jnp.int32)
    made_BV = progress.history.made_BV.at[row_B1[:, 0], token_B].add(one_B)
    progress = progress._replace(
        token_B=jnp.where(live_B, token_B, progress.token_B),
        made_B=progress.made_B + one_B,
        live_B=jnp.where(live_B, ~ended_B, progress.live_B),
        history=progress.history._replace(made_BV=made_BV),
    )
    return jnp.where(live_B & finite_B, token_B, NOTHING), logprobs, progress
