"""Prefill and decode: many prompts of different lengths as one batch, a step of tokens at a time.

Two programs, each compiled once for each of its shapes:

  prefill  all prompts at once, padded on the right: fills the cache, makes every row's first token
  decode   one more token for every row that is still live

The shapes are few. Prompts are padded to a power of two, answers too, and the cache holds both:
slots = bucket(longest prompt) + bucket(most new tokens), none of them above the model's context.
The batch is padded to a multiple of the devices it is split over. Padding, and rows that have
ended, belong to segment 0: no expert works on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.generation.request import Request, check_requests
from mixtral_jax.generation.sampling import Parameters, row_keys, sample
from mixtral_jax.model.cache import LayerCache
from mixtral_jax.model.mixtral import Mixtral
from mixtral_jax.model.unstacked import unstacked

NOTHING = -1  # in the place of a token, from a row that has ended
LEAST_BUCKET = 16


class Rows(NamedTuple):
    """What stays as it is while a batch is answered."""

    length_B: jax.Array
    """int32 tokens of the prompt; 0 for a row that only fills up the batch."""
    most_B: jax.Array
    """int32, most tokens to make."""
    seed_B: jax.Array
    """uint32."""
    parameters: Parameters


class Progress(NamedTuple):
    """What a step hands to the next one, which reuses its memory."""

    cache: LayerCache | tuple[LayerCache, ...]
    token_B: jax.Array
    """The newest token, which the cache does not hold yet."""
    made_B: jax.Array
    """Tokens made so far."""
    live_B: jax.Array
    """False once a row has ended."""


class Made(NamedTuple):
    """What a step shows to the host; the same on every device."""

    token_B: jax.Array
    """The token that each row made, or NOTHING."""
    any_live: jax.Array
    """Whether another step is needed."""


def bucket(length: int, most: int) -> int:
    """The power of two, 16 or more, that holds a length, or `most` where that is less."""
    return min(most, max(LEAST_BUCKET, 1 << (length - 1).bit_length()))


# ---- on the devices ----------------------------------------------------------------------------


def prefill(
    graphdef: nnx.GraphDef,
    eos_id: int,
    params: nnx.State,
    tokens_BL: jax.Array,
    rows: Rows,
    *,
    slots: int,
) -> tuple[Progress, Made]:
    """Run the prompts and make each row's first token.

    Args:
      graphdef, params: the model, from nnx.split.
      eos_id: ends a row, without being one of its tokens.
      tokens_BL: int32 prompts, padded on the right.
      slots: tokens that a row of the cache holds, at least L.
    """
    model = nnx.merge(graphdef, params)
    batch, length = tokens_BL.shape
    cache = model.empty_cache(batch, length)
    positions_BL = jnp.zeros_like(tokens_BL) + jnp.arange(length)[None]
    segments_BL = (positions_BL < rows.length_B[:, None]).astype(jnp.int32)
    last_B = jnp.maximum(rows.length_B - 1, 0)
    out = model.forward(tokens_BL, positions_BL, segments_BL, cache, last_B)
    cache = jax.tree.map(partial(_longer, slots=slots), out.cache)
    made_B = jnp.zeros_like(rows.length_B)
    return _advance(eos_id, cache, out.logits_BLV, rows, made_B, rows.length_B > 0)


def decode(
    graphdef: nnx.GraphDef, eos_id: int, params: nnx.State, progress: Progress, rows: Rows
) -> tuple[Progress, Made]:
    """Make one more token in each live row; arguments as for `prefill`."""
    model = nnx.merge(graphdef, params)
    position_B = jnp.maximum(rows.length_B + progress.made_B - 1, 0)
    out = model.forward(
        progress.token_B[:, None],
        position_B[:, None],
        progress.live_B.astype(jnp.int32)[:, None],
        progress.cache,
    )
    return _advance(eos_id, out.cache, out.logits_BLV, rows, progress.made_B, progress.live_B)


def programs(graphdef: nnx.GraphDef, eos_id: int) -> tuple[Callable, Callable]:
    """(prefill, decode) for jit: of (params, tokens_BL, rows, slots) and (params, progress, rows).

    Decoding gives the memory of `progress` to its result.
    """
    first = jax.jit(partial(prefill, graphdef, eos_id), static_argnames="slots")
    return first, jax.jit(partial(decode, graphdef, eos_id), donate_argnames="progress")


def _longer(cache_BSKH, slots: int) -> jax.Array:
    """A cache, perhaps of stacked layers, with that many slots."""
    more = [(0, 0)] * cache_BSKH.ndim
    more[-3] = (0, slots - cache_BSKH.shape[-3])
    return jnp.pad(cache_BSKH, more)


def _advance(eos_id, cache, logits_BLV, rows, made_B, live_B) -> tuple[Progress, Made]:
    with jax.named_scope("sample"):
        token_B = _next_tokens(logits_BLV[:, 0], rows, made_B)
    made_one_B = live_B & (token_B != eos_id)
    made_B = made_B + made_one_B
    live_B = made_one_B & (made_B < rows.most_B)
    shown_B = sharding.shard(jnp.where(made_one_B, token_B, NOTHING), None)
    return Progress(cache, token_B, made_B, live_B), Made(shown_B, live_B.any())


def _next_tokens(logits_BV, rows: Rows, made_B) -> jax.Array:
    """Each device samples its own rows, over the whole vocabulary."""

    def local(logits_BV, seed_B, made_B, parameters):
        return sample(row_keys(seed_B, made_B), logits_BV, parameters)

    batch = sharding.spec("batch")
    body = jax.shard_map(local, in_specs=batch, out_specs=batch)
    logits_BV = sharding.shard(logits_BV, "batch", None)
    return body(logits_BV, rows.seed_B, made_B, rows.parameters)


# ---- on the host -------------------------------------------------------------------------------


class Engine:
    """Answers requests with one model on one mesh.

        engine = Engine(model, mesh, eos_id=tokenizer.eos_id)
        for made in engine.stream([Request((1, 17, 4)), Request((1,))]):
            ...  # {0: token, 1: token}, as they come

    A request's answer depends on nothing else in its batch, up to the rounding of sums.
    """

    def __init__(self, model: Mixtral, mesh: jax.sharding.Mesh, eos_id: int):
        """Args: a model whose parameters lie on the mesh, and the id that ends an answer.

        Raises:
          ValueError: if the model drops tokens beyond a capacity: answers would depend on others.
        """
        self.config: ModelConfig = model.config
        for name in ("capacity_factor", "receive_factor"):
            value = getattr(self.config, name)
            if value is not None:
                raise ValueError(f"{name}={value} would drop tokens: sampling wants None")
        self._mesh = mesh
        if mesh.devices.flat[0].platform == "cpu":
            model = unstacked(model)
        graphdef, self._params = nnx.split(model)
        self._prefill, self._decode = programs(graphdef, eos_id)

    def stream(self, requests: Sequence[Request]) -> Iterator[dict[int, int]]:
        """Answer the requests together; yields, step by step, the token that each row made.

        Rows are numbered as in `requests`. One that has ended, by EOS (never shown) or by its
        max_new_tokens, is missing from then on.

        Raises:
          InputError: at once, for a request that `check_requests` refuses.
        """
        check_requests(requests, self.config.vocab_size, self.config.max_position_embeddings)
        return self._stream(requests)

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """The whole answers, without EOS. Raises as `stream` does."""
        answers: list[list[int]] = [[] for _ in requests]
        for made in self.stream(requests):
            for row, token in made.items():
                answers[row].append(token)
        return answers

    def _stream(self, requests: Sequence[Request]) -> Iterator[dict[int, int]]:
        """A step begins before the host has read what the one before it made.

        So the devices never wait for the host. Of a batch that EOS ends, one step is in vain.
        """
        tokens_BL, rows, slots = self._place(requests)
        most = max(r.options.max_new_tokens for r in requests)
        with jax.set_mesh(self._mesh):  # never around a yield: the mesh is the caller's there
            progress, made = self._prefill(self._params, tokens_BL, rows, slots=slots)
        for step in range(1, most + 1):
            shown = made
            if step < most:
                with jax.set_mesh(self._mesh):
                    progress, made = self._decode(self._params, progress, rows)
            token_B, any_live = jax.device_get(shown)
            yield {row: int(t) for row, t in enumerate(token_B) if t != NOTHING}
            if not any_live:
                return

    def _place(self, requests: Sequence[Request]) -> tuple[jax.Array, Rows, int]:
        """The batch on the mesh, and the slots of its cache."""
        context = self.config.max_position_embeddings
        length = bucket(max(len(r.tokens) for r in requests), context)
        most = bucket(max(r.options.max_new_tokens for r in requests), context)
        with jax.set_mesh(self._mesh):
            shards, batch = sharding.batch_shards(), sharding.spec("batch")
        dead = -len(requests) % shards
        tokens_BL = np.zeros((len(requests) + dead, length), np.int32)
        for row, request in enumerate(requests):
            tokens_BL[row, : len(request.tokens)] = request.tokens

        def column(dtype: type, values: Iterator[float]) -> np.ndarray:
            return np.array([*values, *[0] * dead], dtype)

        options = [r.options for r in requests]
        rows = Rows(
            column(np.int32, (len(r.tokens) for r in requests)),
            column(np.int32, (o.max_new_tokens for o in options)),
            column(np.uint32, (o.seed for o in options)),
            Parameters(
                column(np.float32, (o.temperature for o in options)),
                column(np.int32, (o.top_k for o in options)),
                column(np.float32, (o.top_p for o in options)),
                min_p_B=np.zeros(len(tokens_BL), np.float32),
                repetition_B=np.ones(len(tokens_BL), np.float32),
                presence_B=np.zeros(len(tokens_BL), np.float32),
                frequency_B=np.zeros(len(tokens_BL), np.float32),
            ),
        )
        placed = jax.device_put((tokens_BL, rows), NamedSharding(self._mesh, batch))
        return *placed, min(length + most, context)
