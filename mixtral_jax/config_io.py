"""Configurations as text: YAML files, dotted overrides, and back."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import pathlib
import types
import typing

import yaml

from mixtral_jax.checks import nearest
from mixtral_jax.config import (
    PRESETS,
    Config,
    InputError,
    ModelConfig,
    SourceConfig,
    check_choice,
)


class _Loader(yaml.SafeLoader):
    """YAML whose scalars are text, true, false or nothing: what a number is, the field says.

    YAML 1.1 would read 010 as 8, 10:12 in base 60 and 2026-12-01 as a date, where a name was meant.
    """

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"has the key {key.value} twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_KEPT = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "merge")}
_Loader.yaml_implicit_resolvers = {
    first: [pattern for pattern in patterns if pattern[0] in _KEPT]
    for first, patterns in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str) -> object:
    """What a YAML text says.

    Raises:
      ValueError: one line on what is wrong with it.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or ""
        said = problem if problem.startswith("has the key") else "is not YAML"
        raise ValueError(f"{line} {said}") from None
    except (ValueError, RecursionError):
        raise ValueError(" is not YAML") from None


def _number(value: object, kind: type) -> object:
    """Accept 1e-3 (which YAML reads as text), 2.0 for 2 and 2 for 2.0, but never a boolean."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError
    if kind is int and value != int(value):
        raise ValueError
    if not math.isfinite(value):
        raise ValueError
    return kind(value)


def _sources(name: str, value: object) -> tuple[SourceConfig, ...]:
    entries = value if isinstance(value, list | tuple) else [value] if value else []
    made = []
    for entry in entries:
        if isinstance(entry, str):
            made.append(SourceConfig(files=entry))
        elif isinstance(entry, dict):
            made.append(_build(SourceConfig, entry, name))
        else:
            raise InputError(f"{name}: {entry!r} is neither a glob nor {{files: GLOB, weight: W}}")
    return tuple(made)


def _convert(name: str, value: object, annotation: object) -> object:
    """One YAML value to the type that its field declares."""
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else ()
    if value is None or value == "":
        if type(None) in options:
            return None
        if annotation is str:
            return ""
    kind = next((o for o in options if o is not type(None)), annotation)
    if kind == tuple[SourceConfig, ...]:
        return _sources(name, value)
    try:
        if kind in (int, float):
            return _number(value, kind)
        if kind is bool and isinstance(value, bool):
            return value
        if kind is str and isinstance(value, str | int | float) and not isinstance(value, bool):
            return str(value)
    except (ValueError, OverflowError):
        pass
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[kind]
    raise InputError(f"{name}={value!r} must be {wanted}")


def _build(cls: type, values: object, prefix: str) -> typing.Any:
    """A dataclass from a mapping; unknown keys and wrong types are named with their full path."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{prefix or 'config'}: {values!r} must be a section with keys")
    hints = typing.get_type_hints(cls)
    made = {}
    for key, value in values.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            raise InputError(f"unknown config key {name}{nearest(key, hints)}")
        if dataclasses.is_dataclass(hints[key]):
            made[key] = _build(hints[key], value, name)
        else:
            made[key] = _convert(name, value, hints[key])
    if cls is ModelConfig:
        preset = made.get("preset", "")
        check_choice("model.preset", preset, ("", *PRESETS))
        made = {**PRESETS.get(preset, {}), **made}
    return cls(**made)


def from_dict(values: dict) -> Config:
    """A Config from nested dictionaries, as YAML gives them.

    Raises:
      InputError: for an unknown key (with the nearest valid one), a wrong type or a bad value.
    """
    return _build(Config, values, "")


def section_from_dict(name: str, values: object) -> typing.Any:
    """One section of a Config, such as mesh, from a dictionary or None.

    Raises:
      InputError: as from_dict, but for what depends on other sections.
    """
    return _build(typing.get_type_hints(Config)[name], values, name)


def to_dict(config: Config) -> dict:
    """The nested dictionary that from_dict turns back into an equal Config."""
    plain = dataclasses.asdict(config)
    for key in ("train", "validation"):
        plain["data"][key] = list(plain["data"][key])
    return plain


def by_key(config: Config) -> dict[str, str]:
    """Each value of a Config, as text, under its full name, such as training.steps."""
    sections = to_dict(config)
    return {
        f"{name}.{key}": str(v) for name, values in sections.items() for key, v in values.items()
    }


