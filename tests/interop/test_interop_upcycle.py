"""convert --upcycle: a Mixtral of copies of a dense model is that model, until it is trained."""

import dataclasses

import jax
import numpy as np
import pytest
from checkpoint_files import (
    CONFIG_JSON,
    PARAMS_JSON,
    Drawn,
    call_it_dense,
    edit_json,
    tensors,
    write,
    write_dense,
)
from flax import nnx
from tiny import MODEL, host, make_batch, make_config

import mixtral_jax
from mixtral_jax import sharding
from mixtral_jax.interop import folders, names, own
from mixtral_jax.training import step as steps
from mixtral_jax.training.placement import Placement

FORMS = ("orbax", "huggingface", "mistral")
# With one expert the router changes nothing: this is the dense model that the files below hold.
ONE = dataclasses.replace(MODEL, num_local_experts=1, num_experts_per_tok=1)
GATES = "layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture
def upcycled(main, tmp_path):
    """upcycled(source, to, *flags): the target."""

    def run(source, to, *flags):
        target = tmp_path / f"{to}-{len(list(tmp_path.iterdir()))}"
        code, out, err = main(source, target, to, "--upcycle", *flags)
        assert (code, out.count("\n"), err) == (0, 1, "")
        return target

    return run


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The dense model in both released forms, and as a Mixtral with one expert."""
    folder, weights = tmp_path_factory.mktemp("dense"), Drawn(ONE)
    for form in FORMS[1:]:
        write_dense(folder / form, form, weights)
    write(folder / "sparse", "single", weights)
    return folder


@pytest.fixture(scope="module")
def expected(dense):
    """Logits of the dense model."""
    model, _ = mixtral_jax.load_model(dense / "sparse")
    batch = make_batch(3)
    return np.asarray(model(batch.tokens_BL, batch.positions_BL, batch.segments_BL))


def logits(folder, *mesh):
    model, _ = mixtral_jax.load_model(folder, sharding.make_mesh(*mesh))
    batch = make_batch(3)
    return np.asarray(model(batch.tokens_BL, batch.positions_BL, batch.segments_BL))


@pytest.mark.parametrize(
    ("source", "to", "flags", "mesh"),
    [
        ("huggingface", "orbax", ("3",), (1, 1, 3, 1)),
        ("huggingface", "huggingface", ("8", "--experts-per-token=3", "--seed=5"), (1, 2, 4, 1)),
        ("mistral", "mistral", ("5", "--experts-per-token=5"), ()),
        ("mistral", "orbax", ("1", "--experts-per-token=1"), ()),
    ],
)
def test_the_first_forward_pass_is_the_dense_models(
    dense, expected, upcycled, source, to, flags, mesh
):
    target = upcycled(dense / source, to, *flags)
    np.testing.assert_allclose(logits(target, *mesh), expected, atol=2e-5)
    assert np.abs(expected).max() > 0.1


@pytest.mark.parametrize("source", FORMS[1:])
def test_every_expert_is_a_copy(dense, upcycled, source):
    target = upcycled(dense / source, "huggingface", "3")
    made, one = tensors(target), tensors(dense / "sparse")
    assert len(made) == len(one) + 2 * 2 * 3
    for name, array in made.items():
        if "gate.weight" not in name:
            for expert in range(3):
                name = name.replace(f"experts.{expert}.", "experts.0.")
            assert array.tobytes() == one[name].tobytes()
    weights = folders.open_weights(target)
    assert not weights.format.dense
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2}
    wanted = dataclasses.replace(ONE, **sizes)
    if source == "mistral":  # params.json says nothing of these
        wanted = dataclasses.replace(wanted, initializer_range=0.02, max_position_embeddings=64)
    assert weights.config == wanted


def test_the_seed_makes_the_router(dense, upcycled):
    runs = [("3",), ("3",), ("3", "--seed=0"), ("3", "--seed=1")]
    routers = []
    for flags in runs:
        made = tensors(upcycled(dense / "huggingface", "huggingface", *flags))
        routers.append([made[f"model.{GATES.format(layer)}"] for layer in range(2)])
    for layer in range(2):
        first, again, same, other = (router[layer] for router in routers)
        assert first.shape == (3, ONE.hidden_size)
        assert first.tobytes() == again.tobytes() == same.tobytes()
        assert not np.array_equal(first, other)
        assert 0.15 < first.std() < 0.25  # initializer_range is 0.2
    assert not np.array_equal(routers[0][0], routers[0][1])


@pytest.mark.parametrize("to", FORMS)
def test_a_type_may_change_on_the_way(dense, upcycled, main, to):
    target = upcycled(dense / "mistral", to, "3", "--dtype=bf16")
    folder = target.with_name("native")
    assert main(target, folder, "mistral")[0] == 0
    exact = tensors(upcycled(dense / "mistral", "mistral", "3"))
    for name, array in tensors(folder).items():
        assert array.tobytes() == exact[name].astype(array.dtype).tobytes()
        assert array.dtype.name == "bfloat16"


def test_the_router_takes_the_type_of_the_head(tmp_path, upcycled):
    narrow = write_dense(tmp_path / "n", "mistral", Drawn(ONE, narrow=lambda piece: True))
    assert {a.dtype.name for a in tensors(upcycled(narrow, "mistral", "3")).values()} == {
        "bfloat16"
    }


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize(
    ("source", "flags", "words"),
    [
        ("sparse", ["--upcycle", "4"], "is for a dense model, and this one has experts already"),
        (
            "mistral",
            ["--upcycle", "2", "--experts-per-token", "3"],
            "num_experts_per_tok=3 is more",
        ),
        ("mistral", ["--upcycle", "1"], "--upcycle 1 --experts-per-token 2: "),
        ("mistral", ["--upcycle", "0"], "--upcycle 0 --experts-per-token 2: "),
        ("mistral", ["--upcycle", "-1"], "--upcycle -1 "),
        ("mistral", ["--upcycle", "1000000000"], "--upcycle 1000000000 "),
        ("mistral", ["--upcycle", "9" * 99], "--upcycle 999"),
        ("mistral", ["--upcycle", "3", "--experts-per-token", "0"], "--experts-per-token 0: "),
        ("mistral", ["--upcycle", "3", "--seed", "-1"], "--seed=-1 must be at least 0"),
        ("mistral", [], "holds a dense model: make a sparse one of it with"),
    ],
)
def test_what_cannot_be_upcycled(dense, main, tmp_path, source, flags, words, to):
    code, out, err = main(dense / source, tmp_path / "target", to, *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert words in err
    assert not list(tmp_path.iterdir())


def test_this_projects_own_checkpoints_have_experts(dense, main, tmp_path):
    assert main(dense / "sparse", tmp_path / "own", "orbax")[0] == 0
    code, out, err = main(tmp_path / "own", tmp_path / "target", "orbax", "--upcycle", "4")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"--upcycle is for a dense model: {tmp_path / 'own'} has experts already" in err


def test_a_dense_config_with_a_router_in_the_files(dense, main, tmp_path):
    """A Mixtral whose config says Mistral is neither."""
    for form, path in (("single", CONFIG_JSON), ("mistral", PARAMS_JSON)):
        folder = write(tmp_path / form, form, Drawn(ONE))
        edit_json(folder / path, call_it_dense)
        code, _, err = main(folder, tmp_path / "target", "orbax", "--upcycle", "4")
        assert (code, err.count("\n")) == (2, 1)
        assert f"{folder} lacks tensor" in err


def test_training_parts_the_experts_and_lowers_the_loss(dense, upcycled):
    target = upcycled(dense / "huggingface", "orbax", "4")
    sizes = own.load_extras(own.find(target)).config.model
    config = make_config(model=vars(sizes), mesh={"expert": 2})
    mesh = sharding.make_mesh(expert=2)
    model, _ = mixtral_jax.load_model(target, mesh)
    with jax.set_mesh(mesh):
        state = steps.state_from(nnx.state(model), config, mesh)
        step = jax.jit(steps.make_train_step(config))
        batch, losses = Placement(config, mesh)(make_batch(8)), []
        before = experts(state.params)
        for _ in range(5):
            state, metrics = step(state, batch)
            losses.append(float(metrics.losses.cross_entropy))
            assert int(metrics.skipped) == 0
        after = experts(state.params)
    assert losses[0] == losses[1]  # the rate of the first step is 0
    assert losses[1:] == sorted(losses[1:], reverse=True)
    assert losses[4] < losses[1]
    for name, array_LE in before.items():
        assert (array_LE == array_LE[:, :1]).all()
        for one in range(4):
            for other in range(one):
                for layer in range(2):
                    gap = np.abs(after[name][layer, one] - after[name][layer, other]).max()
                    assert gap > 1e-4, (name, layer, one, other)


def experts(params):
    flat = nnx.to_flat_state(params)
    found = {".".join(map(str, path)): leaf[...] for path, leaf in flat}
    return host({name: found[name] for name in names.EXPERTS})
