"""Models through files and back: every form, every mesh, bit for bit; what is read, how often."""

import json
import os
import threading

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from harness import place, plain, random_parameters
from whole import make_batch, make_config

import mixtral_jax
from mixtral_jax import sharding
from mixtral_jax.config import InputError
from mixtral_jax.interop import folders, layout, loading, models, names, saving
from mixtral_jax.interop.names import Piece
from mixtral_jax.model.mixtral import Mixtral, abstract_state
from mixtral_jax.model.unstacked import unstacked

FORMS = ("orbax", "huggingface", "mistral")
MESHES = [(1, 1, 1, 1), (2, 1, 4, 1), (1, 2, 2, 2)]
CONFIG = make_config()


def make_model(mesh, dtype="float32", **changes):
    config = make_config(param_dtype=dtype, **changes)
    graphdef, state = abstract_state(config)
    drawn = random_parameters(state, seed=3)
    drawn = jax.tree.map(lambda a: a.astype(jax.numpy.dtype(dtype)), drawn)
    return nnx.merge(graphdef, place(drawn, mesh))


@pytest.fixture(scope="module")
def one():
    """A model on one device."""
    return make_model(sharding.make_mesh())


@pytest.fixture(scope="module")
def saved(one, tmp_path_factory):
    """The same model in every form."""
    folder = tmp_path_factory.mktemp("saved")
    for form in FORMS:
        mixtral_jax.save_model(one, None, folder / form, form, max_shard_size=20_000)
    return folder


