"""Tiny checkpoint folders of odd sizes, written without JAX, and what the safetensors library
reads in them."""

import json

import ml_dtypes
import numpy as np
from safetensors import numpy as library

from mixtral_jax.config import ModelConfig
from mixtral_jax.interop import names, saving

CONFIG = ModelConfig(
    vocab_size=37,
    hidden_size=10,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_local_experts=3,
    num_experts_per_tok=2,
    max_position_embeddings=48,
)
BF16 = np.dtype(ml_dtypes.bfloat16)
SHARDS = 3000  # bytes: several files, and one layer's experts in two of them
HUGGING_FACE, MISTRAL = "model.safetensors", "consolidated.safetensors"
INDEX, CONFIG_JSON, PARAMS_JSON = f"{HUGGING_FACE}.index.json", "config.json", "params.json"


class Drawn:
    """Random weights, as `saving` wants them; where `narrow` says so they are bfloat16."""

    def __init__(self, config=CONFIG, narrow=lambda piece: False, seed=0):
        self.config = config
        self._narrow, self._seed, self._sizes = narrow, seed, names.sizes(config)

    def dtype(self, piece):
        return BF16 if self._narrow(piece) else np.dtype(np.float32)

    def read(self, piece, wanted):
        number = list(names.pieces(self.config)).index(piece)
        shape = [self._sizes[letter] for letter in piece.letters]
        array = np.random.default_rng([self._seed, number]).normal(size=shape)
        array = (array / 3).astype(self.dtype(piece))
        return array.transpose([piece.letters.index(letter) for letter in wanted]), wanted

    def release(self, piece):
        pass


def write(folder, form, weights=None, tokenizer=None, shards=10**9):
    """A valid folder in the form "sharded", "single" or "mistral"."""
    weights, beside = weights or Drawn(), saving.tokenizer_files(tokenizer)
    if form == "mistral":
        saving.write_mistral(weights, beside, folder)
    else:
        most = SHARDS if form == "sharded" else shards
        saving.write_huggingface(weights, beside, folder, max_shard_size=most)
    return folder


def write_dense(folder, form, weights):
    """The dense model in a Mixtral with one expert: a Mistral's folder."""
    folder.mkdir()
    values = (folder / CONFIG_JSON, saving.configs.to_huggingface(weights.config, "float32", {}))
    table, file = names.HUGGING_FACE_DENSE, HUGGING_FACE
    if form == "mistral":
        values = (folder / PARAMS_JSON, saving.configs.to_mistral(weights.config))
        table, file = names.MISTRAL_DENSE, MISTRAL
    values[0].write_text(json.dumps(values[1]))
    edit_json(values[0], call_it_dense)
    pieces = [p for p in names.pieces(weights.config) if p.parameter in table.entries]
    writer = saving.Writer(weights, table, None, lambda count: None)
    writer.write(folder / file, [(piece, writer._tensor(piece)) for piece in pieces])
    return folder


def call_it_dense(values):
    """Change a config.json or a params.json of a Mixtral to a Mistral's."""
    if values.pop("moe", None) is None:
        values |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensors(path, change):
    """`change` gets the dictionary of a file's arrays."""
    arrays = dict(library.load_file(path))
    change(arrays)
    library.save_file(arrays, path, {"format": "pt"})


def edit_header(path, change):
    """`change` gets the header; the tensors' bytes stay."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])


def tensors(folder):
    """Every tensor of a folder as the library reads it."""
    return {
        name: array
        for path in sorted(folder.glob("*.safetensors"))
        for name, array in library.load_file(path).items()
    }
