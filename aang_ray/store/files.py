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
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pyarrow as pa
from pyarrow import fs

from aang_ray.config.load import kind_of
from aang_ray.errors import UserError

Kind = Literal["local", "renaming", "object"]

# On an object store a file appears when its upload has ended, and renaming is a copy.
_OBJECT_STORES = {"s3", "s3a", "gcs", "gs", "abfs", "abfss", "adl", "az", "oss", "r2", "oci"}

TEMPORARY = ".tmp-"
"""Names of unfinished files begin with this."""
ANSWER_SECONDS = 20.0
"""How long a remote store may take to answer for the first time: with the start of the program, under half a minute."""
RETRY_SECONDS = 10.0
"""How long the driver of Google Cloud Storage tries again, unless the URI says otherwise. Its own choice is 15 min."""
LEFTOVER_AGE = timedelta(hours=1)
"""Unfinished files that are older belong to processes that were killed."""
_ASKING = "asks a store"
"""Name of the threads that open remote stores."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}

_log = logging.getLogger(__name__)


class NotWritten(OSError):
    """A file could not be written, for example on a full disk. The message names the file and says why."""


def is_disk_failure(error: BaseException) -> bool:
    """Return whether an error means that a disk or a store takes no more files, so that trying again is of no use."""
    return isinstance(error, NotWritten) or (isinstance(error, OSError) and error.errno in _FULL)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `NotWritten` that names the path."""
    try:
        yield
    except NotWritten:
        raise
    except OSError as error:
        raise NotWritten(f"{path} cannot be written: {error.strerror or _line(error)}") from error


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
        UserError: The URI is unknown or may not be read, its bucket does not exist, the root is a file, or a remote
            store does not answer.
    """
    if not (isinstance(uri, str) and "://" in uri):
        return _checked(_local(uri))
    # On a thread of its own, because the drivers of some stores try again for many minutes, deaf to Ctrl-C.
    answer: Future[Location] = Future()

    def ask() -> None:
        try:
            answer.set_result(_checked(_remote(uri)))
        except BaseException as error:  # noqa: BLE001 (raised again by the thread that waits for the answer)
            answer.set_exception(error)

    threading.Thread(target=ask, name=_ASKING, daemon=True).start()
    try:
        return answer.result(ANSWER_SECONDS)
    except TimeoutError:
        raise UserError(
            f"store {uri} does not answer within {ANSWER_SECONDS:g} s; check the network and the credentials"
        ) from None


def still_asking() -> bool:
    """Return whether a driver still waits for a store that nobody waits for any more.

    The driver of S3 then waits at the end of the process, too, for minutes.
    """
    return any(thread.name == _ASKING for thread in threading.enumerate())


def _checked(location: Location) -> Location:
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


def _local(path: str | Path) -> Location:
    if not str(path):
        raise UserError("the store's location is empty; give a folder or a URI such as s3://bucket/folder")
    root = os.path.abspath(os.path.expanduser(path))
    above = next(place for place in (Path(root), *Path(root).parents) if place.exists())
    if not above.is_dir():
        raise UserError(f"store {root}: {above} is {kind_of(above)}; a store is a folder")
    return Location(root, fs.LocalFileSystem(), root, "local")


def _remote(uri: str) -> Location:
    scheme = uri.partition("://")[0].lower()
    patient = scheme in ("gs", "gcs") and "retry_limit_seconds=" not in uri
    try:
        retries = f"{'&' if '?' in uri else '?'}retry_limit_seconds={RETRY_SECONDS:g}" if patient else ""
        filesystem, root = fs.FileSystem.from_uri(uri + retries)
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
    """Return the first line of an error's message; of one that is longer than anybody reads, the first sentence."""
    line = str(error).strip().partition("\n")[0].rstrip(".")
    if len(line) > 300:
        line = line.partition(". ")[0]
    return line if len(line) <= 300 else f"{line[:300]} ..."


def publish(location: Location, path: str, data: bytes) -> None:
    """Write a file, or replace it, so that readers see all of the old content or all of the new.

    Where renaming is atomic, the bytes first go to a temporary name in the root; readers look into subfolders only.

    Raises:
        NotWritten: The disk is full, the folder is read-only, the bucket refuses, or the like.
    """
    temporary = location.path(f"{TEMPORARY}{uuid.uuid4().hex}")
    with naming(path):
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
    """Delete the temporary files in the root whose processes were killed.

    Who writes a local file holds its lock from the first byte on. Where that tells nothing, age does.
    """
    if location.kind == "object":
        return  # there are no temporary names
    oldest = datetime.now(UTC) - LEFTOVER_AGE
    for info in location.filesystem.get_file_info(fs.FileSelector(location.root, allow_not_found=True)):
        if not info.base_name.startswith(TEMPORARY):
            continue
        abandoned = location.kind == "local" and info.size and _is_unlocked(info.path)
        if abandoned or (info.mtime is not None and info.mtime < oldest):
            with suppress(FileNotFoundError):  # its writer has just renamed it, or another process was quicker
                location.filesystem.delete_file(info.path)


def _is_unlocked(path: str) -> bool:
    try:
        with open(path, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:  # somebody has the lock, the file is gone, or the filesystem has no locks
        return False
    return True


def write_file(path: Path, data: bytes) -> None:
    """Write a local file, or replace it, so that readers see all of the old content or all of the new.

    Raises:
        NotWritten: As `publish`.
    """
    with naming(path):
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
        NotWritten: The folder cannot be made or written.
    """
    if location.kind != "local":
        yield
        return
    with naming(f"store {location.uri}"):
        os.makedirs(location.root, exist_ok=True)
        os.close(os.open(os.path.join(location.root, ".lock"), os.O_RDWR | os.O_CREAT, 0o666))
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
    try:
        with open(temporary, "xb") as stream:
            with suppress(OSError):  # where there are no locks, `remove_leftovers` goes by age
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)  # on a full disk its part would take the place of something useful
        raise
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