def arrays(model):
    flat = jax.tree.leaves_with_path(plain(nnx.state(model)))
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def assert_same_bits(model, other):
    expected, got = arrays(model), arrays(other)
    assert expected.keys() == got.keys()
    for name, array in expected.items():
        assert array.dtype == got[name].dtype
        np.testing.assert_array_equal(array.view(np.uint8), got[name].view(np.uint8), name)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_back_bit_for_bit_on_every_mesh(one, saved, form, sizes):
    mesh = sharding.make_mesh(*sizes)
    model, tokenizer = mixtral_jax.load_model(saved / form, mesh)
    assert tokenizer is None
    assert_same_bits(one, model)
    assert model.config == CONFIG
    wanted = sharding.param_shardings(nnx.state(model), mesh)
    for array, where in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(wanted)):
        assert array.sharding == where


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_model_that_is_spread_out_is_written_whole(saved, form, tmp_path):
    spread = make_model(sharding.make_mesh(fsdp=2, expert=2, tensor=2))
    with jax.set_mesh(sharding.make_mesh(2)):  # another mesh than the model's may be set
        mixtral_jax.save_model(spread, None, tmp_path / form, form, max_shard_size=20_000)
    for path in sorted((saved / form).iterdir()):
        assert (tmp_path / form / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_stays_bfloat16_unless_asked(form, tmp_path):
    model = make_model(sharding.make_mesh(), "bfloat16")
    mixtral_jax.save_model(model, None, tmp_path / form, form)
    again, _ = mixtral_jax.load_model(tmp_path / form)
    assert_same_bits(model, again)
    assert again.config.compute_dtype == ""
    wide, _ = mixtral_jax.load_model(tmp_path / form, dtype="float32")
    assert wide.config.param_dtype == wide.config.compute_dtype == "float32"
    for name, array in arrays(model).items():
        np.testing.assert_array_equal(array.astype(np.float32), arrays(wide)[name])
    with pytest.raises(InputError, match=r"dtype='float64' is not one of"):
        mixtral_jax.load_model(tmp_path / form, dtype="float64")


def test_tensors_of_several_types_keep_them(one, tmp_path):
    class Mixed(saving.ModelWeights):
        def dtype(self, piece):
            narrow = piece.parameter in names.EXPERTS
            return np.dtype(ml_dtypes.bfloat16 if narrow else np.float32)

    saving.write_huggingface(Mixed(one), {}, tmp_path / "mixed")
    weights = folders.open_weights(tmp_path / "mixed")
    assert weights.config.param_dtype == "float32"
    saving.write_mistral(weights, {}, tmp_path / "mistral")
    back = folders.open_weights(tmp_path / "mistral")
    for piece in names.pieces(CONFIG):
        assert back.dtype(piece) == weights.dtype(piece)


# ---- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [*MESHES, (8, 1, 1, 1)], ids=str)
def test_each_byte_is_read_once_however_many_devices_want_it(saved, sizes):
    weights = folders.open_weights(saved / "huggingface")
    seen = []
    loading.load(weights, CONFIG, sharding.make_mesh(*sizes), seen.append)
    assert sum(seen) == weights.nbytes == 4 * CONFIG.num_parameters


def test_a_host_reads_only_what_its_devices_own(saved, monkeypatch):
    """Two hosts, each with half of the experts, and JAX telling each which devices are its own."""
    mesh = sharding.make_mesh(expert=4, tensor=2)
    weights = folders.open_weights(saved / "huggingface")
    flat = nnx.to_flat_state(abstract_state(CONFIG)[1])
    leaves = {".".join(map(str, path)): leaf for path, leaf in flat}
    read = {host: dict.fromkeys(names.EXPERTS, 0) for host in range(2)}
    for host, parameters in read.items():
        own = set(jax.devices()[4 * host : 4 * host + 4])

        def mine(self, shape, own=own):
            return {d: i for d, i in self.devices_indices_map(shape).items() if d in own}

        monkeypatch.setattr(jax.sharding.NamedSharding, "addressable_devices_indices_map", mine)
        for parameter in parameters:
            leaf = leaves[parameter]
            where = sharding.param_shardings(leaf, mesh).get_value()
            for share in loading.shares_of(parameter, leaf.shape, where):
                assert share.devices[0] in own
                for piece in weights.places:
                    if piece.parameter == parameter and share.place_of(piece) is not None:
                        array, _ = weights.read(piece, slices=share.rest(piece.letters))
                        parameters[parameter] += array.nbytes
    half = 2 * CONFIG.num_hidden_layers * CONFIG.num_local_experts
    half *= CONFIG.hidden_size * CONFIG.intermediate_size
    assert read[0] == read[1] == dict.fromkeys(names.EXPERTS, half)


def test_few_pieces_are_under_way_at_a_time(saved, monkeypatch):
    lock, held, most = threading.Lock(), set(), []
    weights = folders.open_weights(saved / "mistral")
    read, release = type(weights).read, type(weights).release

    def counted(self, piece, *arguments, **keywords):
        with lock:
            held.add(piece)
            most.append(len(held))
        return read(self, piece, *arguments, **keywords)

    def given_back(self, piece):
        with lock:
            held.remove(piece)
        release(self, piece)

    monkeypatch.setattr(type(weights), "read", counted)
    monkeypatch.setattr(type(weights), "release", given_back)
    loading.load(weights, CONFIG, sharding.make_mesh(expert=2), lambda count: None)
    assert not held
    assert max(most) <= loading.WORKERS


def test_an_error_while_loading_is_raised(saved, monkeypatch):
    weights = folders.open_weights(saved / "mistral")

    def fail(self, piece):
        raise InputError("the disk is gone")

    monkeypatch.setattr(type(weights), "release", fail)
    with pytest.raises(InputError, match="the disk is gone"):
        loading.load(weights, CONFIG, sharding.make_mesh(), lambda count: None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_accelerators_get_the_same_as_cpus(one, saved, sizes, dtype, monkeypatch):
    monkeypatch.setattr(loading, "make_buffer", loading.DeviceBuffer)
    model, _ = mixtral_jax.load_model(saved / "huggingface", sharding.make_mesh(*sizes), dtype)
    monkeypatch.undo()
    assert_same_bits(mixtral_jax.load_model(saved / "huggingface", dtype=dtype)[0], model)
    if dtype == "float32":
        assert_same_bits(one, model)


def test_a_loaded_model_can_be_trained_on_where_it_lies(saved):
    """Its memory may be NumPy's: donating it must neither fail nor change what others see."""
    model, _ = mixtral_jax.load_model(saved / "huggingface", sharding.make_mesh(data=2))
    again, _ = mixtral_jax.load_model(saved / "huggingface", sharding.make_mesh(data=2))
    state = nnx.state(model)
    stepped = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)(state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    for new, old in zip(jax.tree.leaves(plain(stepped)), jax.tree.leaves(plain(nnx.state(again)))):
        np.testing.assert_array_equal(new, old + 1)


# ---- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", names.FORMATS, ids=lambda form: form.title)
def test_a_format_has_every_parameter_in_all_its_dimensions(form):
    flat = nnx.to_flat_state(abstract_state(CONFIG)[1])
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in flat}
    sizes = names.sizes(CONFIG)
    assert set(form.entries) == set(shapes) - ({names.ROUTER} if form.dense else set())
    for parameter, entry in form.entries.items():
        letters = names.letters_of(parameter)
        layers = CONFIG.num_hidden_layers if parameter.startswith("layers.") else 1
        assert layers * np.prod([sizes[a] for a in letters]) == np.prod(shapes[parameter])
        held = layout.letters_of(entry).replace("g", "")
        assert set(held) | {"E"} == set(letters) | {"E"}


@pytest.mark.parametrize("form", [names.HUGGING_FACE, names.MISTRAL], ids=lambda form: form.title)
def test_a_tensor_split_into_a_piece_and_put_together_again_is_itself(form):
    sizes, random = names.sizes(CONFIG), np.random.default_rng(0)
    for entry in form.entries.values():
        tensor = random.normal(size=layout.tensor_shape(entry, sizes))
        piece, letters = layout.from_tensor(tensor, entry, sizes, None, None)
        turned = piece.transpose(range(piece.ndim)[::-1])
        again = layout.to_tensor(turned, letters[::-1], entry, sizes)
        np.testing.assert_array_equal(again, tensor)


def test_mistral_turns_neighbours_where_we_turn_halves():
    sizes = names.sizes(CONFIG)
    entry = names.MISTRAL.entries[names.WK]
    tensor = np.arange(np.prod(layout.tensor_shape(entry, sizes)))
    tensor = tensor.reshape(layout.tensor_shape(entry, sizes))
    piece, letters = layout.from_tensor(tensor, entry, sizes, None, None)
    assert letters == "KHD"
    half = sizes["H"] // 2
    for head in range(sizes["K"]):
        rows = tensor[head * sizes["H"] : (head + 1) * sizes["H"]]
        for j in range(half):
            np.testing.assert_array_equal(piece[head, j], rows[2 * j])
            np.testing.assert_array_equal(piece[head, half + j], rows[2 * j + 1])


def test_a_piece_is_named_as_people_say_it():
    assert str(Piece(names.GATE, 2, 3)) == "layers.moe.gate_EDF, layer 2, expert 3"
    assert str(Piece(names.NORM)) == "norm.weight"


# ---- calling a model ---------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_loaded_model_takes_any_batch(one, saved, sizes):
    mesh = sharding.make_mesh(*sizes)
    model, _ = mixtral_jax.load_model(saved / "mistral", mesh)
    tokens, _, positions, segments = make_batch(seed=1, rows=3)
    expected = np.asarray(one(tokens, positions, segments))
    real = segments > 0
    got = model(tokens, positions, segments)
    assert got.shape == (3, tokens.shape[1], CONFIG.vocab_size)
    assert got.dtype == np.float32
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-5)
    np.testing.assert_allclose(
        np.asarray(model(tokens.tolist())), np.asarray(one(tokens)), atol=2e-5
    )
    with jax.set_mesh(mesh):
        inside = jax.jit(lambda m, t: m(t))(model, tokens)
    np.testing.assert_allclose(np.asarray(inside), np.asarray(one(tokens)), atol=2e-5)