def apply_overrides(values: dict, overrides: typing.Sequence[str]) -> dict:
    """The same nested dictionary with `section.key=value` texts laid over it, and ~ spelled out."""
    merged = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for text in overrides:
        name, equals, raw = text.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot and section and key):
            raise InputError(f"override {text!r} must look like section.key=value")
        target = merged.get(section)
        if target is None:
            target = merged[section] = {}
        if not isinstance(target, dict):
            raise InputError(f"{section}: {target!r} must be a section with keys")
        target[key] = _value(section, key, raw)
    for section, key in _PATHS:
        merged = _with_home(merged, section, key)
    return merged


_PATHS = (("model", "checkpoint"), ("data", "tokenizer"), ("run", "dir"))


def _with_home(values: dict, section: str, key: str) -> dict:
    """The same with a path of the user's home, ~ or ~name at its start, as shells spell it out."""
    inner = values.get(section)
    if not isinstance(inner, dict) or not isinstance(inner.get(key), str):
        return values
    return {**values, section: {**inner, key: os.path.expanduser(inner[key])}}


def _value(section: str, key: str, raw: str) -> object:
    """What an override gives a field: its text as it is, if the field holds text."""
    cls = typing.get_type_hints(Config).get(section)
    quoted = raw.strip().startswith(("'", '"'))
    text = cls is not None and typing.get_type_hints(cls).get(key) is str
    if text and not quoted and raw != "null":
        return raw
    try:
        return _parse(raw)
    except ValueError:
        return raw


def read_yaml(path: str | pathlib.Path) -> dict:
    """A YAML file as a dictionary; every failure is an InputError that names the file."""
    path = pathlib.Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"config {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise InputError(f"config {path} cannot be read: {error}") from None
    try:
        values = _parse(text)
    except ValueError as error:
        raise InputError(f"config {path}{error}") from None
    if not isinstance(values, dict):
        raise InputError(f"config {path} must hold sections such as model: and training:")
    return values


# What a run may choose otherwise than the checkpoint that it starts from.
_FREE = {"max_position_embeddings", "load_balance_weight"}


def with_sizes(values: dict, sizes_of: typing.Callable[[str], dict]) -> dict:
    """Values whose model has the sizes of the checkpoint that it starts from."""
    model = values.get("model")
    checkpoint = model.get("checkpoint") if isinstance(model, dict) else None
    if not checkpoint:
        return values
    if model.get("preset"):
        raise InputError(
            f"model.preset={model['preset']}: model.checkpoint={checkpoint} decides the sizes; "
            "leave one of them out (model.preset= on the command line)"
        )
    sizes = sizes_of(str(checkpoint))
    hints = typing.get_type_hints(ModelConfig)
    for key, size in sizes.items():
        if key in model and key not in _FREE:
            given = _convert(f"model.{key}", model[key], hints[key])
            if given is not None and given != size:
                raise InputError(
                    f"model.{key}={given}, but model.checkpoint={checkpoint} has {size}: "
                    "leave the key out"
                )
    free = {key: model[key] for key in _FREE if model.get(key) is not None}
    return {**values, "model": {**model, **sizes, **free}}


def load(
    path: str | pathlib.Path,
    overrides: typing.Sequence[str] = (),
    sizes_of: typing.Callable[[str, str], dict] | None = None,
) -> Config:
    """Read a YAML config, lay overrides over it and check the whole.

    Args:
      path: the YAML file.
      overrides: texts such as `mesh.expert=4`.
      sizes_of: gives the keys of `model` that belong to the folder model.checkpoint, for a run in
        run.dir; without it the config has them already, as one that a run has saved.
    Raises:
      InputError: with one line that names the value and what was expected.
    """
    values = apply_overrides(read_yaml(path), overrides)
    folder = f"runs/{pathlib.Path(path).stem}"
    if isinstance(run := values.get("run"), dict):
        folder = str(run.get("dir") or folder)
    if sizes_of is not None:
        values = with_sizes(values, functools.partial(sizes_of, run_dir=folder))
    config = from_dict(values)
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder))


def save(config: Config, path: str | pathlib.Path) -> None:
    """Write a config as YAML that `load` reads back as an equal one."""
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    pathlib.Path(path).write_text(text, encoding="utf-8")
