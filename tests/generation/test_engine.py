"""The engine on emulated meshes, against the model run on the whole text for every token."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import MODEL

from mixtral_jax import sharding
from mixtral_jax.config import InputError
from mixtral_jax.generation import compiled, scheduler
from mixtral_jax.generation import engine as engines
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.request import Options, Request
from mixtral_jax.generation.rows import context_for
from mixtral_jax.generation.sampling import row_keys
from mixtral_jax.model.mixtral import Mixtral, initialize

CONTEXT = MODEL.max_position_embeddings
MESHES = [(1, 1, 1, 1), (1, 1, 4, 1), (2, 1, 2, 2), (1, 2, 1, 1)]
NEW = 10
PART = 16
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
    return Engine(model_on(mesh), rows=4, part=PART)


def requests(options, prompts=PROMPTS):
    return [Request(prompt, options) for prompt in prompts]


def answers_of(engine, batch):
    """The tokens of each answer; of a request for several, of the first one."""
    return [answers[0].tokens for answers in engine.generate(batch)]


@functools.cache
def full_forward():
    """forward(tokens [4, CONTEXT], lengths) -> logits, on one device."""
    mesh = sharding.make_mesh()
    graphdef, params = nnx.split(model_on(mesh))
    run = jax.jit(lambda params, *args: nnx.merge(graphdef, params)(*args))

    def forward(tokens, lengths):
        segments = (np.arange(CONTEXT) < lengths[:, None]).astype(np.int32)
        with jax.set_mesh(mesh):
            placed = jax.device_put((tokens, segments), sharding.on(mesh, "batch"))
            return np.asarray(run(params, placed[0], None, placed[1]))

    return forward


def logits_of(tokens):
    """float64 [length, vocabulary] of one text."""
    rows = np.zeros((4, CONTEXT), np.int32)
    rows[0, : len(tokens)] = tokens
    return np.float64(full_forward()(rows, np.array([len(tokens), 1, 1, 1]))[0, : len(tokens)])


@pytest.fixture(scope="module")
def expected():
    """Greedy answers of PROMPTS and LONG: argmax after a forward pass over all, for every token."""
    prompts = [*PROMPTS, LONG]
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.zeros((len(prompts), CONTEXT), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    answers, gaps = [], []
    for _ in range(NEW):
        last = full_forward()(tokens, lengths)[np.arange(len(prompts)), lengths - 1]
        best = np.sort(last, axis=1)
        gaps.append(best[:, -1] - best[:, -2])
        answers.append(last.argmax(axis=1))
        tokens[np.arange(len(prompts)), lengths] = answers[-1]
        lengths += 1
    assert np.min(gaps) > 1e-4, "nearly equal logits: rounding may decide, take another key"
    answers = np.stack(answers, axis=1).tolist()
    assert all(len(set(answer)) > 3 for answer in answers)
    return answers


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_ragged_batch_gives_the_answers_of_full_forward_passes(sizes, expected):
    """More requests than rows, a prompt of several parts among them; then one by one."""
    engine = engine_on(sizes)
    batch = requests(GREEDY, [*PROMPTS, LONG, *PROMPTS])
    assert answers_of(engine, batch) == [*expected, *expected[:3]]
    assert [answers_of(engine, [one])[0] for one in batch[:4]] == expected


def test_the_same_seed_gives_the_same_answer_in_any_batch(expected):
    engine = engine_on(MESHES[1])
    alone = answers_of(engine, requests(SAMPLED, PROMPTS[:1]))[0]
    assert alone != expected[0]
    other = Options(NEW, temperature=3.0, seed=99)
    mixed = [Request(PROMPTS[2], other), Request(PROMPTS[1], GREEDY), Request(PROMPTS[0], SAMPLED)]
    assert answers_of(engine, mixed)[1:] == [expected[1], alone]
    again = answers_of(engine, [*requests(SAMPLED), Request(PROMPTS[0], other)])
    assert again[0] == alone
    assert again[3] != alone
    assert answers_of(engine_on(MESHES[2]), requests(SAMPLED))[0] == alone  # and on any mesh


def test_several_answers_differ_and_the_first_is_that_of_one(expected):
    engine = engine_on(MESHES[0])
    alone = answers_of(engine, requests(SAMPLED, PROMPTS[:1]))[0]
    many = Request(PROMPTS[0], dataclasses.replace(SAMPLED, n=5))
    answers, (other,) = engine.generate([many, Request(PROMPTS[1], GREEDY)])
    assert [answer.index for answer in answers] == list(range(5))
    assert answers[0].tokens == alone
    assert len({tuple(answer.tokens) for answer in answers}) == 5
    assert other.tokens == expected[1]
    again = engine_on(MESHES[1]).generate([many])[0]
    assert [a.tokens for a in again] == [a.tokens for a in answers]


def test_each_token_is_drawn_with_the_key_of_its_step():
    """So hot that the logits do not matter: what is left is the request's own stream."""
    hot = Options(NEW, temperature=1e6, seed=2**31 + 5)
    answer = answers_of(engine_on(MESHES[1]), requests(hot))
    keys = row_keys(jnp.full(NEW, hot.seed, jnp.uint32), jnp.arange(NEW))
    flat = jax.vmap(jax.random.categorical)(keys, jnp.zeros((NEW, MODEL.vocab_size)))
    assert answer == [flat.tolist()] * len(PROMPTS)


