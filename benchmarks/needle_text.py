"""The planted data of `needle.py`: labelled sets of texts of which it is known how much their labels can help.

All texts come from the archive of the task `movie` (Hutto & Gilbert 2014). No text of a set is in a split of `movie`.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from aang_ray.data.embedded import Snippet, fetch_sdist, parse_snippets, read_embedded
from aang_ray.data.read import SPLITS
from aang_ray.data.splits import normalised

ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {"movie": "movieReviewSnippets_GroundTruth.txt", "amazon": "amazonReviewSnippets_GroundTruth.txt"}
GRADED_SIZE = 450
"""Texts of a set of a graded space."""
THRESHOLD = 0.5
"""Snippets with a weaker rating have no label, as in the task `movie`."""


def labelled_texts(source: str) -> list[tuple[str, str]]:
    """Return the rated texts of a file of the archive, each once, with the sign of its rating; none of `movie`'s."""
    raw = read_embedded("movie")
    seen = set().union(*(raw.splits[split].texts.keys() for split in SPLITS))
    found = []
    for snippet in _snippets(FILES[source]):
        key = normalised(snippet.text)
        if abs(snippet.rating) >= THRESHOLD and key not in seen:
            seen.add(key)
            found.append((snippet.text, "positive" if snippet.rating > 0 else "negative"))
    return found


def _snippets(name: str) -> Iterator[Snippet]:
    with tarfile.open(fetch_sdist()) as outer:
        member = next(m for m in outer.getmembers() if m.name.endswith(f"/{ARCHIVE}"))
        file = outer.extractfile(member)
        assert file is not None
        inner = file.read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith(f"/{name}"))
        file = archive.extractfile(member)
        assert file is not None
        yield from parse_snippets(file.read().decode("utf-8"))


def write_set(folder: Path, texts: list[tuple[str, str]], noise: float, seed: int) -> None:
    """Write a labelled set; a share `noise` of its labels is replaced by the other label.

    With `noise` 0.5 the labels carry no information about the texts.
    """
    rng = np.random.default_rng(seed)
    flipped = rng.random(len(texts)) < noise
    other = {"positive": "negative", "negative": "positive"}
    lines = [
        json.dumps({"text": text, "label": other[label] if flip else label})
        for (text, label), flip in zip(texts, flipped, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    # A folder needs dev and test, which an auxiliary set does not use.
    for split, part in (("train", lines[:-2]), ("dev", lines[-2:-1]), ("test", lines[-1:])):
        (folder / f"{split}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


def write_text_sets(folder: Path, noises: Sequence[int], seed: int) -> list[str]:
    """Write the planted sets of a space, unless they exist.

    A set with true labels gets 2,000 movie snippets, divided among all such sets. Every other set of the spaces with
    junk gets 500 movie and 500 Amazon snippets. In a graded space all sets have equally many texts, half of each noise
    level's sets are movie snippets and half Amazon snippets.

    Args:
        folder: Folder of the space and seed.
        noises: For every set the percentage of wrong labels; 99: all labels are random.
        seed: Seed of the choice of texts and of the wrong labels.

    Returns:
        The names of the sets, which are folders in `folder`.
    """
    names = [f"set{i:02d}" for i in range(len(noises))]
    if all((folder / name / "test.jsonl").is_file() for name in names):
        return names
    rng = np.random.default_rng(seed)
    pools = {source: _shuffled(labelled_texts(source), rng) for source in FILES}
    graded = 99 not in noises
    helpful = 2000 // max(1, noises.count(0))
    for i, (name, noise) in enumerate(zip(names, noises, strict=True)):
        if graded:
            source = "movie" if i % 2 == 0 else "amazon"
            texts, pools[source] = pools[source][:GRADED_SIZE], pools[source][GRADED_SIZE:]
        elif noise == 0:
            texts, pools["movie"] = pools["movie"][:helpful], pools["movie"][helpful:]
        else:
            texts = _shuffled([text for pool in pools.values() for text in _shuffled(pool, rng)[:500]], rng)
        write_set(folder / name, texts, 0.5 if noise == 99 else noise / 100, 100 * seed + i)
    return names


def _shuffled(texts: list[tuple[str, str]], rng: np.random.Generator) -> list[tuple[str, str]]:
    return [texts[i] for i in rng.permutation(len(texts))]
