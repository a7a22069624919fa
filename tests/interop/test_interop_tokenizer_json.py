"""transformers' AutoTokenizer on our files: the same ids, text and conversations as our own."""

import functools
import io
import json
import pathlib
import sysconfig

import jax
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

import mixtral_jax
from mixtral_jax import sharding
from mixtral_jax.config import InputError, ModelConfig
from mixtral_jax.data.chat import encode_chat
from mixtral_jax.data.sentencepiece_model import PieceType, read_model
from mixtral_jax.data.tokenizer import Tokenizer, train_tokenizer
from mixtral_jax.interop.conversion import convert
from mixtral_jax.interop.folders import Kind
from mixtral_jax.interop.tokenizer_json import huggingface_files, merges
from mixtral_jax.model.mixtral import initialize

JSON_ROOM = pathlib.Path(sysconfig.get_paths()["stdlib"]) / "json"
SOURCES = [path.read_text(encoding="utf-8") for path in sorted(JSON_ROOM.glob("*.py"))]
LINES = "".join(SOURCES).splitlines()
NAMES = ("mistral-v1", "mistral-v2", "mistral-v3", "own")
every_tokenizer = pytest.mark.parametrize("name", NAMES)


@functools.cache
def ours(name):
    if name == "own":
        return train_tokenizer(SOURCES, 701)
    pytest.importorskip("mistral_common")
    return Tokenizer.from_name_or_file(name)


@functools.cache
def normal_pieces(name):
    pieces = read_model(ours(name).model_bytes).pieces
    return [piece.text for piece in pieces if piece.type is PieceType.NORMAL]


def write(folder, tokenizer):
    """The files, and what a checkpoint has beside them."""
    for file, content in huggingface_files(tokenizer).items():
        (folder / file).write_bytes(content)
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    values = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """theirs(name): what transformers loads from a folder with the files of a tokenizer."""
    transformers = pytest.importorskip("transformers")

    @functools.cache
    def load(name):
        folder = tmp_path_factory.mktemp(name)
        write(folder, ours(name))
        return transformers.AutoTokenizer.from_pretrained(folder)

    return load


# ---- text --------------------------------------------------------------------------------------

SPECIAL = ("<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]")
SPECIAL += ("[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[control_")
ODD = [
    "",
    " ",
    "  a",
    "a  ",
    " a",
    "\n",
    "\n\ta",
    "\t\t",
    "a\x00b",
    "\ufeffé",
    "👩‍👩‍👧",
    "日本語 中文",
]
ODD += ["a▁b", "▁", "▁ a", "<0x0A>", "⁇ ▅", "x = 2026", "3.14159e-10", "a\r\nb", "ﬁ Å ①", "\u3000"]
ODD += ["[REFERENCE_DOC_3]", "a[REFERENCE_DOC_13]b", "[REFERENCE_DOC_1] [REFERENCE_DOC_1"]
ODD += [left + " " * count + right for count in range(40) for left in ("", "a") for right in "a\n"]
ODD += [character * count for count in (2, 7, 33) for character in "=-a\n▁."]


def ordinary(text):
    """Holds nothing that the tokenizers library takes for a special token."""
    return not any(special in text for special in SPECIAL)


def check_same(mine, other, text):
    ids = [mine.bos_id, *mine.encode(text)]
    assert other.encode(text) == ids
    assert other.encode(text, add_special_tokens=False) == ids[1:]
    assert other.decode(ids, skip_special_tokens=True) == mine.decode(ids)


@every_tokenizer
def test_same_ids_for_known_text(theirs, name):
    for text in [*ODD, *SOURCES]:
        check_same(ours(name), theirs(name), text)


@every_tokenizer
def test_same_ids_for_single_lines(theirs, name):
    for line in LINES:
        check_same(ours(name), theirs(name), line)


TEXTS = st.lists(st.sampled_from(ODD) | st.text(max_size=9) | st.text(" \nab=12", max_size=30))
TEXTS = TEXTS.map("".join).filter(ordinary)


@every_tokenizer
@settings(max_examples=300)
@given(text=TEXTS)
def test_same_ids_for_any_text(theirs, name, text):
    check_same(ours(name), theirs(name), text)


@every_tokenizer
@given(data=st.data())
def test_same_ids_for_pieces_in_any_order(theirs, name, data):
    """Ordinary text meets few of the rules for what is merged first."""
    parts = data.draw(st.lists(st.sampled_from(normal_pieces(name)), min_size=1, max_size=8))
    if ordinary(text := "".join(parts)):
        check_same(ours(name), theirs(name), text)
        check_same(ours(name), theirs(name), text.replace("▁", " "))


@pytest.mark.parametrize("name", NAMES[2:3])
def test_every_piece_behind_a_user_defined_one(theirs, name):
    """There, a whole part can be in the vocabulary, and is then taken without merges."""
    mine, other = ours(name), theirs(name)
    for piece in normal_pieces(name):
        text = f"[REFERENCE_DOC_3]{piece}"
        assert other.encode(text, add_special_tokens=False) == mine.encode(text)


