import ast
import dataclasses
import inspect

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtral_jax import config as config_module
from mixtral_jax import config_io
from mixtral_jax.config import (
    PRESETS,
    Config,
    DataConfig,
    InputError,
    MeshConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    TrainingConfig,
    check_mesh,
)

# Every key with a value that is not its default.
EVERY_KEY = {
    "model": {
        "preset": "mixtral_8x22b",
        "checkpoint": "weights/of a model",
        "vocab_size": 606,
        "hidden_size": 96,
        "intermediate_size": 34,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "num_local_experts": 12,
        "num_experts_per_tok": 3,
        "rope_theta": 12345.5,
        "rms_norm_eps": 3e-6,
        "max_position_embeddings": 77,
        "initializer_range": 0.03,
        "compute_dtype": "bfloat16",
        "param_dtype": "bfloat16",
        "remat": "matmuls",
        "scan_layers": False,
        "exchange": "padded",
        "receive_factor": 1.5,
        "attention": "xla",
        "grouped_matmul": "ragged_dot",
        "capacity_factor": 1.25,
        "load_balance_weight": 0.5,
        "router_z_weight": 0.001,
    },
    "mesh": {"data": 3, "fsdp": 2, "expert": 4, "tensor": 2},
    "training": {
        "steps": 7,
        "batch_size": 48,
        "sequence_length": 33,
        "gradient_accumulation": 2,
        "learning_rate": 1e-3,
        "schedule": "linear",
        "warmup_steps": 4,
        "decay_fraction": 0.3,
        "final_learning_rate_ratio": 0.01,
        "weight_decay": 0.2,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_eps": 1e-7,
        "clip_norm": 2.0,
        "z_loss_weight": 1e-4,
        "log_every": 3,
        "checkpoint_every": 6,
        "keep_checkpoints": 5,
        "validate_every": 9,
        "validation_batches": 2,
        "max_skipped_steps": 1,
        "profile_steps": "2:3",
    },
    "data": {
        "source": "synthetic",
        "train": [{"files": "a/*.txt", "weight": 2.5}, {"files": "ü b.jsonl", "weight": 1.0}],
        "validation": [{"files": "{stdlib}/**/*.py", "weight": 0.5}],
        "validation_fraction": 0.1,
        "tokenizer": "some model",
        "interleave": 5,
        "malformed": "error",
    },
    "run": {"dir": "somewhere/else", "seed": 9, "resume_step": 5},
}
SECTIONS = {
    "model": ModelConfig,
    "mesh": MeshConfig,
    "training": TrainingConfig,
    "data": DataConfig,
    "run": RunConfig,
}


def refused(values, *words, overrides=()):
    """The one line with which a config is refused; it must hold these words."""
    with pytest.raises(InputError) as error:
        config_io.from_dict(config_io.apply_overrides(values, overrides))
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


# ---- there and back ----------------------------------------------------------------------------


@pytest.mark.parametrize("section", SECTIONS)
def test_the_example_has_every_key_and_no_default(section):
    fields = {field.name for field in dataclasses.fields(SECTIONS[section])}
    assert EVERY_KEY[section].keys() == fields
    defaults = dataclasses.asdict(SECTIONS[section]())
    assert not [key for key, value in EVERY_KEY[section].items() if value == defaults[key]]


def test_every_key_has_its_meaning_below_it():
    classes = [c for c in ast.parse(inspect.getsource(config_module)).body if hasattr(c, "bases")]
    for section in classes:
        for field, below in zip(section.body, [*section.body[1:], None]):
            told = isinstance(below, ast.Expr) or section.name == "Config"
            assert told or not isinstance(field, ast.AnnAssign), f"{section.name}.{field.target.id}"


def test_every_key_comes_back_from_yaml(tmp_path):
    config = config_io.from_dict(EVERY_KEY)
    for section, values in EVERY_KEY.items():
        for key, value in values.items():
            got = getattr(getattr(config, section), key)
            if key in ("train", "validation"):
                got = [dataclasses.asdict(source) for source in got]
            assert got == value, f"{section}.{key}"
            assert type(got) is type(value), f"{section}.{key}"
    config_io.save(config, tmp_path / "config.yaml")
    assert config_io.load(tmp_path / "config.yaml") == config
    written = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    assert written == EVERY_KEY


