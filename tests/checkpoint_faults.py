"""Faults for valid checkpoint folders, one each.

A function takes a folder in any form, breaks it, and gives the words that the error must have.
"""

import json
import re

import numpy as np
import pytest
from checkpoint_files import (
    CONFIG_JSON,
    HUGGING_FACE,
    INDEX,
    MISTRAL,
    PARAMS_JSON,
    edit_header,
    edit_json,
    edit_tensors,
)

import mixtral_jax
from mixtral_jax.config import InputError
from mixtral_jax.data.tokenizer import train_tokenizer

FORMS = ("sharded", "single", "mistral")
WEIGHTS = {"single": HUGGING_FACE, "mistral": MISTRAL}
CONFIGS = {"sharded": CONFIG_JSON, "single": CONFIG_JSON, "mistral": PARAMS_JSON}


def message_of(folder):
    """What load_model says of a folder."""
    with pytest.raises(InputError) as error:
        mixtral_jax.load_model(folder)
    message = str(error.value)
    assert message.isprintable()
    assert len(message) < len(str(folder)) * 2 + 400, message
    return message


GATE = "model.layers.1.block_sparse_moe.gate.weight"
NATIVE_GATE = "layers.1.feed_forward.gate.weight"
W2 = "model.layers.0.block_sparse_moe.experts.2.w2.weight"
NATIVE_W2 = "layers.0.feed_forward.experts.2.w2.weight"
NAMES = {"GATE": (GATE, NATIVE_GATE), "W2": (W2, NATIVE_W2)}


def weights_file(folder, tensor=W2):
    """The file that holds a tensor."""
    index = folder / INDEX
    if index.exists():
        return folder / json.loads(index.read_text())["weight_map"][tensor]
    return next(folder / name for name in WEIGHTS.values() if (folder / name).exists())


def named(folder, tensor):
    """A tensor's name in the form of a folder."""
    return NAMES[tensor][(folder / MISTRAL).exists()]


def config_of(folder):
    return folder / (PARAMS_JSON if (folder / PARAMS_JSON).exists() else CONFIG_JSON)


def pop(tensor):
    def break_it(folder):
        name = named(folder, tensor)
        edit_tensors(weights_file(folder, name), lambda arrays: arrays.pop(name))
        return [str(folder), name]

    return break_it


def replace(tensor, change):
    """The tensor's array becomes another; the error names file and tensor."""

    def break_it(folder):
        name = named(folder, tensor)
        path = weights_file(folder, name)
        edit_tensors(path, lambda arrays: arrays.update({name: change(arrays[name])}))
        return [f"{path}: tensor {name}"]

    return break_it


def extra(name):
    """A tensor too many, in the first file and in the index."""

    def break_it(folder):
        path = weights_file(folder, named(folder, "W2"))
        edit_tensors(path, lambda arrays: arrays.update({name: np.zeros(3, np.float32)}))
        if (folder / INDEX).exists():
            edit_json(folder / INDEX, lambda v: v["weight_map"].update({name: path.name}))
        return [str(path), name]

    return break_it


def header(change):
    def break_it(folder):
        name = named(folder, "W2")
        path = weights_file(folder, name)
        edit_header(path, lambda values: change(values, name))
        return [str(path), "tensor"]

    return break_it


def shape_beyond_the_file(values, name):
    values[name]["shape"] = [2**40, 2**20]


def offsets_beyond_the_file(values, name):
    values[name]["shape"], values[name]["data_offsets"] = [2**38], [0, 2**40]


def offsets_that_overlap(values, name):
    first = next(key for key in values if key not in ("__metadata__", name))
    values[name] = dict(values[first])


def negative_offsets(values, name):
    values[name]["data_offsets"] = [-8, values[name]["data_offsets"][1]]


def cut(at):
    """The file ends after `at` of its bytes, or before so many."""

    def break_it(folder):
        path = weights_file(folder, named(folder, "W2"))
        path.write_bytes(path.read_bytes()[:at])
        return [str(path)]

    return break_it


def long_header(folder):
    path = weights_file(folder, named(folder, "W2"))
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    return [str(path), "header of 4611686018427387904 bytes"]


