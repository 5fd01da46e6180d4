"""Datasets of the Hub, as `datasets` hands them over."""

from __future__ import annotations

import datasets
import pytest

from aang_ray.data.read import Table
from aang_ray.data.sources import Source, hub_tables, read_hub
from aang_ray.errors import UserError


def dataset(labels: list[int]) -> datasets.Dataset:
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    texts = [f"text {i}" for i in range(len(labels))]
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


def test_splits_by_their_usual_names_and_labels_by_theirs() -> None:
    loaded = {"train": dataset([0, 1]), "validation": dataset([1]), "test": dataset([-1])}
    tables = hub_tables("a/b", loaded, ["text", "label"])
    assert isinstance(tables, dict)
    assert tables["train"].columns == {"text": ["text 0", "text 1"], "label": ["no", "yes"]}
    # The Hub's -1 is "not labelled", which validation then complains of.
    assert tables["test"].columns["label"] == [None]


def test_a_single_split_is_one_labelled_table() -> None:
    assert isinstance(hub_tables("a/b", {"train": dataset([0, 1])}, ["text"]), Table)


def test_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"a/b: the split dev is missing .*found: train, test"):
        hub_tables("a/b", {"train": dataset([0]), "test": dataset([0])}, ["text"])
    with pytest.raises(UserError, match="no column 'sentence'; columns found: text, label"):
        hub_tables("a/b", {"train": dataset([0])}, ["sentence"])


def test_no_network_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(
        UserError, match=r"'moovie' could not be found .*built-in task \(movie, tweets, .*digits-left, digits-right\)"
    ):
        read_hub(Source("hub", "moovie", "moovie", {}, {}), ["text", "label"])
