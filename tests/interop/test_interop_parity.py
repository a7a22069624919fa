"""Logits, greedy answers, losses and gradients against transformers, where it is installed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from parity import FOLDER, Computed, compute, differences, make_batch, parameters

import mixtral_jax
from mixtral_jax import sharding
from mixtral_jax.generation.engine import Engine
from mixtral_jax.generation.request import Options, Request
from mixtral_jax.interop import layout, names
from mixtral_jax.training import losses as terms

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
torch.set_num_threads(1)  # a second one waits busily, on models as small as these

CLOSE = 1e-4  # absolute, of logits around 1 to 5
LOAD_BALANCE_WEIGHT = 0.3
NEW = 64
COMMON = {"rms_norm_eps": 1e-5, "max_position_embeddings": 96, "router_aux_loss_coef": 0.3}
SHAPES = {
    "one kv head, k=1": {
        **{"vocab_size": 46, "hidden_size": 20, "intermediate_size": 14, "num_hidden_layers": 2},
        **{"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8},
        **{"num_local_experts": 4, "num_experts_per_tok": 1},
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
    },
    "two kv heads, k=2": {
        **{"vocab_size": 58, "hidden_size": 28, "intermediate_size": 18, "num_hidden_layers": 3},
        **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10},
        **{"num_local_experts": 8, "num_experts_per_tok": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "every head its own kv, k=3": {
        **{"vocab_size": 38, "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": None},
        **{"num_local_experts": 4, "num_experts_per_tok": 3},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}
SEEDS = dict(zip(SHAPES, (5, 2, 2)))  # whose models say many different things
by_shape = pytest.mark.parametrize("shape", SHAPES)
ON_A_MESH = ("two kv heads, k=2", (1, 1, 4, 2))
by_shape_and_mesh = pytest.mark.parametrize(
    ("shape", "sizes"), [*((shape, ()) for shape in SHAPES), ON_A_MESH], ids=str
)


@functools.cache
def theirs(shape):
    """A model of transformers whose weights matter everywhere, norms included."""
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON, **SHAPES[shape]))
    model.set_experts_implementation("eager")  # the other wants rows of a multiple of 16 bytes
    generator = torch.Generator().manual_seed(SEEDS[shape])
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        value = 1 + 0.3 * noise if "norm" in name else noise * weight.shape[-1] ** -0.5
        weight.data = 3 * value if name.endswith("gate.weight") else value
    return model.eval()


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """By shape, the same model after transformers has written it and we have read it."""

    @functools.cache
    def load(shape, mesh_sizes=()):
        folder = tmp_path_factory.mktemp("model")
        theirs(shape).save_pretrained(folder, max_shard_size="20KB")
        return mixtral_jax.load_model(folder, sharding.make_mesh(*mesh_sizes))[0]

    return load


def batch_for(shape, rows=4, seed=0):
    return make_batch(rows, 12, SHAPES[shape]["vocab_size"], seed)


def run(model, batch, **more):
    """transformers' forward pass."""
    tokens, positions, mask = (torch.tensor(a).long() for a in batch)
    more["output_router_logits"] = True
    return model(input_ids=tokens, position_ids=positions, attention_mask=mask, **more)


def balance_losses(shape, out, mask_BL):
    """Each layer's load-balancing loss, by transformers' own function."""
    sizes = SHAPES[shape]
    experts, k = sizes["num_local_experts"], sizes["num_experts_per_tok"]
    mask = None if mask_BL is None else torch.tensor(mask_BL)
    function = mixtral.load_balancing_loss_func
    return torch.stack([function((layer,), experts, k, mask) for layer in out.router_logits])


def computed_by_theirs(shape, batch):
    with torch.no_grad():
        out = run(theirs(shape), batch)
        router = torch.stack(out.router_logits).reshape(
            -1, *batch.mask_BL.shape, SHAPES[shape]["num_local_experts"]
        )
        each = balance_losses(shape, out, batch.mask_BL)
    return Computed(*(np.asarray(a) for a in (out.logits, router, each, out.aux_loss)))


# ---- logits ------------------------------------------------------------------------------------


