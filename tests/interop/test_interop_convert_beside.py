"""What lies beside the weights of a folder: what convert carries over, says of it and refuses."""

import dataclasses
import io
import json

import pytest
import sentencepiece
from checkpoint_files import CONFIG, CONFIG_JSON, Drawn, edit_json, write

import mixtral_jax
from mixtral_jax.data.tokenizer import Tokenizer

GENERATION = "generation_config.json"


def token_ids(folder):
    """bos, eos and pad, which both files of a Hugging Face folder say."""
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = [json.loads((folder / name).read_text()) for name in (CONFIG_JSON, GENERATION)]
    ids = [[values[key] for key in keys] for values in found]
    assert ids[0] == ids[1]
    return ids[0]


# ---- where a text begins and ends --------------------------------------------------------------


@pytest.fixture(scope="module")
def shifted():
    """A tokenizer whose BOS and EOS are 2 and 3."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a few words, the same again, a few words "] * 9),
        model_writer=model,
        **{"vocab_size": 30, "model_type": "bpe", "minloglevel": 2},
        **{"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3},
    )
    return Tokenizer.from_bytes(model.getvalue())


def test_the_ids_are_the_tokenizers(main, tmp_path, shifted):
    weights = Drawn(dataclasses.replace(CONFIG, vocab_size=shifted.vocab_size))
    source = write(tmp_path / "source", "mistral", weights, shifted)
    for number, form in enumerate(("huggingface", "orbax", "huggingface")):
        assert main(source, tmp_path / str(number), form)[0] == 0
        source = tmp_path / str(number)
        if form == "huggingface":
            assert token_ids(source) == [2, 3, None]
    mixtral_jax.save_model(*mixtral_jax.load_model(source), tmp_path / "saved", "huggingface")
    assert token_ids(tmp_path / "saved") == [2, 3, None]


@pytest.mark.parametrize("ids", [[1, 320, 0], [1, [2, 320], None], [None, 2, -1]], ids=str)
def test_the_ids_of_a_config_come_along(copy, main, ids):
    """A fine-tune's, which the tokenizer, if there is one, does not know."""
    source = copy("single")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    edit_json(source / CONFIG_JSON, lambda values: values.update(zip(keys, ids)))
    (source / GENERATION).unlink()
    assert main(source, source.with_name("target"), "huggingface")[0] == 0
    assert token_ids(source.with_name("target")) == ids


@pytest.mark.parametrize("ids", [{}, {"bos_token_id": "x", "eos_token_id": [2, True]}], ids=str)
def test_nothing_is_claimed_where_nothing_is_known(copy, main, ids):
    source = copy("single")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    edit_json(source / CONFIG_JSON, lambda values: [values.pop(key) for key in keys])
    edit_json(source / CONFIG_JSON, lambda values: values.update(ids))
    (source / GENERATION).unlink()
    for number, form in enumerate(
        ("huggingface", "mistral", "huggingface", "orbax", "huggingface")
    ):
        target = source.with_name(str(number))
        assert main(source, target, form)[0] == 0
        source = target
        if form == "huggingface":
            assert token_ids(target) == [None, None, None]
