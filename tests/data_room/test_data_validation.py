"""Which documents are held out, and the fixed batches made from them."""

import json

import numpy as np
import pytest

from mixtral_jax.config import InputError
from mixtral_jax.data.batches import TrainBatches
from mixtral_jax.data.corpus import hash64, open_corpus
from mixtral_jax.data.validation import validation_set


def test_hash_is_split_mix_64():
    """First outputs of the reference implementation for these seeds."""
    hashes = hash64(np.array([0, 1234567]))
    assert hashes.tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]
    assert hash64(np.arange(9), 1).tolist() != hash64(np.arange(9), 2).tolist()
    assert hash64(np.arange(9), 1, 2).tolist() != hash64(np.arange(9), 2, 1).tolist()


def texts_of(subset):
    return [subset[index] for index in range(len(subset))]


@pytest.fixture
def split(make_config, folder):
    return make_config(f"{folder}/*.txt", data={"validation_fraction": 0.3})


def test_a_fraction_is_held_out_for_every_seed(make_config, split, folder, texts):
    corpus = open_corpus(split)
    held_out, train = texts_of(corpus.held_out), texts_of(corpus.train[0])
    assert 8 <= len(held_out) <= 25
    assert sorted(held_out + train) == sorted(texts)
    assert held_out != [text for text in texts if text in held_out]  # spread out
    assert sorted(corpus.training_texts()) == sorted(train)
    data = {"validation_fraction": 0.5}
    other = open_corpus(make_config(f"{folder}/*.txt", data=data, run={"seed": 9}))
    assert set(held_out) < set(texts_of(other.held_out))


def test_files_that_come_or_go_move_no_other_document(make_config, folder, split, texts):
    (folder / "0.jsonl").write_text(
        "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(60))
    )
    few = open_corpus(split)
    many = open_corpus(make_config(f"{folder}/*", data={"validation_fraction": 0.3}))
    held_out = texts_of(many.held_out)
    assert [text for text in held_out if text in texts] == texts_of(few.held_out)
    assert 0 < sum(text not in texts for text in held_out) < 60
    moved = folder.rename(folder.with_name("elsewhere"))
    again = open_corpus(make_config(f"{moved}/**/*", data={"validation_fraction": 0.3}))
    assert texts_of(again.held_out) == held_out
    assert again.files == many.files


