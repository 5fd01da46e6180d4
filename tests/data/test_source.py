"""What `data.task` may name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from aang_ray.config import DataConfig
from aang_ray.data.sources import find_source
from aang_ray.data.tasks import CARDS, card_of
from aang_ray.errors import UserError


def test_the_paper_s_table_4() -> None:
    """Metric, classes and batch of semantics section 4."""
    expected = {
        "citation_intent": ("macro_f1", 6, 128, 256, 32),
        "sciie": ("macro_f1", 7, 128, 256, 32),
        "chemprot": ("accuracy", 13, 128, 256, 32),
        "se2016": ("accuracy", 3, 128, 256, 32),
        "hyperpartisan": ("accuracy", 2, 64, 128, 8),
        "movie": ("accuracy", 2, 32, 48, 32),
        "tweets": ("accuracy", 2, 32, 48, 32),
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
def test_paths_that_are_not_there(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no file or folder"):
        find_source(DataConfig(task=task))


def test_complaints_about_folders_and_corpora(folder: Callable[..., Path], tmp_path: Path) -> None:
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
