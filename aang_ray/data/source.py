"""What `data.task` names, and the files that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aang_ray.config import DataConfig
from aang_ray.data.cards import CARDS, card_named
from aang_ray.data.pretrained import looks_like_path
from aang_ray.data.table import SUFFIXES
from aang_ray.data.task import Corpus
from aang_ray.data.texts import SPLITS, Split
from aang_ray.errors import UserError

SPLIT_NAMES: Mapping[Split, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid"),
    "test": ("test",),
}
"""What a split may be called in a folder or on the Hub."""
_CORPUS_NAMES: Mapping[Corpus, tuple[str, ...]] = {
    "in_domain": ("domain", "in_domain"),
    "out_of_domain": ("out_of_domain",),
}
_CORPUS_SUFFIXES = (".txt", *SUFFIXES)


@dataclass(frozen=True)
class Source:
    """Where an end task comes from."""

    kind: Literal["embedded", "folder", "file", "hub"]
    name: str
    """What the end task is called in results."""
    place: str
    """The folder, the file, the Hub id, or the built-in name."""
    splits: Mapping[Split, Path]
    """Files of the splits of a folder."""
    corpora: Mapping[Corpus, Path]
    """Files of unlabelled text: those named in the configuration, else those beside a folder's splits."""

    @property
    def hub(self) -> tuple[str, str | None, str]:
        """Name, configuration and revision of `NAME[:CONFIGURATION][@REVISION]` on the Hub."""
        rest, _, revision = self.place.partition("@")
        name, _, configuration = rest.partition(":")
        return name, configuration or None, revision or "main"


def find_source(data: DataConfig) -> Source:
    """Look up what `data.task` stands for, without reading it.

    Built-in names with embedded data come first, then folders and files, then the Hub.

    Raises:
        UserError: for a path that is not there, a folder without its three splits, a built-in name
            whose data have to be given, a corpus that is not there.
    """
    card, path = card_named(data.task), Path(data.task).expanduser()
    given = _given_corpora(data)
    if card is not None and card.embedded:
        return Source("embedded", card.name, card.name, {}, given)
    if data.task.strip() and path.is_dir():
        beside = {
            kind: file for kind in _CORPUS_NAMES if (file := _one_file(path, _CORPUS_NAMES[kind], _CORPUS_SUFFIXES))
        }
        named = card_named(path.absolute().name)
        name = named.name if named else path.absolute().name
        return Source("folder", name, str(path), _split_files(path), {**beside, **given})
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"data.task: {data.task} is not a {', '.join(SUFFIXES)} file")
        return Source("file", path.stem, str(path), {}, given)
    if card is not None:
        raise UserError(
            f"data.task: the data of {data.task!r} are not part of this program ({card.origin}; {card.source}): "
            f"give a folder called {card.name} with train, dev and test as .jsonl, .csv or .parquet"
        )
    if looks_like_path(data.task) or path.suffix.lower() in SUFFIXES:
        raise UserError(f"data.task: there is no file or folder {data.task}; built-in tasks: {', '.join(CARDS)}")
    return Source("hub", data.task, data.task, {}, given)


def _given_corpora(data: DataConfig) -> dict[Corpus, Path]:
    named: dict[Corpus, str | None] = {"in_domain": data.in_domain, "out_of_domain": data.out_of_domain}
    found: dict[Corpus, Path] = {}
    for kind, name in named.items():
        if name is None:
            continue
        path = found[kind] = Path(name).expanduser()
        if not path.is_file() or path.suffix.lower() not in _CORPUS_SUFFIXES:
            problem = "there is no file" if not path.is_file() else f"not a {', '.join(_CORPUS_SUFFIXES)} file:"
            raise UserError(f"data.{kind}: {problem} {name}")
    return found


def _split_files(folder: Path) -> dict[Split, Path]:
    files: dict[Split, Path] = {}
    for split in SPLITS:
        file = _one_file(folder, SPLIT_NAMES[split], SUFFIXES)
        if file is None:
            found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
            names = " or ".join(f"{split}{suffix}" for suffix in SUFFIXES)
            raise UserError(f"{folder}: the split {split} is missing ({names}); found: {found}")
        files[split] = file
    return files


def _one_file(folder: Path, names: tuple[str, ...], suffixes: tuple[str, ...]) -> Path | None:
    found = [path for name in names for suffix in suffixes if (path := folder / f"{name}{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(
            f"{folder}: only one of {', '.join(path.name for path in found)} can be meant; take away the others"
        )
    return found[0] if found else None