def test_a_row_that_ends_costs_no_expert_work_and_frees_its_place(expected, monkeypatch):
    """One answer ends by EOS, one by its limit, one goes on; rows without one are in segment 0."""
    eos = expected[0][4]
    stop = expected[0].index(eos)
    assert eos not in expected[1] + expected[2], "take another key"
    live = []
    forward = Mixtral.forward

    def watched(self, tokens_BL, positions_BL, segments_BL, *rest):
        jax.debug.callback(
            lambda segments: live.append((segments.shape[1] > 1, int(segments.sum()))), segments_BL
        )
        return forward(self, tokens_BL, positions_BL, segments_BL, *rest)

    monkeypatch.setattr(Mixtral, "forward", watched)
    engine = Engine(model_on(sharding.make_mesh()), eos_id=eos, rows=3, part=64)
    batch = [
        Request(PROMPTS[0], GREEDY),
        Request(PROMPTS[1], Options(3, temperature=0.0)),
        Request(PROMPTS[2], GREEDY),
    ]
    answers = [one for (one,) in engine.generate(batch)]
    jax.effects_barrier()
    assert [a.tokens for a in answers] == [expected[0][:stop], expected[1][:3], expected[2]]
    assert [a.finish_reason for a in answers] == ["stop", "length", "length"]
    assert [a.stop for a in answers] == [None] * 3
    assert [count for part, count in live if part] == [sum(map(len, PROMPTS))]
    # The step that makes EOS still computes: so many rows are live in each later step.
    decoding = [(i <= stop) + (i < 3) + 1 for i in range(1, NEW)]
    assert [count for part, count in live if not part] == decoding


def test_a_request_takes_the_place_of_one_that_has_ended():
    """Two rows, answers of 2 and of 12 tokens: the short ones pass through the second row."""
    engine = Engine(model_on(sharding.make_mesh()), rows=2, part=PART)
    options = [Options(12, temperature=0.0), *[Options(2, temperature=0.0)] * 4]
    order = []
    for event in engine.run([Request(PROMPTS[2], o) for o in options]):
        if event.answer is not None:
            order.append((event.request, len(event.answer.tokens)))
    assert order == [(1, 2), (2, 2), (3, 2), (4, 2), (0, 12)]


def test_a_long_prompt_does_not_stall_the_others(expected):
    """Its parts come between steps: the short answer goes on, and ends before the long begins."""
    engine = engine_on(MESHES[0])
    new = (2, *LONG[1:])  # of which no row holds anything
    seen = [event.request for event in engine.run(requests(GREEDY, [PROMPTS[2], new]))]
    before = seen.index(1)
    assert seen[:before] == [0] * before
    assert before >= len(new) // PART
    cache = engine._devices.progress.cache[0].k_BKSH
    assert cache.shape[2] == 80  # neither 54 x 54 scores nor a longer cache