def test_the_defaults_come_back_from_yaml(tmp_path):
    config = dataclasses.replace(Config(), run=RunConfig(dir="x"))
    config_io.save(config, tmp_path / "config.yaml")
    assert config_io.load(tmp_path / "config.yaml") == config
    assert config_io.from_dict({}) == Config()


@given(
    st.fixed_dictionaries(
        {
            "learning_rate": st.floats(0, 1e6),
            "adam_eps": st.floats(1.2e-38, 1),
            "steps": st.integers(1, 10**12),
            "clip_norm": st.one_of(st.floats(1.2e-38, 1e300), st.integers(0, 9)),
        }
    ),
    st.text(st.characters(codec="utf-8", exclude_categories=["C", "Zl", "Zp"])),
)
@settings(max_examples=20)
def test_any_number_and_any_text_come_back_from_yaml(tmp_path_factory, numbers, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    config = config_io.from_dict({"training": numbers, "run": {"dir": "x" + text}})
    config_io.save(config, path)
    assert config_io.load(path) == config


def test_the_run_folder_is_named_after_the_file(tmp_path):
    path = tmp_path / "small_model.yaml"
    path.write_text("training:\n  steps: 3\n")
    assert config_io.load(path).run.dir == "runs/small_model"
    assert config_io.load(path, ["run.dir=here"]).run.dir == "here"


def test_a_config_cannot_be_changed_and_can_be_a_dictionary_key():
    config = config_io.from_dict(EVERY_KEY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.hidden_size = 3
    assert hash(config) == hash(config_io.from_dict(EVERY_KEY))


# ---- keys and types ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"hiden_size": 8}}, ["model.hiden_size", "did you mean hidden_size?"]),
        ({"model": {"num_experts": 8}}, ["model.num_experts", "did you mean num_"]),
        ({"training": {"lr": 1}}, ["training.lr", "valid: steps, batch_size"]),
        ({"modle": {}}, ["unknown config key modle", "did you mean model?"]),
        ({"mesh": {"experts": 2}}, ["mesh.experts", "did you mean expert?"]),
        ({"data": {"train": {"fles": "x"}}}, ["data.train.fles", "did you mean files?"]),
        ({"zzz": 1}, ["unknown config key zzz", "valid: model, mesh, training, data, run"]),
        ({"model": {7: 8}}, ["unknown config key model.7"]),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest(values, words):
    refused(values, *words)


@pytest.mark.parametrize(
    ("section", "key", "value", "wanted"),
    [
        ("model", "hidden_size", "wide", "a whole number"),
        ("model", "hidden_size", 8.5, "a whole number"),
        ("model", "hidden_size", True, "a whole number"),
        ("model", "hidden_size", None, "a whole number"),
        ("model", "hidden_size", [8], "a whole number"),
        ("model", "hidden_size", {"a": 1}, "a whole number"),
        ("model", "hidden_size", "inf", "a whole number"),
        ("model", "head_dim", "x", "a whole number"),
        ("model", "capacity_factor", "much", "a number"),
        ("model", "capacity_factor", False, "a number"),
        ("model", "rope_theta", "nan", "a number"),
        ("model", "rope_theta", float("inf"), "a number"),
        ("model", "scan_layers", 1, "true or false"),
        ("model", "scan_layers", "maybe", "true or false"),
        ("model", "scan_layers", None, "true or false"),
        ("model", "remat", True, "text"),
        ("model", "remat", ["full"], "text"),
        ("run", "dir", {"a": 1}, "text"),
        ("training", "learning_rate", "two\nlines", "a number"),
    ],
)
def test_a_wrong_type_is_named_with_what_was_expected(section, key, value, wanted):
    refused({section: {key: value}}, f"{section}.{key}={value!r}", f"must be {wanted}")


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("1e-3", "training", "learning_rate", 0.001),  # YAML reads it as text
        ("1.5e3", "training", "clip_norm", 1500.0),
        ("1e3", "training", "steps", 1000),
        ("20.0", "training", "steps", 20),
        ("2", "model", "capacity_factor", 2.0),
        ("", "model", "capacity_factor", None),
        ("null", "model", "head_dim", None),
        ("", "model", "exchange", ""),
        ("null", "model", "compute_dtype", ""),
        ("no", "model", "scan_layers", False),
        ("true", "model", "scan_layers", True),
        ("2024", "run", "dir", "2024"),
        ("*.py", "data", "train", (SourceConfig("*.py"),)),  # an alias to YAML
        ("[a, b]", "data", "train", (SourceConfig("a"), SourceConfig("b"))),
        ("{files: a, weight: 3}", "data", "train", (SourceConfig("a", 3.0),)),
        (
            "[a, {files: b, weight: 1e1}]",
            "data",
            "train",
            (SourceConfig("a"), SourceConfig("b", 10.0)),
        ),
        ("", "data", "validation", ()),
    ],
)
def test_text_becomes_the_type_of_its_key(text, section, key, value):
    values = {"data": {"tokenizer": "train"}}
    overrides = [f"{section}.{key}={text}"]
    config = config_io.from_dict(config_io.apply_overrides(values, overrides))
    got = getattr(getattr(config, section), key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize("values", [[1], "text", 5])
def test_a_section_must_be_a_mapping(values):
    refused({"model": values}, "model", repr(values), "section")
    with pytest.raises(InputError, match="section"):
        config_io.from_dict(values)


# ---- files and overrides -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["does not exist"]),
        (b"", ["must hold sections"]),
        (b"- a\n- b\n", ["must hold sections"]),
        (b"just text", ["must hold sections"]),
        (b"model:\n  hidden_size: [1\nmesh: 2\n", ["line 3", "not YAML"]),
        (b"model: \xff\xfe", ["cannot be read"]),
        ("folder", ["cannot be read"]),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, words):
    path = tmp_path / "config.yaml"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        config_io.load(path)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in [str(path), *words]), message


