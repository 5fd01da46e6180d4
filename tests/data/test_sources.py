"""What `data.task` may name: built-in tasks, folders, files and datasets of the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from aang_ray.config import DataConfig
from aang_ray.data.read import Table
from aang_ray.data.sources import Source, find_source, hub_tables, read_hub
from aang_ray.data.tasks import CARDS, card_of
from aang_ray.errors import UserError


def test_cards_have_the_values_of_the_paper() -> None:
    """Metric, classes and batch sizes of docs/semantics.md, section 4."""
    expected = {
        "citation_intent": ("macro_f1", 6, 128, 256, 32),
        "sciie": ("macro_f1", 7, 128, 256, 32),
        "chemprot": ("accuracy", 13, 128, 256, 32),
        "se2016": ("accuracy", 3, 128, 256, 32),
        "hyperpartisan": ("accuracy", 2, 64, 128, 8),
        "movie": ("accuracy", 2, 32, 48, 32),
        "tweets": ("accuracy", 2, 32, 48, 32),
        "amazon": ("accuracy", 2, 32, 48, 32),
        "nyt": ("accuracy", 2, 32, 48, 32),
        "digits-left": ("accuracy", 10, 256, 256, 32),
        "digits-right": ("accuracy", 10, 256, 256, 32),
    }
    assert expected == {
        name: (c.metric, c.classes, c.batch_end_task, c.batch_auxiliary, c.batch_dev_head) for name, c in CARDS.items()
    }


def test_a_folder_takes_the_card_of_its_name(folder: Callable[..., Path]) -> None:
    assert card_of(DataConfig(task=str(folder("sciie")))) is CARDS["sciie"]
    assert card_of(DataConfig(task="stance")) is CARDS["se2016"]
    assert card_of(DataConfig(task=str(folder("mine")))) is None


def test_built_in_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Callable[..., Path]) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_source(DataConfig(task="movie")).kind == "embedded"
    with pytest.raises(UserError, match=r"'chemprot' are not part .*Kringelum.*give a folder called chemprot"):
        find_source(DataConfig(task="chemprot"))
    folder("chemprot")
    assert find_source(DataConfig(task="chemprot")).kind == "folder"


def test_a_folder_its_splits_and_its_corpora(folder: Callable[..., Path]) -> None:
    path = folder("mine", dev=None)
    (path / "validation.csv").write_text("text,label\na,x\n")
    (path / "domain.txt").write_text("a\n")
    (path / "out_of_domain.parquet").write_text("")
    source = find_source(DataConfig(task=str(path)))
    assert (source.kind, source.name) == ("folder", "mine")
    assert {split: file.name for split, file in source.splits.items()} == {
        "train": "train.jsonl",
        "dev": "validation.csv",
        "test": "test.jsonl",
    }
    assert {kind: file.name for kind, file in source.corpora.items()} == {
        "in_domain": "domain.txt",
        "out_of_domain": "out_of_domain.parquet",
    }
    other = path / "other.txt"
    other.write_text("b\n")
    assert find_source(DataConfig(task=str(path), in_domain=str(other))).corpora["in_domain"] == other


def test_hub_ids() -> None:
    source = find_source(DataConfig(task="owner/name:part@v1"))
    assert (source.kind, source.hub) == ("hub", ("owner/name", "part", "v1"))
    assert find_source(DataConfig(task="imdb")).hub == ("imdb", None, "main")


@pytest.mark.parametrize("task", ["./nothing", "/no/where", "a/b/c", "nothing.csv", "~/nothing", ""])
def test_paths_that_do_not_exist(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no file or folder"):
        find_source(DataConfig(task=task))


def test_errors_about_folders_and_corpora(folder: Callable[..., Path], tmp_path: Path) -> None:
    path = folder("one", test=None)
    with pytest.raises(UserError, match=r"the split test is missing .*found: dev.jsonl, train.jsonl"):
        find_source(DataConfig(task=str(path)))
    (path / "test.jsonl").write_text("")
    (path / "train.csv").write_text("")
    with pytest.raises(UserError, match=r"only one of train.jsonl, train.csv"):
        find_source(DataConfig(task=str(path)))
    with pytest.raises(UserError, match=r"data.in_domain: there is no file"):
        find_source(DataConfig(task="movie", in_domain=str(tmp_path / "no.txt")))
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(UserError, match=r"data.out_of_domain: not a .txt, .jsonl, .csv, .parquet file"):
        find_source(DataConfig(task="movie", out_of_domain=str(tmp_path / "a.pdf")))
    with pytest.raises(UserError, match=r"a.pdf is not a .jsonl, .csv, .parquet file"):
        find_source(DataConfig(task=str(tmp_path / "a.pdf")))


def dataset(labels: list[int]) -> datasets.Dataset:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    texts = [f"text {i}" for i in range(len(labels))]
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def test_usual_split_names_and_class_label_names() -> None:
    loaded = {"train": dataset([0, 1]), "validation": dataset([1]), "test": dataset([-1])}
    tables = hub_tables("a/b", loaded, ["text", "label"])
    assert isinstance(tables, dict)
    assert tables["train"].columns == {"text": ["text 0", "text 1"], "label": ["no", "yes"]}
    # -1 is the Hub's "no label"; the check of labels refuses None.
    assert tables["test"].columns["label"] == [None]


def test_a_single_split_is_one_labelled_table() -> None:
    assert isinstance(hub_tables("a/b", {"train": dataset([0, 1])}, ["text"]), Table)


def test_missing_splits_and_columns_of_the_hub() -> None:
    with pytest.raises(UserError, match=r"a/b: the split dev is missing .*found: train, test"):
        hub_tables("a/b", {"train": dataset([0]), "test": dataset([0])}, ["text"])
    with pytest.raises(UserError, match="no column 'sentence'; columns found: text, label"):
        hub_tables("a/b", {"train": dataset([0])}, ["sentence"])


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(
        UserError,
        match=r"data.task 'moovie': no dataset 'moovie' .*built-in task \(movie, tweets, .*digits-left, digits-right\)",
    ):
        read_hub(Source("hub", "moovie", "moovie", {}, {}), ["text", "label"])
