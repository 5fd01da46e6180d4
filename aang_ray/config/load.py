"""Reads a RunConfig from YAML and from `--set a.b=c`. Every input error gives a message of one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from aang_ray.config.methods import method_sections
from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration of a YAML file.

    Args:
        path: The file; None uses the defaults of all settings.
        overrides: Settings `key.path=value` that replace those of the file.

    Raises:
        UserError: The file cannot be read, or its content is not a valid configuration.
    """
    mapping = read_yaml(path) if path is not None else {}
    return parse_config(override(mapping, overrides), str(path) if path is not None else "configuration")


def parse_config(mapping: Mapping[str, Any], where: str) -> RunConfig:
    """Return the configuration that a mapping of settings describes; `where` names its source in messages.

    Raises:
        UserError: The mapping is not valid. The message is one line with the key, the allowed values, and the most
            similar
        valid name.
    """
    try:
        return RunConfig.model_validate(mapping)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_error(error, RunConfig)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty mapping for an empty file.

    Raises:
        UserError: The file cannot be read, or its content is not a mapping.
    """
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(value).__name__}")
    return value


def override(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `mapping` with every override `a.b=value` applied. Values are parsed as YAML.

    A section is set before the settings inside it: `method.aux_lr=1 method=aang` sets both.

    Raises:
        UserError: An override does not have this form, or its path goes through a value that is not a section.
    """
    result = dict(mapping)
    for text in sorted(overrides, key=lambda text: text.partition("=")[0].count(".")):
        key, separator, value = text.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {text}: expected key.path=value, for example --set optim.body_lr=1e-4")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"--set {text}: the value is not valid YAML") from None
        result = set_path(result, key.strip(), _number(parsed))
    return result


def set_path(mapping: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of `mapping` in which the dotted `path` has the value.

    Raises:
        UserError: The path goes through a value that is not a section.
    """
    head, _, rest = path.partition(".")
    result = dict(mapping)
    if rest:
        inner = result.get(head) or {}
        if head == "method" and isinstance(inner, str):
            inner = {"name": inner}
        if not isinstance(inner, Mapping):
            raise UserError(f"{path}: {head} is a value, not a section")
        result[head] = set_path(inner, rest, value)
    else:
        result[head] = value
    return result


def _number(value: object) -> object:
    """Return a text as a number if it is one, because YAML 1.1 parses `1e-4` as text; else the value itself."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def describe_error(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line with the first problem of a validation error and the number of further problems."""
    # A misspelt key causes a second problem, the missing correct key. Report the misspelling, which explains both.
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    keys = _key_path(first["loc"], model)
    key = ".".join(keys)
    match first["type"]:
        case "extra_forbidden":
            names = sorted({name for one in _sections_at(model, first["loc"][:-1]) for name in one.model_fields})
            close = nearest(keys[-1], names)
            hint = f"did you mean {'.'.join([*keys[:-1], close])}?" if close else f"allowed: {', '.join(names)}"
            line = f"unknown key {key}; {hint}"
        case "missing":
            line = f"{key} is missing"
        case "union_tag_invalid" | "union_tag_not_found":
            tag = str(first.get("ctx", {}).get("tag", ""))
            close = nearest(tag, method_sections())
            hint = f"; did you mean {close}?" if close else ""
            line = f"{key}.name: {tag!r} is not one of {', '.join(method_sections())}{hint}"
        case "literal_error":
            allowed_text = str(first["ctx"]["expected"])
            choices = [c.strip().strip("'") for c in allowed_text.replace(" or ", ",").split(",")]
            close = nearest(str(first["input"]), choices)
            hint = f"; did you mean {close}?" if close else ""
            line = f"{key}: {first['input']!r} is not allowed, use {allowed_text}{hint}"
        case "model_attributes_type":  # not a mapping where one of several sections is expected
            named = _sections_at(model, first["loc"])[0].model_fields["name"].default
            line = f"{key}: must be a name, or settings such as {{name: {named}}}, got {first['input']!r}"
        case "model_type":
            fields = [item for option in _sections_at(model, first["loc"]) for item in option.model_fields.items()]
            example = next((name for name, field in fields if field.is_required()), fields[0][0])
            line = f"{key}: must be settings such as {{{example}: ...}}, got {first['input']!r}"
        case "tuple_type":
            line = f"{key}: must be a list such as [a, b], got {first['input']!r}"
        case _:
            same = [p["msg"] for p in problems if _key_path(p["loc"], model) == keys]
            message = " or ".join(m.removeprefix("Input should be ").split(", unable")[0] for m in same)
            message = f"must be {message}" if same[0].startswith("Input should be ") else message
            message = message.removeprefix("Value error, ")
            stated = first["type"] == "value_error"
            line = ": ".join(
                part for part in (key, message if stated else f"{message}, got {first['input']!r}") if part
            )
    extra = len({tuple(_key_path(p["loc"], model)) for p in problems} - {tuple(keys)})
    return f"{line} (and {extra} more)" if extra else line


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name that is most similar to a misspelt word; None if none is similar enough."""
    return next(iter(difflib.get_close_matches(word, names, n=1, cutoff=0.65)), None)


def _key_path(location: Sequence[int | str], model: type[BaseModel]) -> list[str]:
    """Return the keys in an error's location, without the tags that pydantic adds for unions."""
    keys: list[str] = []
    options: list[type[BaseModel]] = [model]
    for part in location:
        name = str(part)
        fields = [option.model_fields for option in options]
        if keys and not any(name in f for f in fields) and _is_tag(name):
            continue
        keys.append(name)
        options = [inner for f in fields if name in f for inner in _models_in(f[name].annotation)]
    return keys


def _is_tag(name: str) -> bool:
    return (
        name in method_sections()
        or name.startswith(("literal[", "constrained-", "function-"))
        or name in {"int", "float"}
    )


def _sections_at(model: type[BaseModel], location: Sequence[int | str]) -> list[type[BaseModel]]:
    """Return the possible sections at an error's location. A tag in the location selects one section of a union."""
    options: list[type[BaseModel]] = [model]
    for part in map(str, location):
        inner = [
            found
            for option in options
            if part in option.model_fields
            for found in _models_in(option.model_fields[part].annotation)
        ]
        chosen = [o for o in options if "name" in o.model_fields and o.model_fields["name"].default == part]
        options = inner or chosen or options
    return options


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