def test_overrides_go_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: {hidden_size: 64}\nmesh:\ntraining: {steps: 3, batch_size: 4}\n")
    config = config_io.load(
        path, ["mesh.expert=4", "training.steps=5", "run.dir=a=b", "training.steps=6"]
    )
    assert (config.mesh.expert, config.training.steps, config.run.dir) == (4, 6, "a=b")
    assert (config.model.hidden_size, config.training.batch_size) == (64, 4)


def test_overrides_leave_the_dictionary_as_it_was():
    values = {"model": {"hidden_size": 64}}
    config_io.apply_overrides(values, ["model.hidden_size=32", "mesh.data=2"])
    assert values == {"model": {"hidden_size": 64}}


@pytest.mark.parametrize(
    "text", ["hidden_size=4", "model.hidden_size", "model.=4", ".a=4", "=", ""]
)
def test_an_override_that_is_not_one(text):
    refused({}, repr(text), "section.key=value", overrides=[text])


@pytest.mark.parametrize(
    "text",
    ["0123", "2026_12_01", "1.50", "#1", "2026-13-45", "0b_", "[" * 3000, "a: b", "1:30"],
)
def test_a_field_of_text_takes_an_override_as_it_is(text):
    assert config_io.from_dict(config_io.apply_overrides({}, [f"run.dir={text}"])).run.dir == text
    quoted = config_io.apply_overrides({}, ["run.dir='a b'"])
    assert config_io.from_dict(quoted).run.dir == "a b"
    assert config_io.from_dict(config_io.apply_overrides({}, ["run.dir=null"])).run.dir == ""


