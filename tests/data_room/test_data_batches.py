"""Training batches: every token once, the same on any hosts, resumed exactly."""

import collections
import gc
import json
import threading
import time

import numpy as np
import pytest

from mixtral_jax.config import InputError
from mixtral_jax.data.batches import SyntheticBatches, TrainBatches, train_batches
from mixtral_jax.data.corpus import open_corpus

ALL = range(6)  # rows of the batch


def take(batches, count):
    """The next batches, one after another in each array: [count, rows, L]."""
    return [np.stack(arrays) for arrays in zip(*(next(batches) for _ in range(count)))]


def check_layout(tokenizer, tokens_SBL, targets_SBL, segments_SBL, positions_SBL):
    """Segments, positions and targets of every sequence say what its tokens say."""
    starts_SBL = tokens_SBL == tokenizer.bos_id
    starts_SBL[..., 0] = True
    np.testing.assert_array_equal(segments_SBL, np.cumsum(starts_SBL, axis=-1))
    place_L = np.arange(tokens_SBL.shape[-1])
    since_SBL = np.maximum.accumulate(np.where(starts_SBL, place_L, 0), axis=-1)
    np.testing.assert_array_equal(positions_SBL, place_L - since_SBL)
    ends_SBL = starts_SBL[..., 1:]
    expected = np.where(ends_SBL, tokenizer.eos_id, tokens_SBL[..., 1:])
    np.testing.assert_array_equal(targets_SBL[..., :-1], expected)


@pytest.fixture
def config(make_config, folder):
    return make_config(f"{folder}/*.txt")


@pytest.fixture
def start(tokenizer):
    """Makes TrainBatches, and closes them after the test."""
    made = []

    def make(config, rows=ALL, state=None, step=0):
        made.append(TrainBatches(config, tokenizer, rows, open_corpus(config)))
        if state is not None:
            made[-1].restore(state, step)
        return made[-1]

    yield make
    for batches in made:
        batches.close()


def test_every_token_of_every_document_once_an_epoch(config, start, read_row, tokenizer, texts):
    batches = start(config)
    seen = [[] for _ in ALL]
    arrays = take(batches, 700)
    check_layout(tokenizer, *arrays)
    assert all(array.dtype == np.int32 and array.shape == (700, 6, 37) for array in arrays)
    for row in ALL:
        seen[row], rest = read_row(arrays[0][:, row], arrays[1][:, row])
        assert batches.state[row].tolist() == [len(seen[row]), rest]
    epochs = min(map(len, seen)) // 9  # 9 rounds deal the 54 documents to the 6 rows
    assert epochs >= 2
    orders = []
    for epoch in range(epochs):
        rounds = [[seen[row][9 * epoch + k] for row in ALL] for k in range(9)]
        orders.append([text for dealt in rounds for text in dealt])
        assert sorted(orders[-1]) == sorted(texts)
    assert orders[0] != orders[1]
    assert all(order != texts for order in orders)
    assert batches.malformed.count == 0


def test_one_row_gets_another_order_each_epoch(make_config, tmp_path, start, read_row):
    write_lines(tmp_path / "a.jsonl", "abcdefghij")
    batches = start(make_config(f"{tmp_path}/*", batch_size=1), rows=[0])
    tokens_SBL, targets_SBL, *_ = take(batches, 20)
    texts, _ = read_row(tokens_SBL, targets_SBL)
    epochs = {"".join(texts[i : i + 10]) for i in range(0, len(texts) - 9, 10)}
    assert len(epochs) == len(texts) // 10 > 9
    assert {"".join(sorted(epoch)) for epoch in epochs} == {"abcdefghij"}


def test_the_order_follows_the_seed(make_config, folder, start):
    def tokens(seed):
        return take(start(make_config(f"{folder}/*.txt", run={"seed": seed})), 5)[0]

    np.testing.assert_array_equal(tokens(3), tokens(3))
    assert (tokens(3) != tokens(4)).any()
    assert (tokens(-1) != tokens(0)).any()


def test_the_batch_does_not_depend_on_the_hosts(config, start):
    whole = take(start(config), 40)
    parts = [take(start(config, rows), 40) for rows in ([0, 1], [2], (5, 3, 4))]
    for array, *pieces in zip(whole, *parts):
        np.testing.assert_array_equal(array[:, [0, 1, 2, 5, 3, 4]], np.concatenate(pieces, axis=1))


@pytest.mark.parametrize("count", [0, 1, 33])
def test_resuming_is_exact_on_other_hosts(config, start, count):
    first = start(config)
    for _ in range(count):
        next(first)
    time.sleep(0.05)  # let the thread run ahead
    state = first.state
    assert state.shape == (6, 2)
    assert state.dtype == np.int64
    expected = take(first, 30)
    again = [take(start(config, rows, state[rows]), 30) for rows in ([0, 1, 2, 3], [4, 5])]
    for array, *pieces in zip(expected, *again):
        np.testing.assert_array_equal(array, np.concatenate(pieces, axis=1))