# ---- prefixes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", MESHES[:3], ids=str)
def test_a_prompt_begins_where_it_differs_from_one_before_it(sizes):
    """In its own row, in another, on another device; the answer is that of a fresh engine."""
    engine = Engine(model_on(sharding.make_mesh(*sizes)), rows=4, part=PART)
    fresh = engine_on(sizes)
    shared = LONG[:40]
    first = engine.generate(requests(GREEDY, [(*shared, 5)]))[0][0]
    assert first.cached_tokens == 0
    prompts = [(*shared, 5, *first.tokens, 3), (*shared, 6, 7), (*shared, 8), shared, (*shared, 9)]
    made = [answers[0] for answers in engine.generate(requests(GREEDY, prompts))]
    for prompt, answer in zip(prompts, made, strict=True):
        fresh_one = dataclasses.replace(GREEDY, prompt_logprobs=0)  # uses nothing again
        assert answer.tokens == fresh.generate([Request(prompt, fresh_one)])[0][0].tokens
    own = len(shared) + 1 + NEW - 1  # all but the last token that was made
    assert [a.cached_tokens for a in made] == [own, 40, 40, 39, 40]


def test_a_prompt_waits_for_what_it_shares_with_one_that_is_run():
    """It is computed once, and a prompt that shares nothing goes ahead of those that wait."""
    engine = Engine(model_on(sharding.make_mesh(1, 1, 2, 1)), rows=4, part=PART)
    shared = LONG[:40]
    prompts = [(*shared, 5), (*shared, 6, 7), (3, 2, 1), (*shared, 8)]
    events = list(engine.run(requests(GREEDY, prompts)))
    answers = {event.request: event.answer for event in events if event.answer is not None}
    assert [answers[i].cached_tokens for i in range(4)] == [0, 32, 0, 32]  # whole parts
    order = list(dict.fromkeys(event.request for event in events))
    assert order[:2] == [2, 0]
    for i, prompt in enumerate(prompts):
        assert answers_of(engine_on(MESHES[0]), requests(GREEDY, [prompt])) == [answers[i].tokens]


def test_what_a_request_leaves_behind_does_not_reach_the_next():
    engine = Engine(model_on(sharding.make_mesh()), rows=1, part=PART)
    plain = answers_of(engine, requests(GREEDY, PROMPTS[:1]))
    marked = dataclasses.replace(
        GREEDY, logit_bias=((3, 100.0),), presence_penalty=2.0, min_new_tokens=NEW
    )
    assert answers_of(engine, requests(marked, PROMPTS[:1]))[0] == [3] * NEW
    assert answers_of(engine, requests(GREEDY, PROMPTS[:1])) == plain


def test_what_rows_hold_may_be_forgotten(expected):
    engine = engine_on(MESHES[1])
    again = requests(GREEDY, [LONG])
    engine.generate(again)
    assert engine.generate(again)[0][0].cached_tokens > 0
    engine.forget()
    answer = engine.generate(again)[0][0]
    assert answer.cached_tokens == 0
    assert answer.tokens == expected[3]


# ---- what requests ask -------------------------------------------------------------------------


def test_penalties_bias_and_least_length_are_followed():
    """Greedy, token by token, from the logits of full forward passes."""
    options = Options(
        *(NEW, 6),
        temperature=0.0,
        repetition_penalty=1.4,
        presence_penalty=0.6,
        frequency_penalty=0.4,
        logit_bias=((10, 1.5), (27, -1.0)),
        stop_token_ids=(26, 4),
    )
    for prompt in PROMPTS[0], PROMPTS[2]:
        made = []
        while len(made) < NEW:
            logits = logits_of([*prompt, *made])[-1]
            for token, bias in options.logit_bias:
                logits[token] += bias
            for token in {*prompt, *made}:
                logits[token] *= 1.4 if logits[token] < 0 else 1 / 1.4
            for token in made:
                logits[token] -= 0.4
            for token in set(made):
                logits[token] -= 0.6
            if len(made) < 6:
                logits[list(options.stop_token_ids)] = -np.inf
            best = int(logits.argmax())
            if best in options.stop_token_ids:
                break
            made.append(best)
        answer = engine_on(MESHES[1]).generate([Request(prompt, options)])[0][0]
        assert answer.tokens == made
        assert len(made) >= 6