def test_numbers_are_those_that_were_written(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text('training: {steps: 010}\nrun: {seed: "9007199254740993", dir: 0123}\n')
    config = config_io.load(path)
    assert (config.training.steps, config.run.seed) == (10, 9007199254740993)
    assert config.run.dir == "0123"
    for digits in ("1" * 5000, "0x10", "9223372036854775808"):
        refused({}, "run.seed=", overrides=[f"run.seed={digits}"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training:\n  steps: 1\n  steps: 2\n", " line 3 has the key steps twice"),
        ("training: {steps: 1}\nrun:\ntraining: {}\n", " line 3 has the key training twice"),
        ("[" * 5000, " is not YAML"),
        ("run: {seed: !!int 1" + 5000 * "1" + "}", " is not YAML"),
        ("? [a, b]\n: 1\n", " line 1 is not YAML"),
    ],
)
def test_a_file_that_means_nothing_clear(tmp_path, text, said):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        config_io.load(path)
    assert str(error.value) == f"config {path}{said}"


def test_a_name_that_no_file_can_have():
    with pytest.raises(InputError, match="cannot be read: embedded null byte"):
        config_io.load("a\0b")


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    path = tmp_path / "config.yaml"
    path.write_text("data: {tokenizer: ~/t.model}\n")
    config = config_io.load(path, ["run.dir=~/runs/a"])
    assert (config.data.tokenizer, config.run.dir) == (
        "/home/someone/t.model",
        "/home/someone/runs/a",
    )


def test_an_unknown_key_in_an_override():
    refused({}, "mesh.experts", "did you mean expert?", overrides=["mesh.experts=2"])
    refused({}, "mash", "did you mean mesh?", overrides=["mash.expert=2"])


# ---- presets -----------------------------------------------------------------------------------


def test_presets_are_the_released_models():
    small = config_io.from_dict({"model": {"preset": "mixtral_8x7b"}}).model
    large = config_io.from_dict({"model": {"preset": "mixtral_8x22b"}}).model
    sizes = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_size"
    sizes += " intermediate_size vocab_size max_position_embeddings load_balance_weight"

    def of(model):
        return [getattr(model, name) for name in sizes.split()]

    assert of(small) == [4096, 32, 32, 8, 128, 14336, 32000, 32768, 0.02]
    assert of(large) == [6144, 56, 48, 8, 128, 16384, 32000, 65536, 0.001]
    for model in (small, large):
        assert (model.num_local_experts, model.num_experts_per_tok) == (8, 2)
        assert (model.rope_theta, model.rms_norm_eps) == (1e6, 1e-5)
    assert set(PRESETS) == {"mixtral_8x7b", "mixtral_8x22b"}


def test_keys_beside_a_preset_win():
    values = {"model": {"preset": "mixtral_8x22b", "num_hidden_layers": 2}}
    model = config_io.from_dict(values).model
    assert (model.num_hidden_layers, model.hidden_size) == (2, 6144)


def test_an_unknown_preset():
    refused({"model": {"preset": "mixtral"}}, "model.preset='mixtral'", "mixtral_8x7b")


# ---- values ------------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 38,
    "hidden_size": 24,
    "intermediate_size": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"num_key_value_heads": 4}, ["num_key_value_heads=4", "num_attention_heads=6"]),
        ({"num_attention_heads": 10}, ["num_attention_heads=10", "hidden_size=24", "head_dim"]),
        ({"num_attention_heads": 8}, ["head_dim=3", "even"]),
        ({"head_dim": 5}, ["head_dim=5", "even"]),
        ({"head_dim": 0}, ["head_dim=0", "at least 1"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok=9", "num_local_experts=8"]),
        ({"capacity_factor": 0}, ["capacity_factor=0", "above 0", "empty is dropless"]),
        ({"capacity_factor": -1.5}, ["capacity_factor=-1.5"]),
        ({"receive_factor": 0}, ["receive_factor=0", "above 0", "empty is dropless"]),
        ({"attention": "flash"}, ["model.attention='flash'", "'xla'", "'splash'"]),
        ({"grouped_matmul": "fast"}, ["model.grouped_matmul='fast'", "'megablox'"]),
        ({"hidden_size": 0}, ["model.hidden_size=0", "at least 1"]),
        ({"num_hidden_layers": -2}, ["model.num_hidden_layers=-2"]),
        ({"load_balance_weight": -1}, ["load_balance_weight=-1", "at least 0"]),
        ({"remat": "some"}, ["model.remat='some'", "'none'", "'matmuls'"]),
        ({"exchange": "fast"}, ["model.exchange='fast'", "'padded'", "'ragged'"]),
        ({"compute_dtype": "float16"}, ["model.compute_dtype='float16'", "'bfloat16'"]),
        ({"param_dtype": ""}, ["model.param_dtype=''", "'float32'"]),
    ],
)
def test_model_values_are_checked(model, words):
    refused({"model": {**SMALL, **model}}, *words)


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"steps": 0}, ["training.steps=0", "at least 1"]),
        (
            {"batch_size": 6, "gradient_accumulation": 4},
            ["gradient_accumulation=4", "batch_size=6"],
        ),
        ({"schedule": "step"}, ["training.schedule='step'", "'cosine'"]),
        ({"learning_rate": -1}, ["training.learning_rate=-1"]),
        ({"adam_beta2": 1.5}, ["training.adam_beta2=1.5", "0..1"]),
        ({"adam_beta2": 0.99999999}, ["training.adam_beta2=0.99999999", "below 1"]),
        ({"adam_eps": 1e-40}, ["training.adam_eps=1e-40", "at least 1.17"]),
        ({"clip_norm": 1e-46}, ["training.clip_norm=1e-46", "at least 1.17"]),
        ({"profile_steps": "9"}, ["training.profile_steps='9'", "10:12"]),
        ({"profile_steps": "9:3"}, ["training.profile_steps='9:3'"]),
        ({"profile_steps": "0:3"}, ["training.profile_steps='0:3'"]),
        ({"profile_steps": "a\n:3"}, ["training.profile_steps"]),
        ({"sequence_length": 40000}, ["sequence_length=40000", "max_position_embeddings=32768"]),
    ],
)
def test_training_values_are_checked(training, words):
    refused({"model": SMALL, "training": training}, *words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"source": "web"}, ["data.source='web'", "'synthetic'"]),
        ({"malformed": "ignore"}, ["data.malformed='ignore'"]),
        ({"interleave": 0}, ["data.interleave=0", "at least 1"]),
        ({"validation_fraction": 1}, ["data.validation_fraction=1.0 must be", "and below 1"]),
        ({"train": [5]}, ["data.train", "5", "glob"]),
        ({"train": {"weight": 2}}, ["data.train: a source needs files"]),
        ({"train": {"files": "a", "weight": 0}}, ["data.train: weight=0", "a"]),
        ({"validation": {"weight": 1}}, ["data.validation: a source needs files"]),
        ({"validation": {"files": "a", "weight": 0}}, ["data.validation", "weight"]),
        ({"train": "a.txt"}, ["data.tokenizer", "train"]),
    ],
)
def test_data_values_are_checked(data, words):
    refused({"data": data}, *words)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"expert": 3}, ["mesh.expert=3", "num_local_experts=8"]),
        ({"expert": 0}, ["mesh.expert=0", "at least 1"]),
        ({"fsdp": 5}, ["mesh.fsdp * mesh.expert=5", "hidden_size=24"]),
        ({"fsdp": 4, "expert": 4}, ["mesh.fsdp * mesh.expert=16", "hidden_size=24"]),
        ({"tensor": 4}, ["mesh.tensor=4", "num_key_value_heads=2"]),
        ({"data": 3}, ["batch_size", "8 sequences", "mesh.data", "= 3"]),
        ({"data": 2, "fsdp": 2, "expert": 4}, ["8 sequences", "= 16"]),
    ],
)
def test_sizes_that_do_not_divide_are_named(mesh, words):
    refused({"model": SMALL, "mesh": mesh}, *words)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"intermediate_size": 11}, ["mesh.tensor=2", "intermediate_size=11"]),
        ({"vocab_size": 39}, ["mesh.tensor=2", "vocab_size=39"]),
        ({"num_key_value_heads": 3}, ["mesh.tensor=2", "num_key_value_heads=3"]),
    ],
)
def test_sizes_that_tensor_does_not_divide(sizes, words):
    with pytest.raises(InputError) as error:
        check_mesh(ModelConfig(**{**SMALL, **sizes}), MeshConfig(tensor=2))
    assert all(word in str(error.value) for word in words)


