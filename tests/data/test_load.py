"""From a configuration to an end task, through the cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data import EndTask, data_fingerprint, load_end_task
from aang_ray.errors import UserError
from tests.data.conftest import DEV, TEST, TRAIN, WORDS, ids, rows_of, write_jsonl


def load(encoder: EncoderConfig, task: Path, **settings: object) -> EndTask:
    return load_end_task(DataConfig.model_validate({"task": str(task), **settings}), encoder)


def test_a_folder(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    task = load(encoder, folder())
    assert (task.name, task.label_names, task.metric) == ("task", ("neg", "pos"), "accuracy")
    for split, rows in ((task.train, TRAIN), (task.dev, DEV), (task.test, TEST)):
        assert [split.tokens[i].tolist() for i in range(len(split))] == [ids(row["text"]) for row in rows]
        assert [task.label_names[label] for label in split.labels] == [row["label"] for row in rows]
    # "good film" is in train, "bad plot" in dev.
    assert task.test_clean.tolist() == [1, 3]
    assert task.manifest["duplicates"] == {
        "within": {"train": 1, "dev": 0, "test": 0},
        "dev_in_train": 1,
        "test_in_train": 1,
        "test_in_dev": 1,
        "test_clean": 2,
    }
    assert task.corpora == {}
    assert task.class_weights is None
    json.dumps(task.manifest)


def test_the_metric_is_configured_or_that_of_the_card(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    path = folder("citation_intent")
    assert load(encoder, path).metric == "macro_f1"
    assert load(encoder, path, metric="accuracy").metric == "accuracy"


def test_pairs_in_columns_with_other_names(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    rows = [
        {"a": "good", "b": "film", "y": 10},
        {"a": "bad", "b": "film", "y": 9},
        {"a": "good", "b": "plot", "y": False},
    ]
    task = load(encoder, folder(train=rows, dev=rows[:1], test=rows[2:]), text="a", text_b="b", label="y")
    # Labels are sorted as strings, of which False is one.
    assert task.label_names == ("10", "9", "False")
    assert task.train.tokens[0].tolist() == [2, 5, 3, 7, 3]
    assert task.test_clean.tolist() == []


def test_train_size_moves_the_rest_to_in_domain_text(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "domain.txt").write_text("the actor\nBAD  plot\nthe scene\n")
    task = load(encoder, path, train_size=2)
    assert sorted(task.train.labels.tolist()) == [0, 1]
    corpus = [task.corpora["in_domain"][i].tolist() for i in range(len(task.corpora["in_domain"]))]
    # Of the domain file "bad plot" is a dev text. Of train two examples are left, and of the three
    # positive ones "good film" (twice) is a test text and "very good" a dev text.
    assert corpus == [ids("the actor"), ids("the scene")]
    assert task.manifest["corpora"]["in_domain"] == {"passages": 2, "left_out": 3, "given_by_train": 2}
    # The clean test view compares with the whole train split, so that it is the same for every size.
    assert task.test_clean.tolist() == [1, 3]
    assert task.manifest["sizes"]["train"] == 2
    assert task.manifest["sizes_given"]["train"] == 4


def test_corpora_of_the_configuration(encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("the actor\n")
    write_jsonl(tmp_path / "out.jsonl", [{"text": "a scene", "id": 1}, {"text": "dull scene", "id": "x"}])
    task = load(encoder, folder(), in_domain=str(tmp_path / "in.txt"), out_of_domain=str(tmp_path / "out.jsonl"))
    assert task.corpora["in_domain"][0].tolist() == ids("the actor")
    assert len(task.corpora["out_of_domain"]) == 1
    assert task.manifest["corpora"]["out_of_domain"] == {"passages": 1, "left_out": 1}


def test_a_corpus_of_dev_texts_only_is_empty(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    path = folder()
    (path / "domain.txt").write_text("bad plot\n")
    assert len(load(encoder, path).corpora["in_domain"]) == 0


def test_one_file_is_split(encoder: EncoderConfig, tmp_path: Path) -> None:
    words = [f"{a} {b}" for a in WORDS for b in WORDS]
    path = tmp_path / "mine.csv"
    path.write_text("text,label\n" + "".join(f"{text},{'xy'[i % 2]}\n" for i, text in enumerate(words)))
    task = load(encoder, path, split_seed=3)
    # 72 texts a class: 18 to test, 11 to dev (72 * 0.15 = 10.8).
    assert (len(task.train), len(task.dev), len(task.test)) == (86, 22, 36)
    assert task.name == "mine"
    assert len(task.test_clean) == 36
    assert task.manifest["split"]["seed"] == 3
    assert "stratified" in task.manifest["split"]["method"]
    assert load(encoder, path, split_seed=4).test.tokens.values.tolist() != task.test.tokens.values.tolist()


def test_balanced_weights(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    weights = load(encoder, folder(), class_weights="balanced").class_weights
    # N / (C * N_c): 4 examples, 2 classes, 1 negative and 3 positive.
    assert weights is not None
    np.testing.assert_allclose(weights, [4 / 2, 4 / 6], rtol=1e-6)


def test_long_texts_are_cut_and_counted(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    path = folder(train=[*TRAIN, {"text": "good " * 40, "label": "pos"}])
    task = load(encoder, path)
    assert task.train.tokens.lengths.max() == 16
    assert task.manifest["truncated"] == {"train": 1, "dev": 0, "test": 0}
    assert load(encoder, path, max_tokens=8).train.tokens.lengths.max() == 8
    with pytest.raises(UserError, match=r"data.max_tokens: 17 is not possible, this encoder takes 8 to 16"):
        load(encoder, path, max_tokens=17)


def test_loading_again_reads_the_cache(
    encoder: EncoderConfig, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    path = folder()
    first = load(encoder, path)
    monkeypatch.setattr("aang_ray.data.load.prepare", lambda *_: pytest.fail("prepared again"))
    copied = path.rename(path.parent / "moved")
    again = load(encoder, copied)
    assert again.train.tokens.values.tolist() == first.train.tokens.values.tolist()
    # Name and source are those of the place it was loaded from this time.
    assert (again.name, again.manifest["source"]) == ("moved", str(copied))
    assert len(list((cache / "tokens").iterdir())) == 1


def test_the_fingerprint_follows_the_content(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    path = folder()
    data = DataConfig(task=str(path))
    first = data_fingerprint(data)
    assert data_fingerprint(data.model_copy(update={"train_size": 2})) == first
    (path / "domain.txt").write_text("the actor\n")
    second = data_fingerprint(data)
    write_jsonl(path / "train.jsonl", TRAIN[:3])
    third = data_fingerprint(data)
    moved = path.rename(path.parent / "chemprot")
    # The same files under a card's name are another task: metric and batch sizes differ.
    assert len({first, second, third, data_fingerprint(DataConfig(task=str(moved)))}) == 4
    assert data_fingerprint(DataConfig(task="movie")) != data_fingerprint(DataConfig(task="tweets"))
    assert data_fingerprint(DataConfig(task="a/b@v1")) != data_fingerprint(DataConfig(task="a/b"))


GOOD = rows_of(("good film", "pos"), ("bad film", "neg"))


@pytest.mark.parametrize(
    ("train", "dev", "test", "expected"),
    [
        (rows_of(("a", "x"), ("b", "x")), GOOD, GOOD, r"train.jsonl: the train split has one class only \('x'\)"),
        (GOOD, rows_of(("a", "pos"), ("b", "new")), GOOD, r"dev.jsonl: row 2 has the label 'new', which train lacks"),
        (GOOD, GOOD, rows_of(("a", "neu")), r"test.jsonl: row 1 has the label 'neu', .* train has neg, pos"),
        ([*GOOD, {"text": " \t", "label": "pos"}], GOOD, GOOD, r"train.jsonl: row 3 has an empty text"),
        ([*GOOD, {"label": "pos"}], GOOD, GOOD, r"train.jsonl: row 3 has an empty text"),
        ([*GOOD, {"text": "a", "label": None}], GOOD, GOOD, r"train.jsonl: row 3 has no label"),
        (
            [*GOOD, {"text": "a", "label": ["pos"]}],
            GOOD,
            GOOD,
            r"row 3 has a label of type list .*; a label is a string",
        ),
        ([*GOOD, {"text": "a", "label": 0.5}], GOOD, GOOD, r"type float .*regression are not supported"),
        ([*GOOD, {"text": 3, "label": "pos"}], GOOD, GOOD, r"row 3 has int in place of a text \(column 'text'\)"),
        ([*GOOD, {"text": "\ud800", "label": "pos"}], GOOD, GOOD, r"row 3 has a text that is not valid Unicode"),
    ],
)
def test_bad_data_is_one_line_and_leaves_no_cache(
    encoder: EncoderConfig,
    folder: Callable[..., Path],
    cache: Path,
    train: list[dict[str, object]],
    dev: list[dict[str, object]],
    test: list[dict[str, object]],
    expected: str,
) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load(encoder, folder(train=train, dev=dev, test=test))
    assert "\n" not in str(error.value)
    assert list((cache / "tokens").iterdir()) == []


def test_an_embedded_task_has_no_pairs(encoder: EncoderConfig) -> None:
    with pytest.raises(UserError, match="movie has one text an example"):
        load_end_task(DataConfig(task="movie", text_b="b"), encoder)