def test_log_probabilities_are_the_models(expected):
    options = dataclasses.replace(GREEDY, logprobs=4, prompt_logprobs=2)
    prompts = [LONG, PROMPTS[0]]
    for engine in engine_on(MESHES[0]), engine_on(MESHES[2]):
        for prompt, (answer,) in zip(prompts, engine.generate(requests(options, prompts))):
            logits = logits_of([*prompt, *answer.tokens])
            wanted = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            assert answer.prompt_logprobs[0] is None
            entries = [*answer.prompt_logprobs[1:], *answer.logprobs]
            text = [*prompt, *answer.tokens]
            assert [entry.id for entry in entries] == text[1:]
            for place, entry in enumerate(entries):
                assert entry.logprob == pytest.approx(wanted[place, entry.id], abs=2e-5)
                best = np.sort(wanted[place])[::-1]
                top = [value for _, _, value in entry.top]
                np.testing.assert_allclose(top, best[: len(top)], atol=2e-5)
            assert [len(e.top) for e in entries] == [2] * (len(prompt) - 1) + [4] * NEW
            own = [wanted[i, token] for i, token in enumerate(prompt[1:])]
            assert answer.perplexity == pytest.approx(np.exp(-np.mean(own)), rel=1e-4)


def test_a_text_is_scored_without_an_answer():
    options = Options(0, prompt_logprobs=0)
    full = dataclasses.replace(options, max_new_tokens=1)
    engine = engine_on(MESHES[1])
    batch = [*requests(options, [LONG]), *requests(GREEDY, PROMPTS[:1])]
    (scored,), (other,) = engine.generate(batch)
    assert scored.tokens == []
    assert scored.finish_reason == "length"
    assert len(other.tokens) == NEW
    ((answered,),) = engine.generate(requests(full, [LONG]))
    assert scored.perplexity == pytest.approx(answered.perplexity, rel=1e-6)


def test_an_int8_cache_is_close_and_small(expected):
    mesh = sharding.make_mesh(1, 1, 2, 2)
    small = Engine(model_on(mesh), rows=4, part=PART, cache_dtype="int8")
    cache = jax.tree.leaves(small._devices.progress.cache)
    whole = sum(a.nbytes for a in jax.tree.leaves(engine_on(MESHES[0])._devices.progress.cache))
    assert sum(a.nbytes for a in cache) == whole * (MODEL.head_size + 4) / (4 * MODEL.head_size)
    options = Options(0, prompt_logprobs=0)
    found = [a[0].perplexity for a in small.generate(requests(options, [LONG, PROMPTS[2]]))]
    wanted = engine_on(MESHES[0]).generate(requests(options, [LONG, PROMPTS[2]]))
    np.testing.assert_allclose(found, [a[0].perplexity for a in wanted], rtol=0.01)
    assert found != [a[0].perplexity for a in wanted]


# ---- shapes ------------------------------------------------------------------------------------


def test_nothing_is_compiled_after_warm_up(expected):
    """Whatever lengths, options and numbers of requests come."""
    engine = Engine(model_on(sharding.make_mesh(1, 1, 2, 1)), rows=4, part=32)
    engine.warm_up(score=True)
    before = engine.compiled()
    assert answers_of(engine, requests(GREEDY, [*PROMPTS, LONG])) == expected
    marked = dataclasses.replace(SAMPLED, repetition_penalty=1.3, logit_bias=((2, 1.0),), n=3)
    engine.generate(requests(marked, [*PROMPTS, LONG, (*LONG[:40], 3)]))
    engine.generate(requests(dataclasses.replace(GREEDY, logprobs=3, prompt_logprobs=0)))
    assert engine.compiled() == before


def test_capacities_are_few():
    lengths = (1, 48, 49, 112, 113, 1000, 8177, 17412)
    found = [context_for(n) for n in lengths]
    assert found == [48, 48, 112, 112, 240, 1008, 9216 - 16, 18432 - 16]


# ---- mistakes ----------------------------------------------------------------------------------


def test_a_request_that_cannot_be_answered_leaves_the_others_alone(expected):
    engine = engine_on(MESHES[0])
    batch = [
        Request((1,) * 60, GREEDY),
        Request(PROMPTS[0], GREEDY),
        Request((), GREEDY),
        Request(PROMPTS[1], dataclasses.replace(GREEDY, logit_bias=((99, 1.0),))),
        Request(PROMPTS[2], GREEDY),
    ]
    answers = [one for (one,) in engine.generate(batch)]
    reasons = [answer.finish_reason for answer in answers]
    assert reasons == ["error", "length", "error", "error", "length"]
    assert "prompt 1 has 60 tokens" in answers[0].error
    assert "context of 64" in answers[0].error
    assert "prompt 3 has no tokens" in answers[2].error
    assert "99 is not in 0..37" in answers[3].error
    assert [answers[1].tokens, answers[4].tokens] == [expected[0], expected[2]]