@by_shape
def test_a_ragged_batch_gives_their_logits_and_losses(shape, ours):
    batch = batch_for(shape)
    computed = compute(ours(shape), sharding.make_mesh(), batch)
    found = differences(computed, computed_by_theirs(shape, batch), batch)
    assert max(found.values()) < CLOSE, found


@by_shape
def test_rows_of_one_length_give_their_logits_and_losses(shape, ours):
    """Tokens alone on both sides, and no mask in their load-balancing loss."""
    batch = batch_for(shape, seed=3)
    batch = batch._replace(
        mask_BL=np.ones_like(batch.mask_BL),
        positions_BL=np.zeros_like(batch.positions_BL) + np.arange(12, dtype=np.int32),
    )
    with torch.no_grad():
        tokens = torch.tensor(batch.tokens_BL).long()
        out = theirs(shape)(input_ids=tokens, output_router_logits=True)
    logits_BLV = np.asarray(ours(shape)(batch.tokens_BL))
    assert out.logits.abs().max() > 1
    assert np.abs(logits_BLV - out.logits.numpy()).max() < CLOSE
    computed = compute(ours(shape), sharding.make_mesh(), batch)
    np.testing.assert_allclose(computed.load_balance_pooled, out.aux_loss.item(), rtol=1e-5)
    each = balance_losses(shape, out, None).numpy()
    np.testing.assert_allclose(computed.load_balance_L, each, rtol=1e-5)


def test_experts_on_a_mesh_give_their_logits(ours):
    shape, sizes = ON_A_MESH
    batch = batch_for(shape)
    computed = compute(ours(shape, sizes), sharding.make_mesh(*sizes), batch)
    found = differences(computed, computed_by_theirs(shape, batch), batch)
    assert max(found.values()) < CLOSE, found


# ---- greedy answers ----------------------------------------------------------------------------


