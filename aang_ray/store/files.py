"""Where a store lies: a local folder, or any URI that pyarrow or fsspec opens."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
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


# --- store.publish: Making a file visible whole or not at all, and one writer of a store at a time.


TEMPORARY = ".tmp-"
LEFTOVER_AGE = timedelta(hours=1)

_log = logging.getLogger(__name__)
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


def publish(location: Location, path: str, data: bytes) -> None:
    """Write `data` to `path`, replacing what is there; a kill at any moment leaves the old or the new, never a part.

    Where renaming is atomic the bytes first go to a temporary name in the store's root (of no interest to readers,
    which look into the tables' folders only); an object store shows a file when its upload has ended.
    """
    if location.kind == "object":
        _upload(location, path, data)
        return
    temporary = location.path(f"{TEMPORARY}{uuid.uuid4().hex}")
    if location.kind == "local":
        _rename_local(temporary, path, data)
        return
    _upload(location, temporary, data)
    remove(location, path)
    location.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    location.filesystem.move(temporary, path)


def remove(location: Location, path: str) -> None:
    """Delete a file if it is there."""
    if location.filesystem.get_file_info(path).type != fs.FileType.NotFound:
        location.filesystem.delete_file(path)


def sweep_leftovers(location: Location) -> None:
    """Delete the temporary files of writers that were killed over an hour ago."""
    if location.kind == "object":
        return  # no temporary names there
    oldest = datetime.now(UTC) - LEFTOVER_AGE
    for info in location.filesystem.get_file_info(fs.FileSelector(location.root, allow_not_found=True)):
        if info.base_name.startswith(TEMPORARY) and info.mtime is not None and info.mtime < oldest:
            location.filesystem.delete_file(info.path)


@contextmanager
def one_writer(location: Location) -> Iterator[None]:
    """Hold the store's lock, so that looking for a row and writing it are one action among local processes.

    The kernel lets go of it when its holder dies. Remote stores have no lock: there the later of two writers of the
    same cell wins, with an equal row, since a cell's result is a function of its name.
    """
    if location.kind != "local":
        yield
        return
    try:
        os.makedirs(location.root, exist_ok=True)
        handle = os.open(os.path.join(location.root, ".lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"store {location.uri} cannot be written: {error.strerror or error}") from error
    try:
        _lock(handle, location.uri)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, uri: str) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning("the filesystem of store %s has no locks: do not run two sweeps on it at once", uri)


def _upload(location: Location, path: str, data: bytes) -> None:
    if location.kind != "object":
        location.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with location.filesystem.open_output_stream(path) as stream:
        stream.write(data)


def _rename_local(temporary: str, path: str, data: bytes) -> None:
    with open(temporary, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    os.replace(temporary, path)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)  # the name itself survives a power cut only after this
    finally:
        os.close(handle)