def test_requests_may_come_from_any_iterable_and_ids_in_any_array(expected):
    batch = (Request(np.array(prompt, np.int32), GREEDY) for prompt in PROMPTS)
    assert answers_of(engine_on(MESHES[0]), batch) == expected[:3]


def test_an_iterator_is_asked_where_a_row_is_free_and_all_that_was_made_is_given(
    expected, monkeypatch
):
    """So a request may be made of an answer; a slow iterator keeps no one waiting for two."""
    engine = Engine(model_on(sharding.make_mesh()), rows=1, part=PART)
    answers = []

    def grown():
        yield Request(PROMPTS[0][:3], GREEDY)
        yield Request((*PROMPTS[0][:3], *answers[0].tokens), GREEDY)

    for event in engine.run(grown()):
        answers += [event.answer] if event.answer else []
    assert len(answers) == 2
    monkeypatch.setattr(engines, "SLOW", 0.0)
    happened = []

    def slow():
        for number, prompt in enumerate(PROMPTS):
            happened.append(number)
            yield Request(prompt, GREEDY)

    happened.extend(f"{event.request}:" for event in engine_on(MESHES[0]).run(slow()))
    assert [happened.index(f"{n}:") < happened.index(n + 1) for n in (0, 1)] == [True, True]


@pytest.mark.parametrize("thing", [None, "def f("], ids=str)
def test_what_is_no_request_is_named(expected, thing):
    engine = engine_on(MESHES[0])
    with pytest.raises(TypeError, match=r"^prompt 2 is of type \w+, not a Request: engine.request"):
        engine.generate([Request(PROMPTS[0], GREEDY), thing])
    assert answers_of(engine, requests(GREEDY)) == expected[:3]


def test_a_stop_text_wants_a_tokenizer():
    stopped = dataclasses.replace(GREEDY, stop=("a",))
    with pytest.raises(InputError, match=r"stop=\('a',\) is text, .* use stop_token_ids"):
        engine_on(MESHES[0]).stream(Request(PROMPTS[0], stopped))


