"""The engine on emulated meshes, against the model run on the whole text for every token."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import MODEL

from mixtral_jax import sharding
from mixtral_jax.config import InputError
from mixtral_jax.generation.engine import Engine, bucket
from mixtral_jax.generation.request import Options, Request
from mixtral_jax.generation.sampling import row_keys
from mixtral_jax.model.mixtral import Mixtral, initialize

CONTEXT = MODEL.max_position_embeddings
MESHES = [(1, 1, 1, 1), (1, 1, 4, 1), (2, 1, 2, 2), (1, 2, 1, 1)]
NEW = 10
NEVER = -1  # an EOS that no model says
PROMPTS = [(1, 30, 7, 7, 22), (1,), (1, 9, 8, 12, 30, 4, 19, 37, 2, 3, 11, 25, 6)]
LONG = (1, *(i * i % 37 for i in range(CONTEXT - NEW - 1)))  # with its answer, the whole context
GREEDY = Options(NEW, temperature=0.0)
SAMPLED = Options(NEW, temperature=1.1, top_k=30, top_p=0.97, seed=12)


@functools.cache
def model_on(mesh):
    """The same weights on any mesh; made on one device, which compiles once."""
    if mesh.size == 1:
        return initialize(MODEL, jax.random.key(5), mesh)
    graphdef, params = nnx.split(model_on(sharding.make_mesh()))
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))
    return nnx.merge(graphdef, placed)


@functools.cache
def engine_on(sizes):
    """An engine that tests share, so that its programs are compiled once."""
    mesh = sharding.make_mesh(*sizes)
    return Engine(model_on(mesh), mesh, NEVER)


def requests(options, prompts=PROMPTS):
    return [Request(prompt, options) for prompt in prompts]


@pytest.fixture(scope="module")
def expected():
    """Greedy answers of PROMPTS and LONG: argmax after a forward pass over all, for every token."""
    mesh = sharding.make_mesh()
    prompts = [*PROMPTS, LONG]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), CONTEXT), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    answers, gaps = [], []
    with jax.set_mesh(mesh):
        graphdef, params = nnx.split(model_on(mesh))
        forward = jax.jit(lambda params, *args: nnx.merge(graphdef, params)(*args))
        for _ in range(NEW):
            segments = (np.arange(CONTEXT) < lengths[:, None]).astype(np.int32)
            placed = jax.device_put((tokens, segments), sharding.batch_sharding(mesh))
            logits = np.asarray(forward(params, placed[0], None, placed[1]))
            last = logits[np.arange(len(prompts)), lengths - 1]
            best = np.sort(last, axis=1)
            gaps.append(best[:, -1] - best[:, -2])
            answers.append(last.argmax(axis=1))
            tokens[np.arange(len(prompts)), lengths] = answers[-1]
            lengths += 1
    assert np.min(gaps) > 1e-4, "nearly equal logits: rounding may decide, take another key"
    answers = np.stack(answers, axis=1).tolist()
    assert all(len(set(answer)) > 3 for answer in answers)
    return answers


@pytest.mark.parametrize("sizes", MESHES[:3], ids=str)
def test_a_ragged_batch_gives_the_answers_of_full_forward_passes(sizes, expected):
    assert engine_on(sizes).generate(requests(GREEDY)) == expected[:3]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_one_by_one_gives_the_same_answers(sizes, expected):
    engine = engine_on(sizes)
    assert [engine.generate([request])[0] for request in requests(GREEDY)] == expected[:3]


def test_the_same_seed_gives_the_same_answer_in_any_batch(expected):
    engine = engine_on(MESHES[1])
    alone = engine.generate(requests(SAMPLED, PROMPTS[:1]))[0]
    assert alone != expected[0]
    other = Options(NEW, temperature=3.0, seed=99)
    mixed = [Request(PROMPTS[2], other), Request(PROMPTS[1], GREEDY), Request(PROMPTS[0], SAMPLED)]
    together = engine.generate(mixed)
    assert together[1:] == [expected[1], alone]
    again = engine.generate([*requests(SAMPLED), Request(PROMPTS[0], other)])
    assert again[0] == alone
    assert again[3] != alone
    assert engine_on(MESHES[2]).generate(requests(SAMPLED))[0] == alone  # and on any mesh


def test_each_token_is_drawn_with_the_key_of_its_step():
    """So hot that the logits do not matter: what is left is the request's own stream."""
    hot = Options(NEW, temperature=1e6, seed=2**31 + 5)
    answer = engine_on(MESHES[1]).generate(requests(hot))
    keys = row_keys(jnp.full(NEW, hot.seed, jnp.uint32), jnp.arange(NEW))
    flat = jax.vmap(jax.random.categorical)(keys, jnp.zeros((NEW, MODEL.vocab_size)))
    assert answer == [flat.tolist()] * len(PROMPTS)


