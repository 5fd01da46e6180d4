"""Making a file visible whole or not at all, and one writer of a store at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from pyarrow import fs

from aang_ray.errors import UserError
from aang_ray.store.location import Location

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