def test_a_row_takes_a_sequence_of_each_of_its_lanes_in_turn(make_config, folder, start, read_row):
    """Lanes are rows of a larger batch; all of its documents come, each once an epoch."""
    glob = f"{folder}/*.txt"
    batches = start(make_config(glob, data={"interleave": 3}))
    tokens_SBL, targets_SBL, *_ = take(batches, 60)
    wide = take(start(make_config(glob, batch_size=18), range(18)), 20)
    for turn in range(3):
        mine = range(6 * turn, 6 * turn + 6)
        np.testing.assert_array_equal(tokens_SBL[turn::3], wide[0][:, mine])
        for row in ALL:
            read_row(tokens_SBL[turn::3, row], targets_SBL[turn::3, row])


@pytest.mark.parametrize("count", [4, 6])
def test_resuming_goes_on_with_the_next_lane(make_config, folder, start, count):
    config = make_config(f"{folder}/*.txt", data={"interleave": 3})
    first = start(config)
    take(first, count)
    state = first.state
    assert state.shape == (6, 6)
    expected = take(first, 10)
    again = [take(start(config, rows, state[rows], count), 10) for rows in ([0, 1], [2, 3, 4, 5])]
    for array, *pieces in zip(expected, *again):
        np.testing.assert_array_equal(array, np.concatenate(pieces, axis=1))


def test_restore_refuses_what_cannot_be_right(config, start, folder):
    batches = start(config)
    with pytest.raises(InputError, match=r"shape \(4, 2\), not \(6, 2\)"):
        batches.restore(np.zeros((4, 2)), 0)
    next(batches)
    with pytest.raises(RuntimeError, match="before the first batch"):
        batches.restore(batches.state, 1)
    state = batches.state
    for path in folder.glob("*.txt"):
        path.write_text("x")
    with pytest.raises(InputError, match=r"lane \d stood at token \d+ of its document \d+"):
        next(start(config, state=state))


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_every_row_draws_documents_by_weight(make_config, tmp_path, start, read_row):
    weights = {"a": 1, "b": 2, "c": 1}  # a period of 4 documents, and 8 rows
    for name in weights:
        write_lines(tmp_path / f"{name}.jsonl", [f"{name} {i}" + f"{name}" * i for i in range(20)])
    train = [{"files": f"{tmp_path}/{name}.jsonl", "weight": w} for name, w in weights.items()]
    tokens_SBL, targets_SBL, *_ = take(start(make_config(train, batch_size=8), range(8)), 400)
    total = collections.Counter()
    for row in range(8):
        texts, _ = read_row(tokens_SBL[:, row], targets_SBL[:, row])
        counts = collections.Counter(text[0] for text in texts)
        shares = [counts[name] / len(texts) for name in weights]
        np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.07)
        total += counts
    shares = [total[name] / total.total() for name in weights]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.015)


@pytest.mark.parametrize("weights", [(1, 1.1e6), (1e308, 1e-308)])
def test_weights_too_far_apart_are_refused(make_config, tmp_path, start, weights):
    train = [{"files": f"{tmp_path}/{w}.jsonl", "weight": w} for w in weights]
    for weight in weights:
        write_lines(tmp_path / f"{weight}.jsonl", "ab")
    with pytest.raises(InputError, match=r"weight=\S+ is more than 1,000,000 times weight="):
        start(make_config(train))


