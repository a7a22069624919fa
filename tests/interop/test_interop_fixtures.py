"""Checkpoints that transformers wrote, and what it computed with them; no PyTorch is needed here.

tests/data/make_parity.py made the files. Rounding alone separates the two: float32 on either side.
"""

import functools

import jax
import numpy as np
import pytest
from parity import FOLDER, compute, differences, parameters, recorded

import mixtral_jax
from mixtral_jax import sharding

TWINS = ("huggingface", "fused", "mistral")
FORMATS = ("orbax", "huggingface", "mistral")
MESHES = [(2, 1, 4, 1), (1, 2, 2, 2)]
CLOSE = 1e-4  # absolute, of logits around 1 to 5


@functools.cache
def load(form, mesh_sizes=(), dtype="float32"):
    mesh = sharding.make_mesh(*mesh_sizes)
    return mixtral_jax.load_model(FOLDER / form, mesh, dtype)[0]


def check(form, record, mesh_sizes=()):
    """Compute on a mesh and compare all that was recorded; returns the differences too."""
    batch, expected = recorded(record)
    computed = compute(load(form, mesh_sizes), sharding.make_mesh(*mesh_sizes), batch)
    found = differences(computed, expected, batch)
    assert max(found.values()) < CLOSE, found
    return computed, found


@pytest.mark.parametrize("form", TWINS)
def test_every_form_gives_what_transformers_computed(form):
    computed, _ = check(form, "three_layers")
    assert np.abs(computed.logits_BLV).max() > 1


def test_one_layer_gives_what_transformers_computed():
    """Its config.json is one of transformers 4, without head_dim and with rope_theta at the top."""
    computed, _ = check("single", "one_layer")
    # With one layer there is nothing to pool: the two losses are one.
    np.testing.assert_allclose(computed.load_balance_L[0], computed.load_balance_pooled, rtol=1e-6)


def test_layers_are_not_pooled():
    """Else the layers' losses would hide how transformers' own loss differs from their mean."""
    _, expected = recorded("three_layers")
    assert abs(expected.load_balance_L.mean() - expected.load_balance_pooled) > 0.01


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("form", ["huggingface", "mistral"])
def test_experts_on_a_mesh_give_what_transformers_computed(form, sizes):
    check(form, "three_layers", sizes)


def test_one_layer_on_a_mesh():
    check("single", "one_layer", (2, 1, 3, 1))


@pytest.mark.parametrize("sizes", [(), *MESHES], ids=str)
def test_the_model_called_outside_of_a_mesh_gives_the_same(sizes):
    """With NumPy arrays, and a number of rows that the mesh does not divide."""
    batch, expected = recorded("three_layers")
    logits_BLV = load("huggingface", sizes)(*(a[:3] for a in batch))
    assert logits_BLV.dtype == np.float32
    assert not jax.sharding.get_abstract_mesh().axis_names
    real = batch.real[:3]
    off = np.abs(np.asarray(logits_BLV)[real] - expected.logits_BLV[:3][real]).max()
    assert off < CLOSE


def test_padding_need_not_be_named_where_it_is_on_the_right():
    """The tokens alone, as in the README: what stands before a token decides its logits."""
    batch, expected = recorded("three_layers")
    logits_BLV = np.asarray(load("huggingface")(batch.tokens_BL[:2]))
    real = batch.real[:2]
    assert np.abs(logits_BLV[real] - expected.logits_BLV[:2][real]).max() < CLOSE


# ---- the same numbers, bit for bit -------------------------------------------------------------


def same(a, b):
    """Bit for bit the same parameters."""
    a, b = parameters(a), parameters(b)
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(
            *(np.atleast_1d(x).view(np.uint8) for x in (a[name], b[name])), name
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_every_form_holds_the_same_parameters(dtype):
    models = [load(form, (), dtype) for form in TWINS]
    assert parameters(models[0])["embedding_VD"].dtype == (dtype or "bfloat16")
    for model in models[1:]:
        same(models[0], model)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("form", TWINS)
def test_every_mesh_holds_the_same_parameters(form, sizes):
    same(load(form), load(form, sizes))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sizes", [(), MESHES[1]], ids=str)
def test_saving_and_loading_change_nothing(form, sizes, tmp_path):
    """From and to a mesh, in the type of the files, in several files where the form allows it."""
    model = load("huggingface", sizes, None)
    options = {"max_shard_size": 17_000} if form == "huggingface" else {}
    mixtral_jax.save_model(model, None, tmp_path / "saved", form, **options)
    again, tokenizer = mixtral_jax.load_model(tmp_path / "saved", sharding.make_mesh(*MESHES[0]))
    assert tokenizer is None
    same(model, again)


def test_weights_in_bfloat16_are_computed_with_in_float32_on_a_cpu():
    """The default: weights as they are stored, activations of the platform's type."""
    batch, expected = recorded("three_layers")
    logits_BLV = np.asarray(load("mistral", (), None)(*batch))
    assert np.abs(logits_BLV - expected.logits_BLV)[batch.real].max() < CLOSE


# ---- Mistral's pickles -------------------------------------------------------------------------


def native_tensors():
    """The tensors of the native fixture."""
    safetensors = pytest.importorskip("safetensors.torch")
    return safetensors.load_file(FOLDER / "mistral" / "consolidated.safetensors")


def eight_parts(torch, tensors):
    """Eight dictionaries with disjoint keys; a layer's experts lie stacked, w2 transposed."""
    experts, merged = {}, {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            merged[name.replace("feed_forward", "block_sparse_moe")] = tensor
            continue
        layer, _, number, matrix, _ = name.replace(".feed_forward", "").rsplit(".", 4)
        turned = tensor.T if matrix == "w2" else tensor
        experts.setdefault(f"{layer}.block_sparse_moe.{matrix}", {})[int(number)] = turned
    for name, parts in experts.items():
        merged[name] = torch.cat([parts[number] for number in range(8)])
    names = sorted(merged)
    return [{name: merged[name] for name in names[part::8]} for part in range(8)]


def test_one_pickle_holds_the_same_parameters(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save(native_tensors(), tmp_path / "consolidated.00.pth")
    params = (FOLDER / "mistral" / "params.json").read_bytes()
    (tmp_path / "params.json").write_bytes(params)
    same(load("mistral", (), None), mixtral_jax.load_model(tmp_path)[0])


@pytest.mark.parametrize("config", ["params.json", "config.json"])
def test_eight_pickles_hold_the_same_parameters(config, tmp_path):
    """As released beside Hugging Face's files of 8x7B, whose config.json describes them too."""
    torch = pytest.importorskip("torch")
    for number, part in enumerate(eight_parts(torch, native_tensors())):
        torch.save(part, tmp_path / f"consolidated.{number:02}.pt")
    folder = FOLDER / ("mistral" if config == "params.json" else "huggingface")
    (tmp_path / config).write_bytes((folder / config).read_bytes())
    loaded, _ = mixtral_jax.load_model(tmp_path)
    same(load("mistral", (), None), loaded)
    sharded, _ = mixtral_jax.load_model(tmp_path, sharding.make_mesh(*MESHES[1]))
    same(loaded, sharded)