def test_a_model_traced_without_a_mesh_says_what_to_do(one):
    with pytest.raises(InputError, match=r"no mesh is set: run inside `with jax.set_mesh"):
        jax.jit(lambda m, t: m(t))(one, np.zeros((1, 3), np.int32))


# ---- writing -----------------------------------------------------------------------------------


def test_shards_are_filled_in_order_and_named_in_the_index(saved):
    index = saved / "huggingface" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    files = sorted((saved / "huggingface").glob("*.safetensors"))
    assert len(files) > 3
    assert {path.name for path in files} == set(listed["weight_map"].values())
    assert listed["metadata"]["total_size"] == 4 * CONFIG.num_parameters
    assert all(path.stat().st_size < 20_000 + 10_000 for path in files)


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_holds_something_is_left_alone(one, form, tmp_path):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(InputError, match="exists already: name a new folder"):
        mixtral_jax.save_model(one, None, tmp_path, form)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(InputError, match="exists already"):
        mixtral_jax.save_model(one, None, tmp_path / "mine", form)
    (tmp_path / "empty").mkdir()
    mixtral_jax.save_model(one, None, tmp_path / "empty", form)
    assert any((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("form", FORMS[1:])
def test_a_write_that_fails_leaves_nothing(one, form, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "_write_json", fail)
    with pytest.raises(InputError, match="cannot be written: No space left on device"):
        mixtral_jax.save_model(one, None, tmp_path / "target", form)
    assert not os.listdir(tmp_path)


def test_what_no_form_holds_is_refused(one, tmp_path):
    apart = unstacked(one)
    for form in FORMS:
        with pytest.raises(ValueError, match="layers are in a list: save it before"):
            mixtral_jax.save_model(apart, None, tmp_path / "x", form)
    for size in (0, -1):
        with pytest.raises(InputError, match=f"max_shard_size={size} must be at least 1"):
            mixtral_jax.save_model(one, None, tmp_path / "x", "huggingface", size)
    assert not os.listdir(tmp_path)


def test_an_unknown_form_is_refused(one, tmp_path):
    with pytest.raises(InputError, match=r"format='gguf' is not one of 'orbax', 'huggingface'"):
        mixtral_jax.save_model(one, None, tmp_path / "x", "gguf")


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_read(saved, monkeypatch):
    monkeypatch.setattr(models.Checkpoint, "load", lambda *_: pytest.fail("read"))
    with pytest.raises(InputError, match=r"mesh.expert=8 does not divide model.num_local_experts"):
        mixtral_jax.load_model(saved / "mistral", sharding.make_mesh(expert=8))


def test_a_run_with_a_capacity_is_sampled_without(tmp_path):
    model = make_model(sharding.make_mesh(), capacity_factor=1.0, receive_factor=2, remat="full")
    mixtral_jax.save_model(model, None, tmp_path / "own", "orbax")
    again, _ = mixtral_jax.load_model(tmp_path / "own")
    assert isinstance(again, Mixtral)
    assert again.config == model.config.dropless()
