"""What is told of data that can be used but are suspicious, and what `bad_rows` leaves out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data import EndTask, load_end_task
from aang_ray.errors import UserError
from tests.data.conftest import DEV, TEST, TRAIN, rows_of


def load(encoder: EncoderConfig, path: Path, **settings: str) -> EndTask:
    return load_end_task(DataConfig.model_validate({"task": str(path), **settings}), encoder)


def test_good_data_have_no_warnings(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    assert load(encoder, folder()).manifest["warnings"] == []


def test_suspicious_data(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    train = [*TRAIN, *rows_of(("dull film", "Pos"), ("bright film", "nan"), ("GOOD film", "neg"), ("not bad", "neg  "))]
    assert load(encoder, folder(train=train)).manifest["warnings"] == [
        "'nan' is a class: is it a label that is missing?",
        "labels that differ only by case or spaces are different classes: 'Pos', 'pos'",
        "labels that differ only by case or spaces are different classes: 'neg', 'neg  '",
        "train has 1 texts with contradicting labels, the first is 'good film' (neg, pos)",
        "dev has no example of 'Pos', 'nan', 'neg  ': it cannot tell how well they do",
    ]


def test_columns_that_are_the_same(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    path = folder(train=TRAIN[:3], dev=TRAIN[:2], test=TRAIN[:3])
    warnings = load(encoder, path, text_b="text").manifest["warnings"]
    assert warnings == ["data.text_b is also another column of the task, 'text'"]
    warnings = load(encoder, path, label="text").manifest["warnings"]
    assert warnings[0] == "the text and the label are the same column, 'text'"


def test_bad_rows_can_be_left_out(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    bad = [{"text": " ", "label": "pos"}, {"text": "a", "label": None}, {"text": "b", "label": 0.5}]
    path = folder(train=[*TRAIN, *bad], dev=[*DEV, *rows_of(("dull plot", "new"))])
    with pytest.raises(UserError) as caught:
        load(encoder, path)
    assert str(caught.value) == (
        f"{path}/train.jsonl: row 5 has an empty text (column 'text'); row 6 has no label (column 'label'); row 7 has "
        "a label of type float (column 'label'); a label is a string, an integer or a boolean; multi-label tasks and "
        "regression are not supported (data.bad_rows=drop leaves such rows out)"
    )
    task = load(encoder, path, bad_rows="drop")
    assert (len(task.train), len(task.dev), len(task.test)) == (len(TRAIN), len(DEV), len(TEST))
    assert task.manifest["warnings"][0].startswith("4 rows are left out (data.bad_rows=drop)")
    whole = load(encoder, folder("whole"))
    assert task.train.tokens.values.tolist() == whole.train.tokens.values.tolist()


def test_a_run_that_drops_rows_has_a_name_of_its_own() -> None:
    assert DataConfig(bad_rows="drop").named_settings() == {**DataConfig().named_settings(), "bad_rows": "drop"}
    assert "bad_rows" not in DataConfig().named_settings()


@pytest.mark.parametrize("layout", ["splits", "one", "parquet"])
def test_folders_that_the_library_datasets_has_written(
    encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path, layout: str
) -> None:
    """A dictionary of splits, one data set, and the layout of the Hub."""
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    parts = {
        split: datasets.Dataset.from_list([dict(row) for row in rows], features=names)
        for split, rows in (("train", TRAIN), ("validation", DEV), ("test", TEST))
    }
    path = tmp_path / "saved"
    if layout == "splits":
        datasets.DatasetDict(parts).save_to_disk(path)
    elif layout == "one":
        datasets.concatenate_datasets(list(parts.values())).save_to_disk(path)
    else:
        (path / "data").mkdir(parents=True)
        for split, part in parts.items():
            half = len(part) // 2
            for number, rows in enumerate((range(half), range(half, len(part)))):
                part.select(rows).to_parquet(path / "data" / f"{split}-{number:05d}-of-00002.parquet")
    task = load(encoder, path)
    assert task.label_names == ("neg", "pos")
    if layout != "one":
        whole = load(encoder, folder())
        assert task.train.tokens.values.tolist() == whole.train.tokens.values.tolist()
        assert (len(task.dev), len(task.test)) == (len(DEV), len(TEST))
    before = task.manifest["data"]
    (next(path.rglob("*.arrow"), None) or next(path.rglob("*.parquet"))).touch()
    assert load(encoder, path).manifest["data"] == before


def test_a_saved_folder_that_is_damaged(encoder: EncoderConfig, tmp_path: Path) -> None:
    (tmp_path / "saved" / "data").mkdir(parents=True)
    (tmp_path / "saved" / "data" / "train-00000-of-00001.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="could not be read as a saved dataset"):
        load(encoder, tmp_path / "saved")
