"""Where a store lies: a local folder, or any URI that pyarrow or fsspec opens."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pyarrow import fs

from aang_ray.errors import UserError

Kind = Literal["local", "renaming", "object"]

# On these a file appears whole or not at all when its upload ends, and renaming is a copy.
_OBJECT_STORES = {"s3", "s3a", "gcs", "gs", "abfs", "abfss", "adl", "az", "oss", "r2", "oci"}


@dataclass(frozen=True)
class Location:
    """An opened root folder, which need not exist yet."""

    uri: str
    filesystem: fs.FileSystem
    root: str
    kind: Kind
    """How a file becomes visible at once: `local` and `renaming` by a rename, `object` by the end of its upload."""

    def path(self, *parts: str) -> str:
        """The path of `parts` below the root, as the filesystem wants it."""
        return "/".join((self.root.rstrip("/"), *parts))

    def exists(self) -> bool:
        """Whether there is a folder (on object stores: anything) at the root."""
        return bool(self.filesystem.get_file_info(self.root).type == fs.FileType.Directory)


def open_location(uri: str | Path) -> Location:
    """Open the root of a store.

    Raises `UserError` for a URI that neither pyarrow nor fsspec knows, for one that may not be read, for a bucket that
    does not exist, and for a root that is a file.
    """
    location = _remote(uri) if isinstance(uri, str) and "://" in uri else _local(uri)
    try:
        kind = location.filesystem.get_file_info(location.root).type
        if kind == fs.FileType.NotFound and isinstance(location.filesystem, fs.S3FileSystem):
            _check_bucket(location)
    except OSError as error:
        raise UserError(f"store {location.uri} cannot be read: {_line(error)}") from error
    if kind == fs.FileType.File:
        raise UserError(f"store {location.uri} is a file; a store is a folder")
    return location


def _check_bucket(location: Location) -> None:
    """A folder need not exist yet; its bucket is never made here, and would be missed only by the first row."""
    bucket = location.root.strip("/").partition("/")[0]
    if location.filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
        raise UserError(f"store {location.uri}: there is no bucket {bucket}; make it, or name another")


def _local(path: str | Path) -> Location:
    if not str(path):
        raise UserError("the store's location is empty; give a folder or a URI such as s3://bucket/folder")
    root = os.path.abspath(os.path.expanduser(path))
    return Location(root, fs.LocalFileSystem(), root, "local")


def _remote(uri: str) -> Location:
    scheme = uri.partition("://")[0].lower()
    try:
        filesystem, root = fs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        filesystem, root = _fsspec(uri)
    except OSError as error:
        raise UserError(f"store {uri} cannot be opened: {_line(error)}") from error
    if isinstance(filesystem, fs.LocalFileSystem):
        return Location(uri, filesystem, root, "local")
    return Location(uri, filesystem, root, "object" if scheme in _OBJECT_STORES else "renaming")


def _fsspec(uri: str) -> tuple[fs.FileSystem, str]:
    import fsspec.core

    try:
        filesystem, root = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError, OSError) as error:
        raise UserError(
            f"store {uri} cannot be opened: {_line(error)}; a store is a folder, or a URI that pyarrow or fsspec opens"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), str(root)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