def test_microbatches_must_split_over_the_mesh():
    training = {"batch_size": 16, "gradient_accumulation": 4}
    refused({"model": SMALL, "training": training, "mesh": {"expert": 8}}, "= 4 sequences", "= 8")


def test_local_exchange_with_experts_on_other_devices():
    values = {"model": {**SMALL, "exchange": "local"}, "mesh": {"expert": 2}}
    refused(values, "model.exchange=local", "expert=2", "padded or ragged")
    config_io.from_dict({**values, "mesh": {"fsdp": 2}})


@pytest.mark.parametrize(
    "key",
    [
        *("model.rope_theta=0", "model.rms_norm_eps=-1", "model.rms_norm_eps=1e-46"),
        *("training.adam_beta1=1", "data.interleave=0"),
    ],
)
def test_values_that_could_only_give_nan_are_refused(key):
    with pytest.raises(InputError, match=key.split("=")[0]):
        config_io.from_dict(config_io.apply_overrides({}, [key]))


def test_an_override_does_not_hide_a_section_that_is_none():
    with pytest.raises(InputError, match="model: 5 must be a section"):
        config_io.apply_overrides({"model": 5}, ["model.vocab_size=7"])


def test_a_range_of_steps_is_text_in_a_file_and_on_the_command_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  profile_steps: 10:12\n")
    assert config_io.load(path).training.profile_range == (10, 12)
    assert config_io.load(path, ["training.profile_steps=2:3"]).training.profile_range == (2, 3)
