"""An end task as the rest of the program sees it: tokens, labels, metric, splits, unlabelled text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from aang_ray.config import DataConfig
from aang_ray.data.cache import cache_folder
from aang_ray.data.embedded import read_embedded
from aang_ray.data.pretrained import first_line, looks_like_path, require_on_hub
from aang_ray.data.read import (
    SPLITS,
    SUFFIXES,
    LabelledTexts,
    RawTask,
    Split,
    Table,
    labelled_texts,
    read_lines,
    read_table,
    require_columns,
    text_column,
    wanted_columns,
)
from aang_ray.data.splits import SPLIT_METHOD, split_one
from aang_ray.errors import UserError

Metric = Literal["accuracy", "macro_f1"]
Corpus = Literal["in_domain", "out_of_domain", "neural_lm"]


@dataclass(frozen=True)
class Ragged:
    """N token sequences of different lengths, memory-mapped and read-only.

    Sequence i is `values[offsets[i]:offsets[i + 1]]`; special tokens are included.
    """

    values: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    capitals: npt.NDArray[np.bool_] | None = None
    """Of every value: whether its first letter in the raw text is upper-case, whatever the tokenizer makes of it."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        return np.diff(self.offsets)

    def take(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The chosen sequences end to end, and their lengths."""
        return self.values[self._places(indices)], self.offsets[indices + 1] - self.offsets[indices]

    def take_capitals(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_] | None:
        """`capitals` of the chosen sequences end to end."""
        return None if self.capitals is None else self.capitals[self._places(indices)]

    def _places(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        starts = self.offsets[indices]
        lengths = self.offsets[indices + 1] - starts
        ends = np.cumsum(lengths)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        places: npt.NDArray[np.int64] = np.repeat(starts, lengths) + within
        return places


@dataclass(frozen=True)
class Labelled:
    """A split: tokens and the index of each text's label in the sorted label set."""

    tokens: Ragged
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: npt.NDArray[np.int64]) -> Labelled:
        """The chosen texts, in memory."""
        values, lengths = self.tokens.take(indices)
        ragged = Ragged(values, np.concatenate(([0], np.cumsum(lengths))), self.tokens.take_capitals(indices))
        return Labelled(ragged, self.labels[indices])


@dataclass(frozen=True)
class External:
    """Another data set, whose labels serve as an auxiliary objective."""

    label_names: tuple[str, ...]
    train: Labelled


