"""Encoding, decoding as ids arrive, and making tokenizers."""

import io
import os
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax.config import InputError
from mixtral_jax.data import tokenizer as tokenizer_module
from mixtral_jax.data import train_tokenizer as command
from mixtral_jax.data.corpus import open_corpus
from mixtral_jax.data.packing import document_ids
from mixtral_jax.data.tokenizer import (
    LINE_CHARACTERS,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    sample,
    sample_bytes,
    train_tokenizer,
)

TRICKY = ["", " ", "  a", "a  ", "\n\ta", "a\x00b", "\ufeffé", "👩‍👩‍👧", "</s><s><unk>", "⁇ ▅"]


def check_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)


@pytest.mark.parametrize("text", [*TRICKY, "a▁b"], ids=ascii)
def test_round_trip_of_tricky_text(tokenizer, text):
    check_round_trip(tokenizer, text)


@settings(deadline=None)
@given(text=st.text())
def test_round_trip_of_any_text(tokenizer, text):
    check_round_trip(tokenizer, text)


def test_round_trip_of_real_text(tokenizer, texts):
    for text in texts:
        check_round_trip(tokenizer, text)


PIECES_OF_TEXT = st.sampled_from(["\n", "\n\n", "\r\n", " ", "  ", "\t", "a", "12", *TRICKY])


@pytest.fixture
def long_texts(monkeypatch):
    """Texts are long, so that they are encoded in parts, from the second character on."""
    monkeypatch.setattr(tokenizer_module, "LONG_CHARACTERS", 1)
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", 3)


def check_parts(tokenizer, text):
    parts = list(tokenizer.encode_parts(text))
    whole = tokenizer._processor.encode(text)
    assert [i for part in parts for i in part] == tokenizer.encode(text) == whole
    ids = document_ids(tokenizer, text)
    assert (ids.dtype, ids.tolist()) == (np.int32, [tokenizer.bos_id, *whole, tokenizer.eos_id])
    return len(parts)


@settings(deadline=None, max_examples=300)
@given(text=st.text() | st.lists(PIECES_OF_TEXT | st.text(max_size=3)).map("".join))
def test_parts_of_a_long_text_have_the_ids_of_the_whole(tokenizer, released, long_texts, text):
    for one in (tokenizer, *released.values()):
        check_parts(one, text)


def test_a_long_text_is_cut_after_newlines(tokenizer, released, texts, long_texts):
    text = "\n".join(texts)
    for one in (tokenizer, *released.values()):
        assert check_parts(one, text) > 300
        assert check_parts(one, "no newline " * 9) == 1
        assert check_parts(one, "\n" * 8) == 3
    with pytest.raises(InputError, match="not Unicode at character 4"):
        document_ids(tokenizer, "a\nb\n\ud800")


@pytest.mark.parametrize(
    "options",
    [
        {"user_defined_symbols": ["\n\n"]},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc"},
        {"treat_whitespace_as_suffix": True},
        {"byte_fallback": False},
        {"model_type": "unigram"},
    ],
    ids=str,
)
def test_a_long_text_is_whole_where_cutting_could_change_ids(texts, long_texts, options):
    model = io.BytesIO()
    plain = {"model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False}
    plain |= {"normalization_rule_name": "identity", "minloglevel": 2, "vocab_size": 400}
    lines = iter("\n".join(texts).splitlines())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, **plain | options
    )
    one = Tokenizer.from_bytes(model.getvalue())
    assert check_parts(one, " a \n\n  b\n" * 9) == 1


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(InputError, match="not Unicode at character 2"):
        tokenizer.encode("ab\ud800")


def test_ids_and_pieces_like_mistrals(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 601)
    assert [tokenizer.byte(i) for i in (2, 3, 258, 259)] == [b"", b"\x00", b"\xff", b""]
    pieces = [tokenizer.decode([i]) for i in range(601)]
    assert all(re.fullmatch(r"\D*|\d", piece) for piece in pieces)
    assert [tokenizer.decode([i]) for i in tokenizer.encode("x = 2026")[-4:]] == list("2026")
    spaces = {piece for piece in pieces if piece and not piece.strip(" ")}
    assert len(spaces) > 1  # pieces of several spaces, for indentation


