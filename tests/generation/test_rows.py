"""Which row a request takes, against a search in plain Python; how arrays of rows are placed."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_jax import sharding
from mixtral_jax.generation import placing
from mixtral_jax.generation.rows import COPY, LEAST_PART, Row, choose, common

PLACES = 80
BASE = [i * i % 37 for i in range(PLACES)]
TEXTS = st.builds(
    lambda count, rest: (BASE[:count] + rest)[:PLACES],
    *(st.integers(0, PLACES), st.lists(st.integers(0, 36), max_size=9)),
)


def shared(one, other):
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other))
    return len(list(equal))


@given(texts=st.lists(TEXTS, min_size=1, max_size=5), prompt=TEXTS, free=st.sets(st.integers(0, 4)))
def test_a_request_begins_in_the_row_or_after_a_copy_of_the_row_that_has_most_of_it(
    texts, prompt, free
):
    rows = [Row(PLACES) for _ in texts]
    for used, (row, text) in enumerate(zip(rows, texts, strict=True)):
        row.used = used
        row.write(text[:30])
        row.write(text[30:])
        assert row.written.tolist() == text
    prompt, found = np.array(prompt, np.int32), [shared(text, prompt) for text in texts]
    assert [common(row.written, prompt) for row in rows] == found
    free = sorted(row for row in free if row < len(rows)) or [0]
    best, most = max(found), max(found[row] for row in free)
    own, done, source = choose(rows, free, prompt)
    if best >= most + COPY:
        assert (own, done, found[source]) == (free[0], best, best)
    elif most >= LEAST_PART:
        assert (found[own], done, source) == (most, most, None)
    else:
        assert (own, done, source) == (free[0], 0, None)
    rows[own].clear()
    assert rows[own].written.size == 0


def test_several_hosts_place_the_same_arrays(monkeypatch):
    """Not by device_put, which has the hosts compare each array."""
    arrays = np.arange(24).reshape(8, 3), np.arange(8)
    place = placing.Placing(sharding.make_mesh(data=2, expert=4), 8, 8)
    rows = np.int32(3), np.int32(5)
    alone = (*place.split(*arrays), *place.whole(*rows))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "device_put", lambda *given: pytest.fail("compared"))
    for one, other in zip(alone, (*place.split(*arrays), *place.whole(*rows)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding
        assert one.dtype == other.dtype
