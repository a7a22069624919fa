"""The tokenizers that Mistral released: where they are found, their control ids, their streams."""

import hashlib
import importlib.util
import pathlib
import shutil

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixtral_jax.config import InputError
from mixtral_jax.data.corpus import open_corpus
from mixtral_jax.data.released import released_file
from mixtral_jax.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

VERSIONS = ("v1", "v2", "v3")
CONTROLS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
CONTROLS += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]")
ODD = "[INST] </s> <s> [TOOL_CALLS] <unk> <0x41> é€👩‍👩‍👧 日本語 𓀀 ⁇\x00\n\t▁  a  "
each_version = pytest.mark.parametrize("version", VERSIONS)

# ---- names and versions ------------------------------------------------------------------------


def test_files_of_mistral_common(released):
    sums = {v: hashlib.sha256(t.model_bytes).hexdigest()[:8] for v, t in released.items()}
    assert sums == {"v1": "dadfd56d", "v2": "37f00374", "v3": "9addc8bd"}
    assert {v: t.vocab_size for v, t in released.items()} == {"v1": 32000, "v2": 32768, "v3": 32768}
    assert {v: t.version for v, t in released.items()} == {v: v for v in VERSIONS}
    assert released_file("tokenizer.model") is None


@each_version
def test_version_of_a_plainly_named_file(released, version, tmp_path):
    """What mistral-common has as v2 was released as v3, so only a name makes it v2."""
    path = tmp_path / "tokenizer.model"
    released[version].save(path)
    told = {"v1": "v1", "v2": "v3", "v3": "v3"}[version]
    assert Tokenizer.from_name_or_file(path).version == told
    assert Tokenizer.from_bytes(released[version].model_bytes).version == told
    for ending, name in ((".v2", "v2"), (".v3", "v3")):
        named = shutil.copy(path, f"{path}{ending}")
        assert Tokenizer.from_file(named).version == ("v1" if version == "v1" else name)


def test_version_of_a_later_template(released):
    folder = released_file("mistral-v3").parent
    for path in folder.glob("*.model.v7*"):
        assert Tokenizer.from_file(path).version is None