def test_the_fraction_is_over_all_documents(make_config, tmp_path):
    for name in "ab":
        lines = [json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(5000)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    train = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    corpus = open_corpus(make_config(train, data={"validation_fraction": 0.1}))
    held_out = texts_of(corpus.held_out)
    assert 920 < len(held_out) < 1080
    assert [len(subset) for subset in corpus.train] == [
        5000 - sum(text[0] == name for text in held_out) for name in "ab"
    ]
    assert {text[1:] for text in held_out if text[0] == "a"} != {
        text[1:] for text in held_out if text[0] == "b"
    }


def test_held_out_documents_are_never_trained_on(split, tokenizer, read_row):
    corpus = open_corpus(split)
    batches = TrainBatches(split, tokenizer, range(6), corpus)
    taken = [next(batches) for _ in range(600)]
    batches.close()
    seen = set()
    for row in range(6):
        arrays = (np.stack([batch.rows(row)[i] for batch in taken]) for i in (0, 1))
        seen.update(read_row(*arrays)[0])
    assert seen == set(texts_of(corpus.train[0]))
    assert len(corpus.held_out) > 0
    assert not seen & set(corpus.held_out)


def test_files_of_validation_are_not_trained_on(make_config, folder, texts):
    data = {"validation": f"{folder}/00[0-4].txt", "validation_fraction": 0.5}
    corpus = open_corpus(make_config(f"{folder}/*.txt", data=data))
    assert sorted(texts_of(corpus.held_out)) == sorted(texts[:5])
    assert texts_of(corpus.train[0]) == texts[5:]
    data = {"validation": f"{folder}/*.txt"}
    with pytest.raises(InputError, match=r"only files that data\.validation or"):
        open_corpus(make_config(f"{folder}/003.txt", data=data))
    data = {"validation": {"files": f"{folder}/003.txt", "weight": 2}}
    with pytest.raises(
        InputError, match=r"data\.validation: weight=2\.0 does nothing: leave it out"
    ):
        open_corpus(make_config(f"{folder}/*.txt", data=data))


def test_a_source_must_keep_something_to_train_on(make_config, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"all 1 documents of \S*a\.txt are held out .*0\.999"):
        open_corpus(make_config(f"{tmp_path}/a.txt", data={"validation_fraction": 0.999}))


# ---- the batches -------------------------------------------------------------------------------


def score(held_out, tokenizer):
    """The texts in the batches, read back from their targets alone."""
    targets_ML, segments_ML = (
        np.concatenate([getattr(batch, name) for batch in held_out.batches])
        for name in ("targets_BL", "segments_BL")
    )
    padding = np.flatnonzero(segments_ML.ravel() == 0)
    real = targets_ML.ravel()[segments_ML.ravel() > 0]
    assert (padding == np.arange(len(real), targets_ML.size)).all()  # nothing after the padding
    ends = np.flatnonzero(real == tokenizer.eos_id)
    assert ends[-1] == len(real) - 1
    parts = np.split(real, ends + 1)[:-1]
    return [tokenizer.decode(part[:-1]) for part in parts]


def test_batches_hold_whole_documents_and_their_bytes(make_config, folder, tokenizer):
    data = {"validation": f"{folder}/*[0-4].txt"}
    config = make_config(f"{folder}/*.txt", data=data, validation_batches=5)
    corpus = open_corpus(config)
    held_out = validation_set(config, tokenizer, corpus)
    texts = score(held_out, tokenizer)
    assert "".join(texts).encode() == held_out.text
    assert len(texts) == held_out.documents
    assert held_out.documents + held_out.left_out == len(corpus.held_out)
    assert held_out.left_out > 0
    order = texts_of(corpus.held_out)
    assert [order.index(text) for text in texts] == sorted(order.index(text) for text in texts)
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert len(held_out.batches) == -(-tokens // (6 * 37)) <= 5
    for batch in held_out.batches:
        assert batch.tokens_BL.shape == (6, 37)
        starts_BL = (batch.tokens_BL == tokenizer.bos_id) & (batch.segments_BL > 0)
        assert (batch.positions_BL[starts_BL] == 0).all()
        assert (batch.segments_BL[batch.segments_BL[:, 0] > 0, 0] == 1).all()
        assert (batch.positions_BL[:, 0] == 0).all()
    again = validation_set(config, tokenizer, open_corpus(config))
    assert again.text == held_out.text


def test_a_larger_set_holds_everything_readable(make_config, folder, tokenizer, texts):
    (folder / "bad.txt").write_bytes(b"\xff")
    data = {"validation": [f"{folder}/00*.txt", f"{folder}/bad.txt"]}
    config = make_config(f"{folder}/*.txt", data=data, validation_batches=500)
    corpus = open_corpus(config)
    held_out = validation_set(config, tokenizer, corpus)
    assert (held_out.documents, held_out.left_out, corpus.malformed.count) == (10, 0, 1)
    assert held_out.text == "".join(text for text in corpus.held_out if text).encode()
    assert sorted(score(held_out, tokenizer)) == sorted(texts[:10])
    assert len(held_out.batches) < 500


def test_documents_may_fill_the_last_batch_exactly(make_config, tmp_path, tokenizer):
    (tmp_path / "train.txt").write_text("x")
    (tmp_path / "held.txt").write_text("json.loads(x)")
    pairs = len(tokenizer.encode("json.loads(x)")) + 1
    data = {"validation": f"{tmp_path}/held.txt"}
    for length, fits in ((pairs, True), (pairs - 1, False)):
        sizes = {"batch_size": 1, "sequence_length": length, "validation_batches": 1}
        config = make_config(f"{tmp_path}/train.txt", data=data, **sizes)
        corpus = open_corpus(config)
        if fits:
            held_out = validation_set(config, tokenizer, corpus)
            assert score(held_out, tokenizer) == ["json.loads(x)"]
            assert (held_out.batches[0].segments_BL == 1).all()
            continue
        with pytest.raises(InputError, match=r"none of 1 .* raise training\.validation_batches"):
            validation_set(config, tokenizer, corpus)


def test_nothing_held_out_says_what_to_do(make_config, folder, tokenizer):
    for name, words in (
        ("*.txt", r"fraction=0\.0 of 54 documents holds none out: raise"),
        ("000.txt", r"of one document holds none out: name data\.validation"),
    ):
        config = make_config(f"{folder}/{name}")
        corpus = open_corpus(config)
        with pytest.raises(InputError, match=words):
            validation_set(config, tokenizer, corpus)


def test_synthetic_validation(make_config):
    config = make_config([], data={"source": "synthetic"}, validation_batches=3)
    held_out = validation_set(config, None, None)
    assert (len(held_out.batches), held_out.text, held_out.documents) == (3, b"", 18)
    assert (held_out.batches[0].tokens_BL != held_out.batches[1].tokens_BL).any()
    again = validation_set(config, None, None)
    np.testing.assert_array_equal(held_out.batches[2], again.batches[2])