def test_training_is_deterministic_and_silent(texts, tokenizer, capfd):
    assert train_tokenizer(iter(texts), 601).model_bytes == tokenizer.model_bytes
    assert capfd.readouterr() == ("", "")


def test_no_line_is_dropped():
    line = " ".join(["zebra"] * LINE_CHARACTERS)
    assert "zebra" in pieces_of(train_tokenizer([line], 270))
    assert "zebra" in pieces_of(train_tokenizer(["zebra zebra \u2585 zebra"], 270))
    assert train_tokenizer(["ab" * 10**5], 263)  # no word in it ends before its 16-bit limit


def pieces_of(tokenizer):
    return [tokenizer.decode([i]).strip() for i in range(tokenizer.vocab_size)]


def test_the_sample_is_bounded():
    assert list(sample(["abc", "déf", "ghi"], 5)) == ["abc", "d"]
    assert list(sample(["abc", "def", "ghi"], 6)) == ["abc", "def"]
    assert list(sample(iter(["ab"]), 6)) == ["ab"]


def test_text_beyond_the_sample_changes_nothing():
    texts = ["zebra stripes, "] * (sample_bytes(278) // 15 + 1)
    tokenizer = train_tokenizer(texts, 278)
    assert train_tokenizer([*texts, *["okapi"] * 9999], 278).model_bytes == tokenizer.model_bytes
    assert train_tokenizer(["okapi"] * 9999 + texts, 278).model_bytes != tokenizer.model_bytes


def test_vocabularies_that_do_not_fit_the_text():
    with pytest.raises(
        InputError, match=r"model\.vocab_size=5000 is more .* at most \d+$"
    ) as error:
        train_tokenizer(["hello world"], 5000)
    most = int(str(error.value).split()[-1])
    assert train_tokenizer(["hello world"], most).vocab_size == most
    with pytest.raises(InputError, match=r"model\.vocab_size=260 is too few .* set \d+") as error:
        train_tokenizer(["hello world"], 260)
    least = int(str(error.value).split()[-3])
    assert train_tokenizer(["hello world"], least).vocab_size == least
    for nothing in ([], ["\n\n"]):
        with pytest.raises(InputError, match="no text"):
            train_tokenizer(nothing, 300)


def test_saving_and_loading(tokenizer, tmp_path):
    path = tmp_path / "new" / "tokenizer.model"
    tokenizer.save(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for again in (Tokenizer.from_file(path), Tokenizer.from_bytes(tokenizer.model_bytes)):
        assert again.model_bytes == tokenizer.model_bytes
        assert again.encode("json.loads") == tokenizer.encode("json.loads")
    with pytest.raises(InputError, match="cannot be written"):
        tokenizer.save(path / "under_a_file")


@pytest.mark.parametrize("content", [None, b"", b"junk" * 9], ids=["missing", "empty", "junk"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "x.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"^tokenizer \S*x\.model (is not a Sent|cannot be read)"):
        Tokenizer.from_file(path)


# ---- decoding as ids arrive --------------------------------------------------------------------


def check_stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) + decoder.flush() == tokenizer.decode(ids)
    return parts


CONTROLS_AND_BYTES = st.integers(0, 258)
EURO = st.sampled_from([3 + byte for byte in (0xC2, 0xE2, 0x82, 0xAC, 0xF0, 0x9F)])


@settings(deadline=None, max_examples=400)
@given(ids=st.lists(EURO | CONTROLS_AND_BYTES | st.integers(0, 600)))
def test_stream_of_any_ids(tokenizer, ids):
    check_stream(tokenizer, ids)


@settings(deadline=None)
@given(text=st.text())
def test_stream_of_any_text(tokenizer, text):
    check_stream(tokenizer, tokenizer.encode(text))


def test_stream_shows_text_as_soon_as_it_is_whole(tokenizer):
    ids = tokenizer.encode("def né €👩x")
    parts = check_stream(tokenizer, ids)
    shown = "".join(part or "·" for part in parts)
    assert shown == "def n·é ··€···👩x"
    assert check_stream(tokenizer, np.array(ids)) == parts


def test_stream_does_not_wait_for_bytes_that_cannot_come(tokenizer):
    decoder = StreamDecoder(tokenizer)
    byte = {tokenizer.byte(i): i for i in range(259)}
    assert decoder.push(byte[b"\xff"]) == "\ufffd"
    assert decoder.push(byte[b"\xe2"]) == ""
    assert decoder.push(byte[b"\xe2"]) == "\ufffd"
    assert decoder.push(byte[b"\x82"]) == ""
    assert decoder.push(tokenizer.eos_id) == "\ufffd\ufffd"
    assert decoder.push(byte[b"\xe2"]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_stream_costs_the_same_for_every_id(tokenizer, monkeypatch):
    decoder = StreamDecoder(tokenizer)
    lengths = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    for token in tokenizer.encode("json.loads(text) " * 50):
        decoder.push(token)
    assert max(lengths) <= 5


# ---- the tokenizer of a run, and the command ---------------------------------------------------


def loaded(config, cached=None):
    return load_tokenizer(config, cached, open_corpus(config))


def test_load_tokenizer_from_a_file_or_from_the_data(make_config, folder, texts):
    path = folder / "t.model"
    config = make_config(f"{folder}/*.txt")
    made = loaded(config, path)
    assert not path.exists()
    assert made.vocab_size == 601
    assert made.model_bytes == loaded(config).model_bytes
    other = train_tokenizer(texts[:3], 601)
    assert other.model_bytes != made.model_bytes
    other.save(path)
    named = make_config(f"{folder}/*.txt", data={"tokenizer": str(path)})
    assert loaded(config, path).model_bytes == other.model_bytes
    assert loaded(named).model_bytes == other.model_bytes
    train_tokenizer(["hello world"], 270).save(path)
    for wrong in (config, named):
        with pytest.raises(InputError, match=r"270 pieces .*=601: set model\.vocab_size=270$"):
            loaded(wrong, path)


def test_the_tokenizer_never_sees_held_out_text(make_config, folder):
    (folder / "zzz.md").write_text("qqqqqqqq " * 5000)
    config = make_config(f"{folder}/*", data={"validation": f"{folder}/*.md"})
    assert "qqqq" not in pieces_of(loaded(config))
    assert "qqqq" in pieces_of(loaded(make_config(f"{folder}/*")))


@pytest.fixture
def command_line(folder):
    path = folder / "run.yaml"
    path.write_text(f"data: {{train: '{folder}/*.txt', tokenizer: train}}\n")
    return ["--config", str(path), "model.vocab_size=601", "--output", str(folder / "t.model")]


def test_command_writes_a_tokenizer(command_line, folder, capsys):
    assert command.main(command_line) == 0
    assert Tokenizer.from_file(folder / "t.model").vocab_size == 601
    out = capsys.readouterr().out
    assert re.search(r"trained on \d+ of \d+ documents \(\d+ bytes\)", out)
    assert re.search(r"601 pieces, [1-5]\.\d+ bytes per token", out)
    assert command.main(command_line) == 2
    assert re.fullmatch(r"error: \S*t\.model exists: .*--overwrite\n", capsys.readouterr().err)
    assert command.main([*command_line, "--overwrite"]) == 0


def test_command_reports_bad_input_in_one_line(command_line, folder, capsys):
    for override in ("model.vocab_size=1000000", "data.train=/nowhere/*.txt", "data.train=[]"):
        assert command.main([*command_line, override]) == 2
        captured = capsys.readouterr()
        assert re.fullmatch(r"error: .*\n", captured.err)
        assert not captured.out
        assert not (folder / "t.model").exists()


def test_command_takes_files_of_any_name(command_line, folder, capsys):
    (folder / os.fsdecode(b"\xff.txt")).write_bytes(b"\xff")
    assert command.main(command_line) == 0
    assert "skipped 1 malformed document: '" in capsys.readouterr().out
    for name, reason in (("x" * 300, "cannot be written: File name too long"), ("", "exists")):
        assert command.main([*command_line, "--overwrite", "--output", f"{folder}/{name}"]) == 2
        assert re.fullmatch(rf"error: \S* {reason}.*\n", capsys.readouterr().err)
    assert command.main([*command_line, "--output", f"{folder}/{'x' * 250}"]) == 0


def test_command_ends_at_ctrl_c(command_line, folder, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train_tokenizer", interrupted)
    assert command.main(command_line) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (folder / "t.model").exists()