def test_a_released_tokenizer_for_training(released, make_config):
    config = make_config("{stdlib}/json/*.py", data={"tokenizer": "mistral-v3"})
    corpus = open_corpus(config)
    with pytest.raises(InputError, match=r"tokenizer mistral-v3 has 32768 .*vocab_size=32768$"):
        load_tokenizer(config, None, corpus)


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^tokenizer mistral-v1: pip install mistral-common, or "):
        Tokenizer.from_name_or_file("mistral-v1")
    assert released_file("other") is None
    spec = importlib.util.spec_from_loader("mistral_common", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(
        InputError, match=r"^tokenizer mistral-v2: the installed mistral-common has"
    ):
        released_file("mistral-v2")


def test_a_file_may_have_a_released_name(released, tmp_path, monkeypatch):
    released["v1"].save(tmp_path / "mistral-v3")
    monkeypatch.chdir(tmp_path)
    assert Tokenizer.from_name_or_file("mistral-v3").version == "v3"
    assert Tokenizer.from_name_or_file("./mistral-v3").version == "v1"
    assert Tokenizer.from_name_or_file(pathlib.Path("mistral-v3").resolve()).version == "v1"


# ---- ids ---------------------------------------------------------------------------------------


def test_control_ids(released, tokenizer):
    for version in ("v2", "v3"):
        assert [released[version].control_id(piece) for piece in CONTROLS] == list(range(3, 10))
        assert released[version].control_id("</s>") == 2
        with pytest.raises(ValueError, match=r"'Hello' is no control piece of a v. tokenizer"):
            released[version].control_id("Hello")
    for plain in (released["v1"], tokenizer):
        with pytest.raises(ValueError, match=r"'\[INST\]' is no control piece of a v1"):
            plain.control_id("[INST]")
    ids = released["v1"].encode(ODD)
    assert released["v3"].encode(ODD) == [i + 768 for i in ids] == released["v2"].encode(ODD)


@each_version
@settings(deadline=None, max_examples=200)
@given(
    text=st.text() | st.lists(st.sampled_from([*CONTROLS, "</s>", "<s>", " ", "a"])).map("".join)
)
@example(text=ODD)
@example(text="".join(f"[control_{n}]" for n in range(8, 769)) + "[IMG][PREFIX][MIDDLE][SUFFIX]")
def test_no_text_becomes_a_control_id(released, version, text):
    tokenizer = released[version]
    ids = tokenizer.encode(text)
    first_byte = 3 if version == "v1" else 771
    assert not ids or min(ids) >= first_byte
    assert tokenizer.decode(ids) == text.replace("▁", " ")


def test_a_reference_document_is_a_piece_of_its_own_in_v3(released):
    """As in mistral-common: users' text may name these."""
    assert 755 in released["v3"].encode("see [REFERENCE_DOC_15]")


# ---- decoding as ids arrive --------------------------------------------------------------------


def stream(decoder, ids):
    return [decoder.push(token) for token in ids] + [decoder.flush()]


@each_version
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_stream_of_any_ids(released, version, data):
    tokenizer = released[version]
    low = st.integers(0, 1100)  # controls and bytes
    euro = [
        i for i in range(1100) if tokenizer.byte(i) in (b"\xe2", b"\x82", b"\xac", b"\xf0", b"\x9f")
    ]
    ids = data.draw(
        st.lists(low | st.sampled_from(euro) | st.integers(0, tokenizer.vocab_size - 1))
    )
    assert "".join(stream(StreamDecoder(tokenizer), ids)) == tokenizer.decode(ids)


@each_version
@settings(deadline=None, max_examples=200)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")))
@example(text=ODD)
@example(text="𓀀👩‍👩‍👧 日本語 한국어 🏴󠁧󠁢󠁳󠁣󠁴󠁿")
def test_stream_never_shows_half_a_character(released, version, text):
    tokenizer = released[version]
    ids = tokenizer.encode(text)
    parts = stream(StreamDecoder(tokenizer), ids)
    assert "".join(parts) == text.replace("▁", " ")
    assert "\ufffd" not in "".join(parts)
    assert parts[-1] == ""


@each_version
def test_stream_of_emoji_and_rare_letters_uses_bytes(released, version):
    tokenizer = released[version]
    ids = tokenizer.encode("a𓀀b")
    assert sum(bool(tokenizer.byte(i)) for i in ids) == 4
    assert stream(StreamDecoder(tokenizer), ids) == ["a", "", "", "", "𓀀", "b", ""]


@each_version
@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=12), cut=st.integers(0, 40))
@example(text=" 日本 𓀀 a  b", cut=1)
def test_stream_that_begins_in_the_middle_of_a_text(released, version, text, cut):
    """After a prompt that ends with a whole character, an answer is the rest of the text."""
    tokenizer = released[version]
    ids = tokenizer.encode(text)
    while 0 < cut < len(ids) and tokenizer.byte(ids[cut - 1]) and tokenizer.byte(ids[cut]):
        cut += 1
    decoder = StreamDecoder(tokenizer)
    before = "".join(stream(decoder, ids[:cut]))
    assert before + "".join(stream(decoder, ids[cut:])) == tokenizer.decode(ids)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_control_ids_print_nothing(released, version):
    tokenizer = released[version]
    controls = [tokenizer.control_id(piece) for piece in (*CONTROLS, "<s>", "</s>")]
    assert not any(stream(StreamDecoder(tokenizer), controls))
    ids = [3, *tokenizer.encode("né 👩"), 4, *tokenizer.encode("Hi 日本"), 2]
    parts = stream(StreamDecoder(tokenizer), ids)
    assert "".join(parts) == tokenizer.decode(ids)
    assert parts[0] == parts[-1] == parts[-2] == ""