def test_rows_that_share_a_document_start_apart(make_config, tmp_path, start, tokenizer, texts):
    (tmp_path / "one.txt").write_text(max(texts, key=len))
    batches = start(make_config(f"{tmp_path}/*.txt"))
    first = next(batches)
    assert len({tokens_L.tobytes() for tokens_L in first.tokens_BL}) == 6
    ids = [tokenizer.bos_id, *tokenizer.encode(max(texts, key=len)), tokenizer.eos_id]
    begun = batches.state[:, 1] - 37
    np.testing.assert_array_equal(begun, [(len(ids) - 1) * row // 6 for row in ALL])
    resumed = start(make_config(f"{tmp_path}/*.txt"), state=batches.state)
    np.testing.assert_array_equal(next(batches).tokens_BL, next(resumed).tokens_BL)


def test_they_do_so_beside_documents_without_text(make_config, tmp_path, start, texts):
    write_lines(tmp_path / "a.jsonl", [max(texts, key=len), "", None])
    batches = start(make_config(f"{tmp_path}/*.jsonl"))
    for _ in range(9):
        batch = next(batches)
        assert len({tokens_L.tobytes() for tokens_L in batch.tokens_BL}) == 6


def test_a_document_that_all_lanes_read_is_tokenized_once(
    make_config, tmp_path, start, tokenizer, texts, monkeypatch
):
    (tmp_path / "one.txt").write_text(max(texts, key=len))
    config = make_config(f"{tmp_path}/*.txt", data={"interleave": 3}, sequence_length=5)
    encoded, encode = [], tokenizer.encode_parts
    monkeypatch.setattr(
        tokenizer, "encode_parts", lambda text: encoded.append(text) or encode(text)
    )
    first = start(config)
    take(first, 6)
    take(start(config, state=first.state, step=6), 6)
    assert len(encoded) == 2  # by each of the two


def test_only_documents_that_are_shared_are_begun_inside(make_config, tmp_path, start, tokenizer):
    write_lines(tmp_path / "few.jsonl", ["words " * 20])
    write_lines(tmp_path / "many.jsonl", [f"{number} " * 20 for number in range(30)])
    train = [f"{tmp_path}/few.jsonl", f"{tmp_path}/many.jsonl"]
    tokens_BL = next(start(make_config(train, sequence_length=4))).tokens_BL
    inside = [tokens_L[0] != tokenizer.bos_id for tokens_L in tokens_BL]
    many = [any(map(str.isdigit, tokenizer.decode(tokens_L))) for tokens_L in tokens_BL]
    assert sum(many) == 3
    assert sum(inside) >= 2
    assert not any(np.logical_and(inside, many))


# ---- documents that cannot be read, and the thread ---------------------------------------------


def test_malformed_documents_are_left_out(config, folder, start, read_row, texts):
    (folder / "bad.txt").write_bytes(b"\xff")
    (folder / "blank.txt").write_bytes(b"")
    batches = start(config)
    tokens_SBL, targets_SBL, *_ = take(batches, 700)
    seen = set()
    for row in ALL:
        seen.update(read_row(tokens_SBL[:, row], targets_SBL[:, row])[0])
    assert seen == set(texts)
    assert batches.malformed.names == [f"{folder}/bad.txt"]


def test_the_first_malformed_document_can_be_fatal(make_config, folder, start):
    (folder / "bad.txt").write_bytes(b"\xff")
    batches = start(make_config(f"{folder}/*.txt", data={"malformed": "error"}))
    with pytest.raises(InputError, match=r"bad\.txt: not Unicode"):
        take(batches, 700)
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_a_source_of_nothing_but_malformed_documents_ends_the_run(make_config, tmp_path, start):
    write_lines(tmp_path / "a.jsonl", ["", "", None])
    write_lines(tmp_path / "b.jsonl", ["found"])
    config = make_config([f"{tmp_path}/b.jsonl", f"{tmp_path}/a.jsonl"])
    with pytest.raises(InputError, match=r"none of the 3 .* of .*a\.jsonl holds text; 1 mal.*:3$"):
        start(config)


def test_one_readable_document_is_enough(make_config, tmp_path, start, tokenizer):
    write_lines(tmp_path / "a.jsonl", [""] * 500 + ["found"])
    batch = next(start(make_config(f"{tmp_path}/*.jsonl", sequence_length=4), rows=[5]))
    assert "found".startswith(tokenizer.decode(batch.tokens_BL[0]))


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_closing_and_forgetting_end_the_thread(config, tokenizer):
    batches = TrainBatches(config, tokenizer, ALL, open_corpus(config))
    assert threads() == []
    next(batches)
    assert len(threads()) == 1
    batches.close()
    batches.close()
    assert threads() == []
    batches = TrainBatches(config, tokenizer, ALL, open_corpus(config))
    next(batches)
    del batches
    gc.collect()
    for thread in threads():
        thread.join(10)
    assert threads() == []


def test_the_thread_stays_a_few_batches_ahead(config, start, monkeypatch):
    made = []
    original = TrainBatches._make
    monkeypatch.setattr(TrainBatches, "_make", lambda self: made.append(1) or original(self))
    next(start(config))
    time.sleep(0.2)
    assert 2 <= len(made) <= 5


# ---- synthetic batches -------------------------------------------------------------------------


def test_synthetic_batches(make_config):
    config = make_config([], data={"source": "synthetic"}, run={"seed": 5})
    batches = train_batches(config, None, ALL, None)
    assert isinstance(batches, SyntheticBatches)
    arrays = take(batches, 20)
    tokens_SBL, targets_SBL, segments_SBL, positions_SBL = arrays
    assert tokens_SBL.shape == (20, 6, 37)
    assert tokens_SBL.dtype == np.int32
    assert tokens_SBL.min() >= 0
    assert 590 < tokens_SBL.max() < 601
    np.testing.assert_array_equal(tokens_SBL[..., 1:], targets_SBL[..., :-1])
    assert (segments_SBL == 1).all()
    assert (positions_SBL == np.arange(37)).all()
    assert len({row.tobytes() for row in tokens_SBL.reshape(-1, 37)}) == 120
    resumed = train_batches(config, None, [4, 1], None)
    state = batches.state
    assert state.tolist() == [[20, 0]] * 6
    resumed.restore(state[[4, 1]], 20)
    for array, other in zip(take(batches, 3), take(resumed, 3)):
        np.testing.assert_array_equal(array[:, [4, 1]], other)
    assert batches.malformed.count == 0
    batches.close()
    resumed.close()


def test_text_is_needed_for_text(make_config):
    with pytest.raises(InputError, match=r"data\.source=synthetic has no text"):
        open_corpus(make_config([], data={"source": "synthetic"}))
    with pytest.raises(InputError, match=r"^data\.train is empty: "):
        open_corpus(make_config([]))
