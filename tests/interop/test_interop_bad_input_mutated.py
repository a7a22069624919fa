"""Checkpoint folders changed at random: one line of error, or what the library reads."""

import contextlib
import json
import shutil
import time
import tracemalloc

import numpy as np
import pytest
import safetensors
from checkpoint_faults import (
    CONFIGS,
    FORMS,
    GATE,
    NATIVE_W2,
    W2,
    millions,
)
from checkpoint_files import (
    CONFIG_JSON,
    HUGGING_FACE,
    edit_json,
    tensors,
)
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import mixtral_jax
from mixtral_jax.config import InputError
from mixtral_jax.interop import folders, names

MIB = 2**20
SCALARS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 8, 16, -1, 2**24, 2**31 - 1, 2**63, 2**64, 10**400]),
    st.integers(-3, 40),
    st.none(),
    st.booleans(),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from([W2, GATE, NATIVE_W2, HUGGING_FACE, "mistral", "MistralForCausalLM", "F16"]),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=9,
) | st.sampled_from(["NESTED", "LONG"])
BYTES = st.tuples(
    st.sampled_from(["flip", "insert", "delete", "copy", "cut"]),
    st.integers(0, 5000),
    st.one_of(st.integers(1, 255), st.sampled_from(b'-0123456789.,:"{}[]e \\')),
)
VALUES = st.tuples(st.sampled_from(["set", "drop", "rename", "swap"]), st.integers(0, 5000), JUNK)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("mutated")


def native_as_halves(array_RD, heads):
    """Mistral's rows of wq and wk in our order, the other way than the reader goes."""
    rows = []
    for head in np.split(array_RD, heads):
        rows += [head[0::2], head[1::2]]
    return np.concatenate(rows)


def expected_bytes(weights, piece, arrays):
    """What the library reads of a piece, in our order of rows."""
    array = arrays[weights.format.entry(piece).name]
    heads = {
        names.WQ: weights.config.num_attention_heads,
        names.WK: weights.config.num_key_value_heads,
    }.get(piece.parameter)
    if weights.format is names.MISTRAL and heads:
        array = native_as_halves(array, heads)
    return array.tobytes()


def judge(folder):
    """One line of error, or exactly what the library loads; quick, and with little memory."""
    tracemalloc.start()
    began, message, weights = time.process_time(), "", None
    try:
        weights = folders.open_weights(folder)
    except InputError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert time.process_time() - began < 2
    assert peak < 12 * MIB  # configs.py reads JSON into a buffer of 10 MB
    if weights is None:
        assert message.isprintable()
        assert len(message) < len(str(folder)) * 2 + 700, message
        return False
    with contextlib.closing(weights):
        read = tensors(folder)
        held = {name for file in weights.files for name in file.tensors}
        used = {name: array for name, array in read.items() if name in held}
        assert {weights.format.entry(piece).name for piece in weights.places} == held == set(used)
        for piece in weights.places:
            assert weights.read(piece)[0].tobytes() == expected_bytes(weights, piece, used)
    return True


