"""The cache on disk: what is in it is whole, and is named by the content that it was made from."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aang_ray.errors import UserError

# Below this size, hashing is as fast as looking the hash up.
_SMALL_BYTES = 1 << 20
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}


def cache_folder() -> Path:
    """Where fetched and prepared data lie: the environment's `AANG_CACHE`, else `~/.cache/aang_ray`.

    Raises:
        UserError: where the folder cannot be made.
    """
    given = os.environ.get("AANG_CACHE")
    folder = Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "aang_ray"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache folder {folder} cannot be made ({error.strerror}): set AANG_CACHE to another"
        ) from error
    return folder


def made_once(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder `target`, which `make` fills where it is not there yet; of several processes one does, others wait.

    The kernel lets go of the lock when its holder dies. Where the filesystem has no locks each makes its own, and the
    first to end wins.
    """
    if not target.is_dir():
        locks = cache_folder() / "locks"
        locks.mkdir(exist_ok=True)
        with (locks / content_key({"made": str(target)})).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
            if not target.is_dir():
                with building(target) as draft:
                    make(draft)
    return target


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends, and goes away if it fails.

    Several processes may build the same target at once: the first to end wins, the others discard
    theirs, which holds the same content.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    draft.chmod(0o755)
    try:
        yield draft
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        if draft.exists():
            shutil.rmtree(draft)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    os.replace(name, path)


def content_key(value: Mapping[str, Any]) -> str:
    """SHA-256, in 32 hex digits, of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content.

    Remembered for large files by path, size and the times of the last change of content and status,
    so that asking again reads nothing.
    """
    status = path.stat()
    if status.st_size <= _SMALL_BYTES:
        return _sha256(path)
    state = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    note = cache_folder() / "digests" / f"{content_key({'state': state})}.txt"
    if note.is_file():
        return note.read_text(encoding="ascii")
    digest = _sha256(path)
    write_whole(note, digest.encode("ascii"))
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
