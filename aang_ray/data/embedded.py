"""The embedded end tasks: rated English snippets of Hutto & Gilbert 2014, made into labelled splits."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aang_ray.data.duplicates import normalised
from aang_ray.data.fetch import fetch_sdist
from aang_ray.data.splits import text_rank
from aang_ray.data.texts import LabelledTexts, RawTask, Split, Texts

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