def without_config(folder):
    path = config_of(folder)
    path.unlink()
    return [f"{path} does not exist"]


def config_bytes(data, *words):
    def break_it(folder):
        config_of(folder).write_bytes(data)
        return [str(config_of(folder)), *words]

    return break_it


def layers(count, *words):
    def break_it(folder):
        path = config_of(folder)
        key = "n_layers" if path.name == PARAMS_JSON else "num_hidden_layers"
        edit_json(path, lambda values: values.update({key: count}))
        return [str(folder), *words]

    return break_it


def experts(count, *words):
    def break_it(folder):
        def change(values):
            inside = values.get("moe", values)
            inside["num_experts" if "moe" in values else "num_local_experts"] = count

        edit_json(config_of(folder), change)
        return [str(folder), *words]

    return break_it


def millions(folder):
    """Sizes that would be a plan of three million tensors."""
    for path in folder.glob("*.safetensors"):
        edit_tensors(path, lambda a: [a.pop(name) for name in list(a) if "gate.w" in name])
    if (folder / INDEX).exists():
        gates = re.compile(r'"[^"]*gate.weight": "[^"]*", ')
        text = json.dumps(json.loads((folder / INDEX).read_text()))
        (folder / INDEX).write_text(gates.sub("", text))
    layers(1000)(folder)
    experts(1000)(folder)
    return [f"{folder} lacks tensor", "gate.weight (and 999 or more)", "1000 layers of 1000"]


def vocabulary(size):
    def break_it(folder):
        edit_json(config_of(folder), lambda values: values.update(vocab_size=size))
        return [str(folder), "vocab_size" if size > 2**24 else "embed"]

    return break_it


def garbage_tokenizer(folder):
    (folder / "tokenizer.model").write_bytes(b"no protocol buffer")
    return [str(folder / "tokenizer.model"), "is not a SentencePiece model"]


def other_tokenizer(folder):
    train_tokenizer(["a few words, the same again, a few words " * 9], 300).save(
        folder / "tokenizer.model"
    )
    return [str(folder / "tokenizer.model"), "300 pieces", "37 rows", "another model's"]


ANY = {
    "missing tensor": pop("GATE"),
    "wrong shape": replace("GATE", lambda a: a[:-1]),
    "transposed": replace("W2", lambda a: np.ascontiguousarray(a.T)),
    "a dimension more": replace("W2", lambda a: a[None]),
    "int8": replace("GATE", lambda a: a.astype(np.int8)),
    "float64": replace("W2", lambda a: a.astype(np.float64)),
    "extra tensor": extra("model.layers.1.self_attn.q_proj.bias"),
    "tensor with a line break": extra("two\nlines" + "x" * 900),
    "shape beyond the file": header(shape_beyond_the_file),
    "offsets beyond the file": header(offsets_beyond_the_file),
    "overlap": header(offsets_that_overlap),
    "negative offsets": header(negative_offsets),
    "cut in the data": cut(-1),
    "cut in the header": cut(99),
    "empty file": cut(0),
    "long header": long_header,
    "no config": without_config,
    "config not JSON": config_bytes(b"{'vocab_size': 37}", "not JSON"),
    "config a list": config_bytes(b"[1, 2]", "must be a JSON object"),
    "config not UTF-8": config_bytes(b'{"\xff": 1}', "not UTF-8"),
    "config nested": config_bytes(b'{"a":' * 9999, "nested too deeply"),
    "config empty": config_bytes(b"", "not JSON"),
    "more layers": layers(3, "lacks tensor", "layers.2.", "promises 3 layers of 3 experts"),
    "fewer layers": layers(1, "layers.1.", "is not a Mixtral's"),
    "absurd layers": layers(10**9, "=1000000000", "from 1 to 1000"),
    "fewer experts": experts(2, "gate.weight has shape (3, 10)", "wants (2, 10)"),
    "more experts": experts(4, "gate.weight has shape (3, 10)", "wants (4, 10)"),
    "absurd plan": millions,
    "absurd vocabulary": vocabulary(2**31 - 1),
    "large vocabulary": vocabulary(2**24),
    "garbage tokenizer": garbage_tokenizer,
    "another tokenizer": other_tokenizer,
}