def test_one_stream_refuses_at_once_and_may_be_left(expected):
    engine = engine_on(MESHES[0])
    with pytest.raises(InputError, match=r"the prompt has 60 tokens.*context of 64"):
        engine.stream(Request((1,) * 60, GREEDY))
    stream = engine.stream(Request(PROMPTS[0], GREEDY))
    before = jax.sharding.get_abstract_mesh()
    assert next(stream).token == expected[0][0]
    assert jax.sharding.get_abstract_mesh() == before
    with pytest.raises(RuntimeError, match=r"answering already: .* close\(\) the stream"):
        next(engine.run([]))
    with pytest.raises(RuntimeError, match="is answering"):
        engine.forget()
    stream.close()
    assert answers_of(engine, requests(GREEDY)) == expected[:3]


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("program", ["extend", "decode", "copy", "admit"])
def test_ctrl_c_leaves_the_engine_as_good_as_new(expected, monkeypatch, program, taken):
    """It comes before a program has taken the memory of the progress, or after, in any of them."""
    engine = engine_on(MESHES[0])
    marked = dataclasses.replace(GREEDY, logit_bias=((3, 100.0),))
    engine.generate([Request((1, *LONG[2:]), GREEDY)])  # from which the next are copied
    batch = requests(marked, [(1, *LONG[2:40]), (1, *LONG[2:41])])
    call = compiled.Programs.__call__

    def interrupted(self, name, *arguments, **options):
        if name != program or taken:
            made = call(self, name, *arguments, **options)
        if name == program:
            raise KeyboardInterrupt
        return made

    with monkeypatch.context() as patch:
        patch.setattr(compiled.Programs, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(batch)
    assert answers_of(engine, requests(GREEDY, [*PROMPTS, LONG])) == expected


def test_ctrl_c_in_the_middle_of_compiling_lets_it_be_done_again(monkeypatch):
    class Interrupted(compiled.Future):
        def set_result(self, result):
            super().set_result(result)
            raise KeyboardInterrupt

    engine = Engine(model_on(sharding.make_mesh()), rows=1, part=PART)
    with monkeypatch.context() as patch:
        patch.setattr(compiled, "Future", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(requests(GREEDY, PROMPTS[:1]))
    assert len(answers_of(engine, requests(GREEDY, PROMPTS[:1]))[0]) == NEW


def test_requests_wait_where_memory_holds_few_rows(expected, monkeypatch):
    monkeypatch.setattr(engines, "rows_that_fit", lambda size, mesh: 2)
    engine = Engine(model_on(sharding.make_mesh()), rows=64, part=PART)
    assert engine.rows == 2
    assert answers_of(engine, requests(GREEDY)) == expected[:3]
    monkeypatch.setattr(engines, "rows_that_fit", lambda size, mesh: 0)
    with pytest.raises(InputError, match=r"a cache of 1 rows of 64 tokens takes .* use a sh"):
        Engine(model_on(sharding.make_mesh()))


def test_a_tokenizer_of_another_vocabulary_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"has 300 pieces and the model's vocab_size is 38: give"):
        Engine(model_on(sharding.make_mesh()), tokenizer)


@pytest.mark.parametrize(
    ("tokens", "layer", "said"),
    [
        ((1, 38), 0, r"the text: token 38 is not in 0\.\.37"),
        ((), 0, "the text has no tokens"),
        ((1,) * (CONTEXT + 1), 0, "the text has 65 tokens.* context of 64"),
        ((1, 2), MODEL.num_hidden_layers, "layer 2 is not in 0..1"),
    ],
    ids=itertools.count(),
)
def test_only_a_text_that_the_model_can_take_has_experts(tokens, layer, said):
    engine = engine_on(MESHES[0])
    assert engine.experts((1,) * CONTEXT, 1).shape == (CONTEXT, MODEL.num_experts_per_tok)
    with pytest.raises(InputError, match=said):
        engine.experts(tokens, layer)


@pytest.mark.parametrize("name", ["capacity_factor", "receive_factor"])
def test_a_model_that_drops_tokens_is_refused(name):
    capped = types.SimpleNamespace(config=dataclasses.replace(MODEL, **{name: 1.5}))
    with pytest.raises(ValueError, match=rf"{name}=1.5 would drop tokens"):
        Engine(capped)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"part": 24}, "part=24 must be a power of two"),
        ({"rows": 0}, "rows=0 must be at least 1"),
        ({"context": 0}, "context=0 must be at least 1"),
        ({"cache_dtype": "int4"}, "cache_dtype='int4' must be int8"),
    ],
    ids=str,
)
def test_impossible_sizes_are_named(wrong, said):
    with pytest.raises(InputError, match=said):
        Engine(model_on(sharding.make_mesh()), **wrong)


def test_programs_compile_where_xla_knows_no_option_for_small_products(monkeypatch):
    assert compiled.small_products.__wrapped__() == {"xla_cpu_experimental_ynn_fusion_type": ""}

    def refuse(*args, **options):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: No such compile option")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    assert compiled.small_products.__wrapped__() == {}


@pytest.mark.parametrize(("cores", "at_first"), [(2, 1), (64, 2)])
def test_where_cores_are_few_the_first_token_comes_before_decoding_compiles(
    monkeypatch, cores, at_first
):
    monkeypatch.setattr(scheduler.os, "cpu_count", lambda: cores)
    engine = Engine(model_on(sharding.make_mesh()), rows=1, part=PART)
    for _ in range(2):
        programs = []
        for _ in engine.run(requests(GREEDY, PROMPTS[:1])):
            programs.append(engine.compiled())
        assert programs == [at_first] + [2] * (NEW - 1)
        at_first = 2


@pytest.mark.parametrize("consume", [False, True])
def test_where_there_is_an_accelerator_the_layers_lie_apart(monkeypatch, consume):
    """The answers are the same, and the model's own arrays are freed if that is asked for."""
    monkeypatch.setattr(engines, "platform", lambda: "gpu")
    model = initialize(MODEL, jax.random.key(5), sharding.make_mesh())
    stacked = jax.tree.leaves(nnx.state(model.layers))
    engine = Engine(model, rows=4, part=PART, consume=consume)
    assert all(array.is_deleted() == consume for array in stacked)
    assert answers_of(engine, requests(GREEDY)) == answers_of(
        engine_on((1, 1, 1, 1)), requests(GREEDY)
    )
