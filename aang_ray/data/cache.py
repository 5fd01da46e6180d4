"""The cache on disk. Its folders are named by a hash of the content that they were made from."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from aang_ray.errors import UserError
from aang_ray.store.files import locked, new_folder, write_file

# Below this size, hashing a file takes no longer than finding its digest in the cache.
_SMALL_BYTES = 1 << 20


def cache_folder() -> Path:
    """Return the folder of fetched and prepared data: the environment's `AANG_CACHE`, or `~/.cache/aang_ray`.

    Raises:
        UserError: if the folder cannot be made.
    """
    try:
        folder = Path(os.environ.get("AANG_CACHE") or "~/.cache/aang_ray").expanduser().absolute()
    except RuntimeError as error:  # there is no such user, or this one has no home
        raise UserError("there is no home folder for the cache: set AANG_CACHE to a folder") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be made ({error.strerror}): set AANG_CACHE to another"
        ) from error
    return folder


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """Return the folder `target`; if it does not exist, `make` fills a folder that then takes its place.

    Of several processes one makes it, and the others wait. Where the filesystem has no locks each makes its own, and
    the first to end wins.
    """
    if not target.is_dir():
        lock = cache_folder() / "locks" / content_key({"made": str(target)})
        try:
            for folder in (lock.parent, target.parent):
                folder.mkdir(parents=True, exist_ok=True)
            lock.touch()
        except OSError as error:
            raise UserError(
                f"the cache folder {cache_folder()} lacks {target.name} and cannot be written ({error.strerror}): "
                "set AANG_CACHE to another"
            ) from error
        with locked(lock):
            if not target.is_dir():
                with new_folder(target) as draft:
                    make(draft)
    return target


def content_key(value: Mapping[str, Any]) -> str:
    """Return the first 32 hex digits of the SHA-256 of a JSON value. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content; that of a large file is cached by path, size and times of change."""
    status = path.stat()
    if status.st_size <= _SMALL_BYTES:
        return _sha256(path)
    state = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    note = cache_folder() / "digests" / f"{content_key({'state': state})}.txt"
    if note.is_file():
        return note.read_text(encoding="ascii")
    digest = _sha256(path)
    with suppress(OSError):  # a note only saves time, and a cache that others have filled may be read-only
        note.parent.mkdir(exist_ok=True)
        write_file(note, digest.encode("ascii"))
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