def test_a_row_that_ends_costs_no_expert_work_and_leaves_the_others_alone(expected, monkeypatch):
    """One row ends by EOS, one by its own limit, one goes on; dead rows are in segment 0."""
    eos = expected[0][4]
    stop = expected[0].index(eos)
    assert eos not in expected[1] + expected[2], "take another key"
    live = []
    forward = Mixtral.forward

    def watched(self, tokens_BL, positions_BL, segments_BL, *rest):
        jax.debug.callback(lambda segments: live.append(int(segments.sum())), segments_BL)
        return forward(self, tokens_BL, positions_BL, segments_BL, *rest)

    monkeypatch.setattr(Mixtral, "forward", watched)
    mesh = sharding.make_mesh()
    engine = Engine(model_on(mesh), mesh, eos)
    batch = [
        Request(PROMPTS[0], GREEDY),
        Request(PROMPTS[1], Options(3, temperature=0.0)),
        Request(PROMPTS[2], GREEDY),
    ]
    steps = list(engine.stream(batch))
    jax.effects_barrier()
    answers = [[made[row] for made in steps if row in made] for row in range(3)]
    assert answers == [expected[0][:stop], expected[1][:3], expected[2]]
    assert eos not in answers[0]
    prompt_tokens = sum(len(prompt) for prompt in PROMPTS)
    # The step that makes EOS still computes: so many rows are live in each later step.
    decoding = [(i <= stop) + (i < 3) + 1 for i in range(1, NEW)]
    assert live == [prompt_tokens, *decoding]
    assert len(steps) == NEW

    live.clear()
    assert engine.generate([batch[0], batch[1], batch[1]]) == [
        expected[0][:stop],
        expected[1][:3],
        expected[1][:3],
    ]
    jax.effects_barrier()
    # It stops when all rows have ended, after a step that began before the host knew.
    assert live[max(stop + 1, 3) :] == [0]


def test_each_program_is_compiled_once_for_a_shape(expected):
    """Any lengths, options and numbers of prompts within the same buckets share two programs."""
    engine = engine_on(MESHES[1])  # where the other tests stay in these buckets, too

    def compiled():
        return engine._prefill._cache_size(), engine._decode._cache_size()

    engine.generate(requests(GREEDY))
    engine.generate(requests(SAMPLED, [(1, *range(15))]))
    engine.generate(requests(Options(16, top_k=3), [*PROMPTS, (1, 2)]))
    engine.generate(requests(Options(1), PROMPTS[:2]))
    assert compiled() == (1, 1)
    # The last slot of the context is used, and short prompts share the long one's cache.
    answers = engine.generate(requests(GREEDY, [PROMPTS[2], LONG]))
    assert answers == [expected[2], expected[3]]
    assert compiled() == (2, 2)


def test_buckets():
    lengths = (1, 15, 16, 17, 31, 32, 33, 40, 48)
    assert [bucket(n, 48) for n in lengths] == [16, 16, 16, 32, 32, 32, 48, 48, 48]
    assert bucket(3, 8) == 8


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs():
    engine = engine_on(MESHES[0])
    with pytest.raises(InputError, match=r"prompt 2 has 60 tokens.*context of 64"):
        engine.stream([*requests(GREEDY, PROMPTS[:1]), Request((1,) * 60, GREEDY)])


@pytest.mark.parametrize("name", ["capacity_factor", "receive_factor"])
def test_a_model_that_drops_tokens_is_refused(name):
    capped = types.SimpleNamespace(config=dataclasses.replace(MODEL, **{name: 1.5}))
    with pytest.raises(ValueError, match=rf"{name}=1.5 would drop tokens"):
        Engine(capped, sharding.make_mesh(), NEVER)


def test_the_callers_mesh_is_left_alone():
    stream = engine_on(MESHES[0]).stream(requests(GREEDY))
    before = jax.sharding.get_abstract_mesh()
    next(stream)
    assert jax.sharding.get_abstract_mesh() == before