@every_tokenizer
def test_special_tokens(theirs, name):
    mine, other = ours(name), theirs(name)
    assert (other.bos_token_id, other.eos_token_id, other.unk_token_id) == (1, 2, 0)
    assert len(other) == mine.vocab_size
    ids = [mine.bos_id, *mine.encode("a"), mine.eos_id, *mine.encode("b"), mine.eos_id]
    assert other.decode(ids, skip_special_tokens=True) == mine.decode(ids) == "a b"
    assert other.encode("a</s>b</s>") == ids  # in any text: there is no way to have it otherwise
    assert other.encode("a", "b") == [1, *mine.encode("a"), 1, *mine.encode("b")]


TRAINING = {"model_type": "bpe", "vocab_size": 400, "minloglevel": 2, "byte_fallback": True}
TRAINING |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
OTHERS = {
    "single spaces": {"remove_extra_whitespaces": True},
    "no space in front": {"add_dummy_prefix": False},
    "neither": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False},
    "symbols": {"user_defined_symbols": ["<a>", "<a>b", "self.", "(|)"]},
    "other names": {"bos_piece": "<bos>", "eos_piece": "<eos>", "unk_piece": "<?>"},
    "control": {"control_symbols": ["<one>", "<two>"]},
}


def trained(lines=LINES, **options):
    model = io.BytesIO()
    options = TRAINING | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **options
    )
    return Tokenizer.from_bytes(model.getvalue())


@pytest.mark.parametrize("case", OTHERS)
def test_models_with_other_flags(tmp_path, case):
    transformers = pytest.importorskip("transformers")
    mine = trained(**OTHERS[case])
    write(tmp_path, mine)
    other = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*ODD, *SOURCES, "x<a><a>b <a> self.x (|) "]:
        assert other.encode(text) == [mine.bos_id, *mine.encode(text)]
    assert other.decode(other.encode("a b"), skip_special_tokens=True) == "a b"


REFUSED = {
    "unigram": {"model_type": "unigram"},
    "letters normalised": {"normalization_rule_name": "nmt_nfkc"},
    "spaces at the end": {"treat_whitespace_as_suffix": True},
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_files_for_what_they_cannot_spell(case):
    assert huggingface_files(trained(**REFUSED[case])) == {}


# ---- conversations -----------------------------------------------------------------------------


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def system(content):
    return {"role": "system", "content": content}


CHATS = {
    "one": [user("Hello")],
    "turns": [user("Hello"), assistant("Hi there"), user("Bye")],
    "system": [system("Be brief."), user("a"), assistant("b"), user("c")],
    "system late": [user("a"), system("one"), user("b"), system("two"), system("three")],
    "system before an answer": [user("a"), system("s"), assistant("b"), user("c")],
    "system alone": [system("Be brief.")],
    "empty system": [system(""), user("a")],
    "empty with system": [system("s"), user(""), assistant("b"), user("")],
    "spaces": [user("  a  "), assistant("  b \n "), user(" "), assistant("   "), user("\n\n")],
    "merged": [user("a"), user(""), user("b"), assistant("c"), assistant("d"), user("e")],
    "prefix": [user("a"), assistant("The answer is ", prefix=True)],
    "prefix merged": [user("a"), assistant("x"), assistant("y", prefix=True)],
    "assistant first": [assistant("Hello!"), user("a")],
    "parts": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), user("c")],
}


def rendered(other, messages, **more):
    return other.apply_chat_template(messages, tokenize=True, return_dict=False, **more)


@every_tokenizer
@pytest.mark.parametrize("case", CHATS)
def test_same_conversation(theirs, name, case):
    ids = encode_chat(ours(name), CHATS[case])
    assert rendered(theirs(name), CHATS[case]) == ids
    if CHATS[case][-1]["role"] == "user":
        assert rendered(theirs(name), CHATS[case], add_generation_prompt=True) == ids


def test_the_answer_of_v1_begins_with_a_space(theirs):
    ids = rendered(theirs("mistral-v1"), CHATS["turns"])
    assert ids[9:12] == [15359, 736, 2]  # 23809 for "[/INST]Hi"


PLAIN_TEXTS = TEXTS | st.text(" a\n▁]", max_size=6)
MESSAGES = st.lists(
    st.builds(user, PLAIN_TEXTS)
    | st.builds(system, PLAIN_TEXTS)
    | st.builds(assistant, PLAIN_TEXTS.filter(bool)),
    min_size=1,
    max_size=8,
)


@every_tokenizer
@settings(max_examples=300)
@given(messages=MESSAGES)
def test_same_conversation_whatever_is_said(theirs, name, messages):
    try:
        ids = encode_chat(ours(name), messages)
    except InputError:  # the order of roles
        return
    assert rendered(theirs(name), messages) == ids


@every_tokenizer
def test_a_whole_conversation_ends_with_eos(theirs, name):
    messages = CHATS["turns"][:2]
    assert (
        rendered(theirs(name), messages)
        == encode_chat(ours(name), CHATS["turns"])[: len(rendered(theirs(name), messages))]
    )
    assert rendered(theirs(name), messages)[-1] == 2


