"""Rows to sample, and what they are drawn from by NumPy: a row, or a token, at a time."""

import jax.numpy as jnp
import numpy as np

from mixtral_jax.generation.sampling import History, Parameters

VOCABULARY = 37
PLAIN = Parameters(1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0)


def parameters(rows):
    """Parameters from the first few of each row's: temperature, top_k, top_p, min_p, ..."""
    whole = [(*row, *PLAIN[len(row) :]) for row in rows]
    columns = zip(*whole, strict=True)
    dtypes = Parameters(*[jnp.float32] * 7)._replace(top_k_B=jnp.int32)
    return Parameters(*(jnp.array(c, dtype) for c, dtype in zip(columns, dtypes, strict=True)))


def penalties(repetition=1.0, presence=0.0, frequency=0.0, **others):
    """One row's parameters by name."""
    row = PLAIN._replace(repetition_B=repetition, presence_B=presence, frequency_B=frequency)
    return row._replace(**{f"{name}_B": value for name, value in others.items()})


def history(prompts, answers):
    """The history of rows whose prompts and answers are lists of tokens."""
    count_BV = [[np.bincount(t, minlength=VOCABULARY) for t in x] for x in (prompts, answers)]
    return History(jnp.array(count_BV[0]) > 0, jnp.array(count_BV[1], jnp.int32))


def changes(bias_BV, forbidden_BV):
    """What `penalize` takes for a bias, and for tokens that are forbidden where a mask says so."""
    forbidden_BN = jnp.where(forbidden_BV, jnp.arange(VOCABULARY)[None], VOCABULARY)
    return bias_BV, (bias_BV != 0).any(axis=1), forbidden_BN


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(logits, temperature, top_k, top_p, min_p=0.0):
    """Probabilities of one row, in float64: transformers' definitions, by sorting."""
    scores = logits.astype(np.float64) / temperature
    if top_k:
        kth = np.sort(scores)[-min(top_k, len(scores))]
        scores = np.where(scores < kth, -np.inf, scores)
    if top_p < 1:
        order = np.argsort(scores, kind="stable")
        upto = np.cumsum(softmax(scores)[order])
        gone = upto <= 1 - top_p
        gone[-1] = False
        scores[order[gone]] = -np.inf
    probabilities = softmax(scores)
    scores[probabilities < min_p * probabilities.max()] = -np.inf
    return softmax(scores)


def penalized(logits_V, row, prompt, answer):
    """One row's penalties, a token at a time: transformers' repetition, then OpenAI's formula."""
    out = np.array(logits_V, np.float64)
    for token in {*prompt, *answer}:
        out[token] = (
            out[token] * row.repetition_B if out[token] < 0 else out[token] / row.repetition_B
        )
    for token in {*answer}:
        count = answer.count(token)
        out[token] = out[token] - count * row.frequency_B - float(count > 0) * row.presence_B
    return out