def their_answers(model, prompts):
    """Greedy answers to left-padded prompts, and the least lead that a chosen token had."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    made = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.logits).topk(2).values
    return made.sequences[:, longest:].tolist(), (best[..., 0] - best[..., 1]).min().item()


@by_shape_and_mesh
def test_greedy_answers_are_theirs(shape, sizes, ours):
    """64 tokens after prompts of three lengths, from the cache on either side."""
    prompts = [(1, 30, 7, 7, 22), (1,), (1, 9, 8, 12, 30, 4, 19, 37, 2, 3, 11, 25, 6)]
    expected, lead = their_answers(theirs(shape), prompts)
    assert lead > 1e-4, f"{lead}: rounding may decide, take other prompts"
    assert all(len(answer) == NEW and len(set(answer)) > 3 for answer in expected)
    engine = Engine(ours(shape, sizes))
    options = Options(NEW, temperature=0.0)
    made = engine.generate([Request(prompt, options) for prompt in prompts])
    assert [answers[0].tokens for answers in made] == expected


# ---- gradients ---------------------------------------------------------------------------------


def our_loss(graphdef, params, batch, targets_BL, has_target_BL):
    out = nnx.merge(graphdef, params).forward(*batch)
    sums = terms.token_sums(out.logits_BLV, targets_BL, has_target_BL)
    weights = {"load_balance_weight": LOAD_BALANCE_WEIGHT, "router_z_weight": 0.0, "z_weight": 0.0}
    parts = terms.losses(sums, out.statistics, sums.tokens, **weights)
    return parts.total, parts


def our_gradients(model, mesh, batch):
    """(losses, gradients by parameter) of predicting each next real token."""
    graphdef, params = nnx.split(model)
    targets = np.roll(batch.tokens_BL, -1, axis=1)
    has_target = batch.real & np.roll(batch.real, -1, axis=1)
    has_target[:, -1] = False
    inputs = jax.device_put((tuple(batch), targets, has_target), sharding.on(mesh, "batch"))
    with jax.set_mesh(mesh):
        call = jax.jit(jax.grad(functools.partial(our_loss, graphdef), has_aux=True))
        gradients, parts = call(params, *inputs)
    return parts, parameters(nnx.merge(graphdef, gradients))


def their_gradients(shape, batch):
    """The same from transformers; layers' load-balancing losses are averaged, not pooled.

    Given a label for the first real token, it would have the padding before it predict that.
    """
    model = theirs(shape)
    model.zero_grad()
    labels = np.where(batch.positions_BL * batch.mask_BL > 0, batch.tokens_BL, -100)
    out = run(model, batch, labels=torch.tensor(labels).long())
    cross_entropy = out.loss - COMMON["router_aux_loss_coef"] * out.aux_loss
    balance = balance_losses(shape, out, batch.mask_BL).mean()
    (cross_entropy + LOAD_BALANCE_WEIGHT * balance).backward()
    gradients = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
    return (cross_entropy.item(), balance.item(), out), gradients


def compare_gradients(config, ours, theirs):
    """For each matrix and vector of the model, |ours - theirs| / |theirs|, by piece."""
    sizes, used, found = names.sizes(config), set(), {}
    for piece in names.pieces(config):
        entry = names.HUGGING_FACE_FUSED.entry(piece)
        used.add(entry.name)
        expected, letters = layout.from_tensor(theirs[entry.name], entry, sizes, piece.expert, None)
        expected = expected.transpose(layout.transposition(letters, piece.letters))
        place = tuple(n for n in (piece.layer, piece.expert) if n is not None)
        off = np.linalg.norm(ours[piece.parameter][place] - expected)
        size = np.linalg.norm(expected)
        assert size > 0 or off == 0, f"{piece} should have no gradient"
        found[str(piece)] = off / size if size else 0.0
    assert used == set(theirs), "a parameter was not compared"
    return found


@by_shape_and_mesh
def test_gradients_of_every_parameter_are_theirs(shape, sizes, ours):
    batch, model = batch_for(shape), ours(shape, sizes)
    parts, gradients = our_gradients(model, sharding.make_mesh(*sizes), batch)
    (cross_entropy, balance, out), expected = their_gradients(shape, batch)
    np.testing.assert_allclose(parts.cross_entropy, cross_entropy, rtol=1e-5)
    np.testing.assert_allclose(parts.load_balance, balance, rtol=1e-5)
    if SHAPES[shape]["num_hidden_layers"] == 1:  # their loss as it is: nothing is pooled
        np.testing.assert_allclose(parts.total, out.loss.item(), rtol=1e-5)
    found = compare_gradients(model.config, gradients, expected)
    worst = max(found, key=found.get)
    assert found[worst] < 1e-4, f"{worst}: {found[worst]}"


# ---- and back ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@by_shape
def test_transformers_reads_what_we_write(shape, dtype, ours, tmp_path):
    """No key missing, none left over, the same weights and the same logits."""
    folder, model = tmp_path / "saved", ours(shape)
    if dtype == "bfloat16":
        theirs(shape).save_pretrained(tmp_path / "first")
        model, _ = mixtral_jax.load_model(tmp_path / "first", dtype="bfloat16")
    mixtral_jax.save_model(model, None, folder, "huggingface", max_shard_size=5_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    again, report = transformers.MixtralForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto", experts_implementation="eager"
    )
    assert not any(report.values()), report
    assert again.dtype == getattr(torch, dtype)
    expected = theirs(shape).state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, expected[name].to(weight.dtype)), name
    for key, value in theirs(shape).config.to_dict().items():
        if key in SHAPES[shape] and value is not None:
            assert getattr(again.config, key) == value, key
    assert again.config.router_aux_loss_coef == COMMON["router_aux_loss_coef"]
    assert again.generation_config.eos_token_id is None
    if dtype == "float32":
        batch = batch_for(shape)
        with torch.no_grad():
            assert torch.equal(run(again, batch).logits, run(theirs(shape), batch).logits)


def test_transformers_reads_what_we_write_from_a_mesh(ours, tmp_path):
    """And from another form: Mistral's files, loaded with experts on several devices."""
    mesh = sharding.make_mesh(1, 2, 2, 2)
    model, _ = mixtral_jax.load_model(FOLDER / "mistral", mesh)
    mixtral_jax.save_model(model, None, tmp_path / "saved", "huggingface")
    read = functools.partial(
        transformers.MixtralForCausalLM.from_pretrained, dtype="auto", output_loading_info=True
    )
    (again, report), (first, _) = read(tmp_path / "saved"), read(FOLDER / "huggingface")
    assert not any(report.values()), report
    for name, weight in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    assert dataclasses.asdict(model.config)["param_dtype"] == "bfloat16"