@every_tokenizer
def test_conversations_that_the_template_cannot_hold(theirs, name):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for messages in ([user("a"), call], [{"role": "tool", "content": "a"}]):
        with pytest.raises(Exception, match="texts only"):
            rendered(theirs(name), messages)
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(Exception, match="no tools"):
        rendered(theirs(name), [user("a")], tools=[tool])


# ---- the files themselves ----------------------------------------------------------------------


def read(tokenizer):
    files = huggingface_files(tokenizer)
    return json.loads(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])


@every_tokenizer
def test_pieces_and_flags(name):
    tokenizer = ours(name)
    values, config = read(tokenizer)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    numbers = range(processor.vocab_size())
    assert values["model"]["vocab"] == {processor.id_to_piece(i): i for i in numbers}
    control = [i for i in numbers if processor.is_control(i) or processor.is_unknown(i)]
    assert [token["id"] for token in values["added_tokens"]] == control
    assert values["model"]["byte_fallback"]
    assert values["model"]["fuse_unk"]
    assert values["model"]["ignore_merges"] == (name == "mistral-v3")
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == (
        "<s>",
        "</s>",
        "<unk>",
    )


@every_tokenizer
def test_merges_are_all_pairs_and_the_best_come_first(name):
    tokenizer = ours(name)
    model = read_model(tokenizer.model_bytes)
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    normal = set(normal_pieces(name))
    made = merges(model)
    wanted = {(p[:i], p[i:]) for p in normal for i in range(1, len(p))}
    assert set(made) == {(left, right) for left, right in wanted if {left, right} <= normal}
    assert len(set(made)) == len(made)
    scores = [processor.get_score(processor.piece_to_id(left + right)) for left, right in made]
    assert scores == sorted(scores, reverse=True)
    assert {left + right for left, right in made} == {p for p in normal if len(p) > 1}


@pytest.mark.parametrize("name", NAMES[:3])
def test_number_of_merges_of_the_released_models(name):
    assert len(merges(read_model(ours(name).model_bytes))) == 58980


def test_scores_and_types_as_sentencepiece_reads_them():
    tokenizer = ours("own")
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    for number, piece in enumerate(read_model(tokenizer.model_bytes).pieces):
        assert piece.text == processor.id_to_piece(number)
        assert piece.score == processor.get_score(number)
        assert (piece.type is PieceType.BYTE) == processor.is_byte(number)


def test_a_version_without_a_known_template_has_none():
    tokenizer = Tokenizer.from_bytes(ours("own").model_bytes)
    tokenizer.version = None
    assert "chat_template" not in read(tokenizer)[1]


@pytest.mark.parametrize("flag", ["add_dummy_prefix", "split_by_whitespace"])
def test_no_template_where_an_answer_cannot_be_told_from_what_is_before_it(flag):
    lines = ["a] a b] c] a] [INST]"] * 50  # which makes "]▁[" a piece if pieces may hold spaces
    assert "chat_template" in read(trained(vocab_size=276, lines=lines))[1]
    assert "chat_template" not in read(trained(vocab_size=276, lines=lines, **{flag: False}))[1]


# ---- in checkpoint folders ---------------------------------------------------------------------


def save(tokenizer, folder, form):
    """With a model of the smallest sizes."""
    sizes = {"hidden_size": 4, "intermediate_size": 3, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **sizes, **heads)
    model = initialize(config, jax.random.key(0), sharding.make_mesh())
    mixtral_jax.save_model(model, tokenizer, folder, form)


def test_a_converted_folder_has_them_and_those_of_the_source_win(tmp_path):
    tokenizer = ours("own")
    first, second, third, fourth = (tmp_path / name for name in "abcd")
    save(tokenizer, first, "mistral")
    made = huggingface_files(tokenizer)
    assert not any((first / file).exists() for file in made)
    convert(first, second, Kind.HUGGING_FACE)
    assert {file: (second / file).read_bytes() for file in made} == made

    (second / "tokenizer.json").unlink()
    (second / "tokenizer_config.json").write_bytes(b"{}")
    convert(second, third, Kind.HUGGING_FACE)
    assert (third / "tokenizer.json").read_bytes() == made["tokenizer.json"]
    assert (third / "tokenizer_config.json").read_bytes() == b"{}"

    (third / "tokenizer.json").write_bytes(b"{}")
    (third / "tokenizer_config.json").unlink()
    convert(third, fourth, Kind.HUGGING_FACE)
    assert (fourth / "tokenizer.json").read_bytes() == b"{}"
    assert not (fourth / "tokenizer_config.json").exists()


def test_a_v2_folder_keeps_its_version(tmp_path):
    tokenizer = ours("mistral-v2")
    save(tokenizer, tmp_path / "a", "huggingface")
    made = huggingface_files(tokenizer)
    assert {file: (tmp_path / "a" / file).read_bytes() for file in made} == made
