"""A model and its tokenizer saved together, and what AutoTokenizer makes of the folder."""

import jax
import pytest

import mixtral_jax
from mixtral_jax import sharding
from mixtral_jax.config import ModelConfig
from mixtral_jax.data.tokenizer import Tokenizer, train_tokenizer
from mixtral_jax.model.mixtral import initialize

SIZES = {
    **{"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_local_experts": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64},
}
TEXTS = [
    "",
    "Hello, world",
    "  two  spaces and a line\n\n  then 123 456",
    "émoji 🙂 字 日本語 №",
    "def f(x: int) -> int:\n    return x ** 2  # 7\n",
]


@pytest.mark.parametrize("name", ["mistral-v1", "mistral-v3", "trained"])
def test_the_saved_folder_gives_our_ids(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    if name == "trained":
        ours = train_tokenizer(["the cat sat on the mat, and the dog ate 12 cats\n" * 9], 310)
    else:
        pytest.importorskip("mistral_common")
        ours = Tokenizer.from_name_or_file(name)
    config = ModelConfig(vocab_size=ours.vocab_size, **SIZES)
    model = initialize(config, jax.random.key(0), sharding.make_mesh())
    mixtral_jax.save_model(model, ours, tmp_path / "saved", "huggingface")

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(theirs) == ours.vocab_size
    for text in TEXTS:
        ids = [ours.bos_id, *ours.encode(text)]
        assert theirs(text).input_ids == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == text

    _, again = mixtral_jax.load_model(tmp_path / "saved")
    assert again.model_bytes == ours.model_bytes
    assert again.version == ours.version
