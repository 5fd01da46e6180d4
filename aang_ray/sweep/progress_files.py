"""Small JSON files below `<store>/.progress`, written whole or not at all. They inform people; truth is in the rows."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from pyarrow import fs

from aang_ray.errors import UserError
from aang_ray.store.files import Location, publish

FOLDER = ".progress"

_READERS = 16  # files are small: the wait for each is what takes time

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def write_json(location: Location, path: str, content: Mapping[str, Any]) -> None:
    """Write a mapping in the place of what is there."""
    if location.kind == "local":
        os.makedirs(location.root, exist_ok=True)  # where temporary names go
    publish(location, path, json.dumps(content, ensure_ascii=False).encode())


def read_folder(location: Location, *parts: str) -> list[tuple[str, dict[str, Any]]]:
    """Path and content of the JSON files of a folder, by path; folders in it are left out, none if it is not there.

    A file that vanished since it was listed (its trial has ended) is left out.

    Raises:
        UserError: for a file that is not a JSON object.
    """
    selector = fs.FileSelector(location.path(*parts), allow_not_found=True)
    infos = location.filesystem.get_file_info(selector)
    paths = sorted(info.path for info in infos if info.type == fs.FileType.File and info.path.endswith(".json"))
    with ThreadPoolExecutor(_READERS) as pool:
        contents = pool.map(lambda path: _read(location, path), paths)
        return [(path, content) for path, content in zip(paths, contents, strict=True) if content is not None]


def as_fields(path: str, mapping: Mapping[str, Any], kind: type[T]) -> T:
    """A dataclass from a mapping; fields that a newer version added are left out.

    Raises:
        UserError: where a field is missing.
    """
    try:
        return kind(**{field.name: mapping[field.name] for field in fields(kind)})
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; delete it: it only tells about progress") from None


def _read(location: Location, path: str) -> dict[str, Any] | None:
    try:
        with location.filesystem.open_input_file(path) as stream:
            content = json.loads(stream.read())
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; delete it: it only tells about progress")
    return content