def change_bytes(data, changes):
    data = bytearray(data)
    for what, at, byte in changes:
        at %= max(len(data), 1)
        if what == "flip" and data:
            data[at] ^= byte
        elif what == "insert":
            data[at:at] = bytes([byte])
        elif what == "delete":
            del data[at : at + byte % 9 + 1]
        elif what == "copy":
            data[at:at] = data[at // 2 : at // 2 + byte]
        elif what == "cut":
            del data[at:]
    return bytes(data)


def places_in(values):
    """(container, key) of everything in nested JSON."""
    pairs = values.items() if isinstance(values, dict) else enumerate(values)
    found = [(values, key) for key, _ in pairs]
    for container, key in list(found):
        if isinstance(container[key], dict | list):
            found += places_in(container[key])
    return found


def change_values(values, changes):
    for what, at, junk in changes:
        places = places_in(values)
        if not places:
            return
        container, key = places[at % len(places)]
        other, other_key = places[at // 7 % len(places)]
        if what == "set":
            container[key] = junk
        elif what == "drop":
            del container[key]
        elif what == "rename" and isinstance(container, dict):
            container[str(junk)[:300]] = container.pop(key)
        elif what == "swap" and not isinstance(other[other_key], dict | list):
            container[key] = other[other_key]


def mutate(folder, number, changes, by_value):
    """Change one of the folder's files: its JSON, or, in a file of tensors, the header."""
    paths = sorted(path for path in folder.iterdir() if path.name != "generation_config.json")
    path = paths[number % len(paths)]
    data = path.read_bytes()
    start, stop, before = 0, len(data), b""
    if path.suffix == ".safetensors":
        start, stop = 8, 8 + int.from_bytes(data[:8], "little")
        before = data[:8]
    text, after = data[start:stop], data[stop:]
    if by_value:
        values = json.loads(text)
        change_values(values, changes)
        text = json.dumps(values).replace('"NESTED"', "[" * 800 + "]" * 800)
        text = text.replace("LONG", "x" * 70_000).encode()
        before = before and len(text).to_bytes(8, "little")
    elif number % 2:  # the length too
        text, before = change_bytes(before + text, changes), b""
    else:
        text = change_bytes(text, changes)
        before = before and len(text).to_bytes(8, "little")
    path.write_bytes(before + text + after)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("by_value", [False, True], ids=["bytes", "values"])
def test_mutated_folders(valid, scratch, form, by_value):
    outcomes = set()

    @settings(max_examples=300)
    @given(
        st.integers(0, 99),
        st.lists(VALUES if by_value else BYTES, min_size=1, max_size=3),
    )
    def test(number, changes):
        folder = scratch / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(valid / form, folder)
        mutate(folder, number, changes, by_value)
        try:
            outcomes.add(judge(folder))
        except safetensors.SafetensorError:  # the library is stricter about minus nothing
            assert any(b"-0" in path.read_bytes() for path in folder.iterdir())

    test()
    assert outcomes == {True, False}


def test_a_plan_of_millions_costs_no_memory(copy):
    folder = copy("mistral")
    millions(folder)
    assert not judge(folder)


HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")


@settings(max_examples=9)
@given(
    st.sampled_from(["sharded", "mistral"]),
    st.sampled_from([(4, 2, 8), (2, 1, 16), (8, 4, 4)]),
    st.dictionaries(
        st.sampled_from(["rope_theta", "rms_norm_eps", "norm_eps", "max_position_embeddings", "x"]),
        st.integers(1, 2**31 - 1),
    ),
)
def test_whole_models_of_other_configs(valid, scratch, form, heads, changes):
    """Sizes that fit the same tensors, and numbers beside them: the parameters are the file's."""
    folder = scratch / "loaded"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(valid / form, folder)
    native = form == "mistral"
    keys = ("n_heads", "n_kv_heads", "head_dim") if native else HEADS
    edit_json(folder / CONFIGS[form], lambda v: v.update(changes | dict(zip(keys, heads))))
    if not native and "rope_theta" in changes:
        edit_json(folder / CONFIG_JSON, lambda v: v.pop("rope_parameters"))
    model, tokenizer = mixtral_jax.load_model(folder)
    assert tokenizer is None
    arrays, weights = tensors(folder), folders.open_weights(folder)
    flat = nnx.to_flat_state(nnx.state(model))
    got = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}
    assert sum(map(np.size, got.values())) == sum(map(np.size, arrays.values()))
    for piece in weights.places:
        array = got[piece.parameter]
        for place in (piece.layer, piece.expert):
            array = array if place is None else array[place]
        entry = weights.format.entry(piece)
        # In the file the model's dimension comes last, but where it is the output's.
        if array.ndim > 1:
            at = piece.letters.index("D")
            last = piece.parameter not in (names.WO, names.DOWN)
            array = np.moveaxis(array, at, -1 if last else 0)
        assert array.dtype == arrays[entry.name].dtype
        assert array.tobytes() == expected_bytes(weights, piece, arrays)