@dataclass(frozen=True)
class EndTask:
    """Everything that a run reads of its end task."""

    name: str
    label_names: tuple[str, ...]
    """The sorted label set, frozen in the manifest and stated to the metric."""
    metric: Metric
    train: Labelled
    dev: Labelled
    test: Labelled
    test_clean: npt.NDArray[np.int64]
    """Indices of the test texts that occur neither in train nor in dev."""
    corpora: Mapping[Corpus, Ragged]
    """Unlabelled text by kind; a kind that was not given is absent."""
    class_weights: npt.NDArray[np.float32] | None
    """Weight of each class in the end-task loss, or None for equal ones."""
    external: Mapping[str, External] = field(default_factory=dict)
    """Other data sets by name."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    """What was read, how it was split, what was truncated: JSON values."""


# --- data.cards: What is known beforehand of the end tasks that have a name: metric, classes, batch sizes, origin.


_DSP = "the repository of Gururangan et al. 2020 (allenai/dont-stop-pretraining) names its download"
_VADER = "fetched with pip from the source distribution of vaderSentiment 3.3.2"


@dataclass(frozen=True)
class Card:
    """Defaults and origin of a named end task (semantics section 4, first table)."""

    name: str
    domain: str
    metric: Metric
    classes: int
    """Labels that the published splits have."""
    origin: str
    """Who made the data."""
    source: str
    """How to get them."""
    batch_end_task: int = 128
    batch_auxiliary: int = 256
    batch_dev_head: int = 32
    embedded: bool = False
    """Whether the program fetches the data by itself."""
    images: bool = False
    """Whether the examples are images."""


_PAPER = (
    Card("citation_intent", "computer science", "macro_f1", 6, "ACL-ARC, Jurgens et al. 2018", _DSP),
    Card("sciie", "computer science", "macro_f1", 7, "SciERC relations, Luan et al. 2018", _DSP),
    Card("chemprot", "biomedicine", "accuracy", 13, "ChemProt, Kringelum et al. 2016", _DSP),
    Card(
        "se2016", "tweets", "accuracy", 3, "SemEval-2016 task 6 (stance), Mohammad et al. 2016", "SemEval-2016, task 6"
    ),
    Card(
        "hyperpartisan",
        "news",
        "accuracy",
        2,
        "SemEval-2019 task 4 (hyperpartisan news), Kiesel et al. 2019",
        _DSP,
        batch_end_task=64,
        batch_auxiliary=128,
        batch_dev_head=8,
    ),
)
_EMBEDDED = tuple(
    Card(name, domain, "accuracy", 2, "Hutto & Gilbert 2014 (MIT licence)", _VADER, 32, 48, 32, embedded=True)
    for name, domain in (("movie", "movie reviews"), ("tweets", "tweets"))
)
_DIGITS = tuple(
    Card(
        f"digits-{side}",
        "superimposed digits",
        "accuracy",
        10,
        "Alpaydin & Kaynak 1998 (UCI), paired as in MultiMNIST",
        "made from the digits that scikit-learn ships",
        batch_end_task=256,
        batch_auxiliary=256,
        images=True,
    )
    for side in ("left", "right")
)
_ALIASES = {
    "stance": "se2016",
    "hyperpartisan_news": "hyperpartisan",
    "acl_arc": "citation_intent",
    "digits": "digits-left",
}

CARDS: Mapping[str, Card] = MappingProxyType({card.name: card for card in (*_EMBEDDED, *_PAPER, *_DIGITS)})
"""The named end tasks."""


def card_named(name: str) -> Card | None:
    """The card of a name or one of its aliases (`stance`, `acl_arc`, `hyperpartisan_news`, `digits`)."""
    return CARDS.get(_ALIASES.get(name, name))


def card_of(data: DataConfig) -> Card | None:
    """The card whose defaults the end task takes: named itself, or by the last part of its folder."""
    return card_named(data.task) or card_named(Path(data.task).expanduser().absolute().name)


# --- data.source: What `data.task` names, and the files that belong to it.


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


# --- data.hub_task: An end task that is a dataset on the Hugging Face Hub.


def read_hub(source: Source, wanted: Sequence[str]) -> dict[Split, Table] | Table:
    """The three splits of a Hub dataset, or the single table of one that has a single split.

    Raises:
        UserError: where it cannot be loaded, lacks a split or a column.
    """
    import datasets

    name, configuration, revision = source.hub
    texts, images = (", ".join(n for n, card in CARDS.items() if card.images is kind) for kind in (False, True))
    instead = f"give a folder, a file or a built-in task ({texts}; of images: {images})"
    require_on_hub("dataset", name, revision, instead)
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    folder = str(cache_folder() / "datasets")
    try:
        loaded = datasets.load_dataset(name, configuration, revision=revision, cache_dir=folder)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data.task: the dataset {source.place!r} could not be loaded ({first_line(error)})") from error
    return hub_tables(source.place, loaded, wanted)


def hub_tables(where: str, loaded: Mapping[str, Any], wanted: Sequence[str]) -> dict[Split, Table] | Table:
    """Tables of a mapping from split names to `datasets.Dataset`.

    Raises:
        UserError: for a split or a column that is missing.
    """
    if len(loaded) == 1:
        return _table(where, next(iter(loaded.values())), wanted)
    tables: dict[Split, Table] = {}
    for split, names in SPLIT_NAMES.items():
        called = next((name for name in names if name in loaded), None)
        if called is None:
            raise UserError(f"{where}: the split {split} is missing ({' or '.join(names)}); found: {', '.join(loaded)}")
        tables[split] = _table(f"{where} {called}", loaded[called], wanted)
    return tables


def _table(where: str, dataset: Any, wanted: Sequence[str]) -> Table:
    """Columns as values; class labels by their names, -1 (no label) as None."""
    require_columns(where, wanted, dataset.column_names)
    columns: dict[str, list[Any]] = dataset.select_columns(list(wanted)).to_dict()
    for name in wanted:
        class_names = getattr(dataset.features[name], "names", None)
        if class_names is not None:
            columns[name] = [None if v is None or v < 0 else class_names[v] for v in columns[name]]
    return Table(where, columns, list(range(1, len(dataset) + 1)))


# --- data.read: An end task's texts from wherever they lie, checked, and its unlabelled text.


def read_task(source: Source, data: DataConfig) -> RawTask:
    """Train, dev and test of an end task.

    Raises:
        UserError: for anything wrong with the data, with the file and the row.
    """
    if source.kind == "embedded":
        if data.text_b is not None:
            raise UserError(f"data.text_b: {source.name} has one text an example; leave it out")
        return read_embedded(source.name)
    wanted = wanted_columns(data)
    if source.kind == "folder":
        tables = {split: read_table(path, wanted) for split, path in source.splits.items()}
        return RawTask({split: labelled_texts(table, data) for split, table in tables.items()}, "given")
    found = read_table(Path(source.place), wanted) if source.kind == "file" else read_hub(source, wanted)
    if isinstance(found, Table):
        return _split(labelled_texts(found, data), data)
    return RawTask({split: labelled_texts(table, data) for split, table in found.items()}, "given")


def read_passages(path: Path, column: str) -> list[str]:
    """Unlabelled text: the lines of a .txt file, or the text column of a table.

    Raises:
        UserError: for a file that cannot be read, has no such column, or an empty text in a table.
    """
    if path.suffix.lower() == ".txt":
        return text_column(read_lines(path), "text")
    return text_column(read_table(path, [column]), column)


def _split(whole: LabelledTexts, data: DataConfig) -> RawTask:
    train, dev, test = split_one(
        whole.texts.keys(), whole.labels, data.dev_fraction, data.test_fraction, data.split_seed
    )
    parts = {"train": whole.take(train), "dev": whole.take(dev), "test": whole.take(test)}
    return RawTask({split: parts[split] for split in ("train", "dev", "test")}, SPLIT_METHOD)
