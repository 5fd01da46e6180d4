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

_VALUES, _BITS, _LEVELS = 100_000, 256, 8
"""The most values that a YAML text may stand for, bits of a whole number, and levels of a dotted setting."""
_SHOWN = 200
"""How many characters of a wrong value a message shows."""


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


def parse_config(mapping: Mapping[str, Any], where: str, *, stored: bool = False) -> RunConfig:
    """Return the configuration that a mapping of settings describes; `where` names its source in messages.

    With `stored`, it is one that a store holds: settings that it does not state did not exist when it was written.

    Raises:
        UserError: The mapping is not valid. The message is one line with the key, the allowed values, and the most
            similar
        valid name.
    """
    try:
        return RunConfig.stored(mapping) if stored else RunConfig.model_validate(mapping)
    except ValidationError as error:
        raise UserError(f"{where}: {describe_error(error, RunConfig)}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty mapping for an empty file.

    Raises:
        UserError: The file cannot be read, or its content is not a mapping.
    """
    try:
        require_file(path, str(path))
        value = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 at byte {error.start}") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(value).__name__}")
    return value


class _Loader(yaml.SafeLoader):
    """Refuses what plain YAML takes in silence: a key that is there twice, and a few lines that mean a huge value."""

    def construct_document(self, node: yaml.Node) -> Any:
        _refuse_huge(node, {})
        return super().construct_document(node)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = int(super().construct_yaml_int(node))
        if value.bit_length() > _BITS:  # Python cannot print numbers of some thousand digits
            raise yaml.MarkedYAMLError(problem=f"a number of more than {_BITS} bits", problem_mark=node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in keys:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
                keys.add(key.value)
        return dict(super().construct_mapping(node, deep))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _refuse_huge(node: yaml.Node, sizes: dict[yaml.Node, int | None]) -> int:
    """Return the number of values in a node, each alias counted as a copy of what it stands for.

    Args:
        node: The node.
        sizes: The sizes of the nodes that were counted already; None for those that are being counted.
    """
    if node in sizes:
        size = sizes[node]
        if size is None:
            raise yaml.MarkedYAMLError(problem="a value holds itself", problem_mark=node.start_mark)
        return size
    sizes[node] = None
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inner = node.value
    elif isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    size = sizes[node] = 1 + sum(_refuse_huge(part, sizes) for part in inner)
    if size > _VALUES:
        raise yaml.MarkedYAMLError(problem=f"more than {_VALUES:,} values", problem_mark=node.start_mark)
    return size


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of a YAML text.

    Raises:
        UserError: It is not valid YAML, or a key is there twice.
    """
    try:
        return yaml.load(text.removeprefix("\ufeff"), _Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", in line {error.problem_mark.line + 1}"
        raise UserError(f"{where}: not valid YAML: {error.problem}{line}") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # such as a date that does not exist
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except (LookupError, AttributeError):  # how PyYAML takes `!!bool x` and `!!timestamp x`
        raise UserError(f"{where}: not valid YAML: a value is not of the type that its tag names") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None


def kind_of(path: Path) -> str:
    """Return what is at a path, for messages: `nothing`, `a file`, `a folder`, `a pipe`, `a socket` or `a device`."""
    kinds = {"is_file": "file", "is_dir": "folder", "is_fifo": "pipe", "is_socket": "socket", "exists": "device"}
    return next((f"a {name}" for test, name in kinds.items() if getattr(path, test)()), "nothing")


def require_file(path: Path, where: str) -> None:
    """Refuse a pipe, a folder or a device in the place of a file: reading it might never end. Nothing is let through.

    Args:
        path: The path.
        where: How messages name it.

    Raises:
        UserError: There is something else than a file.
    """
    kind = kind_of(path)
    if kind not in ("a file", "nothing"):
        raise UserError(f"{where} is {kind}, not a file")


def override(mapping: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `mapping` with every override `a.b=value` applied.

    Values are parsed as YAML, but those of settings that are texts: there, `no`, `2024` and `a: b` are names.

    A section is set before the settings inside it: `method.aux_lr=1 method=aang` sets both.

    Raises:
        UserError: An override does not have this form, or its path goes through a value that is not a section.
    """
    result = dict(mapping)
    for text in sorted(overrides, key=lambda text: text.partition("=")[0].count(".")):
        key, separator, value = (part.strip() for part in text.partition("="))
        if not separator or not all(key.split(".")):
            raise UserError(f"--set {_cut(text)}: expected key.path=value, for example --set optim.body_lr=1e-4")
        result = set_path(result, key, _parsed(key, value, text))
    return result


def _parsed(key: str, value: str, text: str) -> Any:
    """Return the value of an override: a text as it stands where the setting is a text, else what the YAML says."""
    model: Any = RunConfig
    *sections, name = key.split(".")
    for section in sections:
        field = model.model_fields.get(section)
        model = next(_models_in(field.annotation), None) if field is not None else None
        if model is None:
            break
    field = model.model_fields.get(name) if model is not None else None
    annotation = None if field is None else field.annotation
    several = annotation == tuple[str, ...] and value.startswith("[")
    if value != "null" and not several and str in (annotation, *get_args(annotation)):
        return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
    return _number(parse_yaml(value, f"--set {_cut(text)}"))


def set_path(mapping: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a copy of `mapping` in which the dotted `path` has the value.

    Raises:
        UserError: The path goes through a value that is not a section, or has more levels than any setting.
    """
    if path.count(".") >= _LEVELS:
        raise UserError(f"unknown key {shown(path)}; no setting has so many levels")
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
            line = f"{key}.name: {shown(tag)} is not one of {', '.join(method_sections())}{hint}"
        case "literal_error":
            allowed_text = str(first["ctx"]["expected"])
            choices = [c.strip().strip("'") for c in allowed_text.replace(" or ", ",").split(",")]
            close = nearest(str(first["input"]), choices)
            hint = f"; did you mean {close}?" if close else ""
            line = f"{key}: {shown(first['input'])} is not allowed, use {allowed_text}{hint}"
        case "model_attributes_type":  # not a mapping where one of several sections is expected
            named = _sections_at(model, first["loc"])[0].model_fields["name"].default
            line = f"{key}: must be a name, or settings such as {{name: {named}}}, got {shown(first['input'])}"
        case "model_type":
            fields = [item for option in _sections_at(model, first["loc"]) for item in option.model_fields.items()]
            example = next((name for name, field in fields if field.is_required()), fields[0][0])
            line = f"{key}: must be settings such as {{{example}: ...}}, got {shown(first['input'])}"
        case "tuple_type":
            line = f"{key}: must be a list such as [a, b], got {shown(first['input'])}"
        case _:
            same = [p["msg"] for p in problems if _key_path(p["loc"], model) == keys]
            message = " or ".join(m.removeprefix("Input should be ").split(", unable")[0] for m in same)
            message = f"must be {message}" if same[0].startswith("Input should be ") else message
            message = message.removeprefix("Value error, ")
            stated = first["type"] == "value_error"
            line = ": ".join(
                part for part in (key, message if stated else f"{message}, got {shown(first['input'])}") if part
            )
    extra = len({tuple(_key_path(p["loc"], model)) for p in problems} - {tuple(keys)})
    return f"{line} (and {extra} more)" if extra else line


def shown(value: object) -> str:
    """Return a wrong value for a message, cut where it is longer than anybody reads."""
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def nearest(word: str, names: Iterable[str]) -> str | None:
    """Return the name that is most similar to a misspelt word; None if none is similar enough."""
    return next(iter(difflib.get_close_matches(word[:_SHOWN], names, n=1, cutoff=0.65)), None)


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
