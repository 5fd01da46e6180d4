"""Files that appear whole or not at all, on any filesystem, and locks between processes.

A process that is killed at any moment leaves the old file or folder, or the new one, never a part.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
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

# On an object store a file appears when its upload has ended, and renaming is a copy.
_OBJECT_STORES = {"s3", "s3a", "gcs", "gs", "abfs", "abfss", "adl", "az", "oss", "r2", "oci"}

TEMPORARY = ".tmp-"
"""Names of unfinished files begin with this."""
LEFTOVER_AGE = timedelta(hours=1)
"""Unfinished files that are older belong to processes that were killed."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Location:
    """An opened root folder. It need not exist yet."""

    uri: str
    """An absolute path, or the URI as given."""
    filesystem: fs.FileSystem
    root: str
    kind: Kind
    """What makes a file visible at once: a rename (`local`, `renaming`), or the end of its upload (`object`)."""

    def path(self, *parts: str) -> str:
        """Return the path of `parts` below the root, as the filesystem expects it."""
        return "/".join((self.root.rstrip("/"), *parts))

    def exists(self) -> bool:
        """Return whether the root is a folder; on object stores, whether anything lies below it."""
        return bool(self.filesystem.get_file_info(self.root).type == fs.FileType.Directory)


def open_location(uri: str | Path) -> Location:
    """Open a root folder: a local path, or a URI that pyarrow or fsspec opens.

    Raises:
        UserError: The URI is unknown or may not be read, its bucket does not exist, or the root is a file.
    """
    if not str(uri):
        raise UserError("the store's location is empty; give a folder or a URI such as s3://bucket/folder")
    root = os.path.abspath(os.path.expanduser(uri))
    remote = isinstance(uri, str) and "://" in uri
    location = _remote(str(uri)) if remote else Location(root, fs.LocalFileSystem(), root, "local")
    try:
        kind = location.filesystem.get_file_info(location.root).type
        bucket = location.root.strip("/").partition("/")[0]
        missing = kind == fs.FileType.NotFound and isinstance(location.filesystem, fs.S3FileSystem)
        if missing and location.filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
            raise UserError(f"store {location.uri}: there is no bucket {bucket}; make it, or name another")
    except OSError as error:
        raise UserError(f"store {location.uri} cannot be read: {_line(error)}") from error
    if kind == fs.FileType.File:
        raise UserError(f"store {location.uri} is a file; a store is a folder")
    return location


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
    """Return the first line of an error's message."""
    return str(error).strip().partition("\n")[0].rstrip(".")


def publish(location: Location, path: str, data: bytes) -> None:
    """Write a file, or replace it, so that readers see all of the old content or all of the new.

    Where renaming is atomic, the bytes first go to a temporary name in the root; readers look into subfolders only.
    """
    temporary = location.path(f"{TEMPORARY}{uuid.uuid4().hex}")
    match location.kind:
        case "object":
            _upload(location, path, data)
        case "local":
            _write_and_rename(temporary, path, data)
        case "renaming":
            _upload(location, temporary, data)
            remove(location, path)
            location.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
            location.filesystem.move(temporary, path)


def remove(location: Location, path: str) -> None:
    """Delete a file if it exists."""
    if location.filesystem.get_file_info(path).type != fs.FileType.NotFound:
        location.filesystem.delete_file(path)


def remove_leftovers(location: Location) -> None:
    """Delete the temporary files in the root that killed processes left over an hour ago."""
    if location.kind == "object":
        return  # there are no temporary names
    oldest = datetime.now(UTC) - LEFTOVER_AGE
    for info in location.filesystem.get_file_info(fs.FileSelector(location.root, allow_not_found=True)):
        if info.base_name.startswith(TEMPORARY) and info.mtime is not None and info.mtime < oldest:
            location.filesystem.delete_file(info.path)


def write_file(path: Path, data: bytes) -> None:
    """Write a local file, or replace it, so that readers see all of the old content or all of the new."""
    _write_and_rename(str(path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")), str(path), data)


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give the block a temporary folder that becomes `target` when the block ends, and is deleted if the block fails.

    A `target` that exists then is replaced or, without `replace`, stays: of several processes the first wins.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    old = target.with_name(f".{target.name}.old")
    if replace:  # a fixed name, so that the next call removes what a killed process left
        draft = target.with_name(f".{target.name}.new")
        for leftover in (draft, old):
            shutil.rmtree(leftover, ignore_errors=not leftover.exists())
        draft.mkdir()
    else:
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        draft.chmod(0o755)  # mkdtemp makes it private
    try:
        yield draft
        for path in (*draft.rglob("*"), draft):
            _sync(path)
        if replace and target.exists():
            target.rename(old)  # a folder with content cannot be replaced in one action
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        _sync(target.parent)
    finally:
        if draft.exists():
            shutil.rmtree(draft)
        if replace and target.exists() and old.exists():
            shutil.rmtree(old)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Let one local process at a time into the block. The kernel releases the lock when its holder dies.

    A filesystem without locks lets everyone in, with a warning. The lock file is made in a folder that exists.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _log.warning("the filesystem of %s has no locks: let only one process at a time write there", path)
        yield
    finally:
        os.close(handle)


@contextmanager
def one_writer(location: Location) -> Iterator[None]:
    """Hold the lock of a location, so that looking for a file and writing it are one action among local processes.

    Remote locations have no lock. There the later of two writers of the same run wins, with an equal row.

    Raises:
        UserError: The folder cannot be made or written.
    """
    if location.kind != "local":
        yield
        return
    try:
        os.makedirs(location.root, exist_ok=True)
        os.close(os.open(os.path.join(location.root, ".lock"), os.O_RDWR | os.O_CREAT, 0o666))
    except OSError as error:
        raise UserError(f"store {location.uri} cannot be written: {error.strerror or error}") from error
    with locked(os.path.join(location.root, ".lock")):
        yield


def _upload(location: Location, path: str, data: bytes) -> None:
    if location.kind != "object":
        location.filesystem.create_dir(path.rpartition("/")[0], recursive=True)
    with location.filesystem.open_output_stream(path) as stream:
        stream.write(data)


def _write_and_rename(temporary: str, path: str, data: bytes) -> None:
    """Write a local file under a temporary name and rename it. After a power cut, too, its name leads to all of it."""
    for folder in (temporary, path):
        _make_folder(Path(folder).parent)
    with open(temporary, "xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    _sync(Path(path).parent)


def _make_folder(folder: Path) -> None:
    """Make a folder whose name, and the names of the folders above it, survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
