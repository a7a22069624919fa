"""This project's own checkpoints with another JSON than was written: one line."""

import json

import pytest
from checkpoint_faults import message_of

import mixtral_jax
from mixtral_jax.interop import own


@pytest.fixture(scope="module")
def written(valid, tmp_path_factory):
    """The JSON of a checkpoint, as a path and as what it holds."""
    folder = tmp_path_factory.mktemp("own") / "own"
    mixtral_jax.save_model(mixtral_jax.load_model(valid / "mistral")[0], None, folder, "orbax")
    path = folder / own.RUN / "metadata"
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("data", [b"[1]", b"5", b"null", b"", b"{}", b"[" * 9999, b"{\xff}"])
def test_what_is_no_json_object(written, data):
    path, _ = written
    path.write_bytes(data)
    message = message_of(path.parents[1])
    assert f"checkpoint {path.parents[1]} is " in message
    assert own.RUN in message


JUNK = [
    5,
    None,
    "",
    "x",
    "AAAA",
    [],
    [["a"]],
    [[1], [2, 3]],
    [2**70],
    {},
    {"model": 5},
    {"params": []},
]
FINE = {"data_state": [[]], "tokenizer": [None]}


@pytest.mark.parametrize("junk", JUNK, ids=repr)
@pytest.mark.parametrize("key", ["config", "data_state", "tokenizer", "checksums"])
def test_other_values(written, key, junk):
    path, run = written
    path.write_text(json.dumps(run | {key: junk}))
    if junk in FINE.get(key, []):
        mixtral_jax.load_model(path.parents[1])
    else:
        assert message_of(path.parents[1])


@pytest.mark.parametrize("key", ["config", "data_state", "tokenizer", "checksums"])
def test_a_missing_key(written, key):
    path, run = written
    path.write_text(json.dumps({k: v for k, v in run.items() if k != key}))
    expected = f"checkpoint {path.parents[1]} is not of this project: run has no {key}"
    assert message_of(path.parents[1]) == expected


@pytest.mark.parametrize("part", ["file", "folder"])
def test_a_number_beside_weights_is_no_checkpoint(copy, part):
    folder = copy("single")
    if part == "file":
        (folder / "2024").touch()
    else:
        (folder / "2024" / "notes").mkdir(parents=True)
    mixtral_jax.load_model(folder)


@pytest.mark.parametrize("item", [own.RUN, own.PARAMS])
def test_a_part_of_a_checkpoint_is_a_damaged_one(tmp_path, item):
    step = tmp_path / own.FOLDER / "7"
    (step / item).mkdir(parents=True)
    (tmp_path / own.FOLDER / "9").mkdir()
    assert f"checkpoint {step} is damaged: run" in message_of(tmp_path)
