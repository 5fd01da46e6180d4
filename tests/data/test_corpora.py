"""External labelled data sets: which columns are read, and which examples are left out."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data import EndTask, data_fingerprint, describe, load_end_task, print_task
from aang_ray.data.read import LabelledTexts, RawTask, Texts
from aang_ray.errors import UserError
from tests.data.conftest import Rows, ids, rows_of, write_jsonl

OTHER = rows_of(("a film", "x"), ("dull plot", "y"), ("the actor", "z"))
NLI = [
    {"premise": "good film", "hyp": "not bad", "gold": "yes"},
    {"premise": "bad film", "hyp": "not bad", "gold": "no"},
]
NLI_TEST = [{"premise": "the plot", "hyp": "very dull", "gold": "no"}]
NLI_COLUMNS = {"text": "premise", "text_b": "hyp", "label": "gold"}


@pytest.fixture
def pairs(folder: Callable[..., Path]) -> DataConfig:
    """An end task of pairs, whose columns have other names than `text` and `label`."""
    return DataConfig.model_validate({"task": str(folder(train=NLI, dev=NLI, test=NLI_TEST)), **NLI_COLUMNS})


def write_folder(path: Path, rows: Rows = OTHER, held_out: Rows | None = None) -> str:
    path.mkdir(exist_ok=True)
    for split in ("train", "dev", "test"):
        write_jsonl(path / f"{split}.jsonl", rows if split == "train" else held_out or rows)
    return str(path)


def tokens_of(task: EndTask, name: str) -> list[list[int]]:
    train = task.external[name].train
    return [train.tokens[i].tolist() for i in range(len(train))]


def with_external(data: DataConfig, *external: str) -> DataConfig:
    return data.model_copy(update={"external": external})


def test_an_external_task(encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path) -> None:
    other = write_folder(tmp_path / "topics")
    plain = DataConfig(task=str(folder()))
    data = with_external(plain, other)
    task = load_end_task(data, encoder)
    assert task.external["topics"].label_names == ("x", "y", "z")
    assert task.external["topics"].train.labels.tolist() == [0, 1, 2]
    assert tokens_of(task, "topics") == [ids(row["text"]) for row in OTHER]
    assert data_fingerprint(data) != data_fingerprint(plain)


def test_errors_name_the_external_data_set(encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path) -> None:
    plain, other = DataConfig(task=str(folder())), write_folder(tmp_path / "topics")
    for name, message in (
        (str(tmp_path / "nothing"), r"data\.external: \S+nothing: there is no file or folder"),
        ("digits", r"data\.external: digits: this is a task of images"),
        ("chemprot", r"data\.external: chemprot: the data of 'chemprot' are not part of this program"),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            data_fingerprint(with_external(plain, name))
    with pytest.raises(UserError, match=r"^data\.external: \S+topics: two data sets are called topics"):
        data_fingerprint(with_external(plain, other, other))
    write_jsonl(tmp_path / "topics" / "train.jsonl", rows_of(("a film", "x")))
    with pytest.raises(UserError, match=r"^data\.external: \S+topics: \S+train.jsonl: the train split has one class"):
        load_end_task(with_external(plain, other), encoder)


def test_an_external_task_is_prepared_once_for_each_content(
    encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = with_external(DataConfig(task=str(folder())), write_folder(tmp_path / "topics"))
    first = tokens_of(load_end_task(data, encoder), "topics")
    with monkeypatch.context() as patched:
        patched.setattr("aang_ray.data.corpora.read_task", lambda *_: pytest.fail("read again"))
        assert tokens_of(load_end_task(data, encoder), "topics") == first
    # Other content is prepared again.
    write_folder(tmp_path / "topics", rows_of(("a scene", "x"), ("dull plot", "y")))
    assert tokens_of(load_end_task(data, encoder), "topics") == [ids("a scene"), ids("dull plot")]


def test_the_columns_of_the_end_task_are_read_if_they_exist(
    encoder: EncoderConfig, pairs: DataConfig, tmp_path: Path
) -> None:
    rows = [{"premise": "a film", "hyp": "dull", "gold": "x", "text": "the"}, {"premise": "a", "hyp": "b", "gold": "y"}]
    task = load_end_task(with_external(pairs, write_folder(tmp_path / "more", rows)), encoder)
    assert tokens_of(task, "more")[0] == [*ids("a film"), *ids("dull")[1:]]
    assert task.manifest["external"]["more"]["columns"] == NLI_COLUMNS


@pytest.mark.parametrize("kind", ["folder", "file", "card"])
def test_otherwise_text_and_label_are_read(
    encoder: EncoderConfig, pairs: DataConfig, tmp_path: Path, kind: str
) -> None:
    name = {"folder": "topics", "file": "topics", "card": "chemprot"}[kind]
    path = tmp_path / "all.jsonl"
    if kind == "file":
        rows = [{**row, "text": f"{row['text']} {i}"} for i in range(9) for row in OTHER]
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
    named = str(path) if kind == "file" else write_folder(tmp_path / name)
    task = load_end_task(with_external(pairs, named), encoder)
    assert task.external[name].label_names == ("x", "y", "z")
    assert task.manifest["external"][name]["columns"] == {"text": "text", "text_b": None, "label": "label"}
    if kind != "file":
        assert tokens_of(task, name) == [ids(row["text"]) for row in OTHER]


def test_an_embedded_task_needs_no_columns(
    encoder: EncoderConfig, pairs: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = LabelledTexts(Texts(["a film", "dull plot"]), ["neg", "pos"], "movie", [1, 2])
    monkeypatch.setattr(
        "aang_ray.data.sources.read_embedded", lambda _: RawTask({"train": split, "dev": split, "test": split}, "made")
    )
    task = load_end_task(with_external(pairs, "movie"), encoder)
    assert tokens_of(task, "movie") == [ids("a film"), ids("dull plot")]
    assert task.manifest["external"]["movie"]["columns"] == {}


def test_missing_columns_are_named(encoder: EncoderConfig, pairs: DataConfig, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "topics", [{"sentence": "a film", "label": "x"}])
    expected = (
        r"^data\.external: \S+topics: \S+train\.jsonl: no column 'premise'; columns found: sentence, label; "
        r"it needs the end task's columns \(premise, hyp, gold\), or text and label$"
    )
    with pytest.raises(UserError, match=expected):
        load_end_task(with_external(pairs, other), encoder)
    # An end task of `text` and `label` leaves no other columns to try.
    plain = DataConfig(task=write_folder(tmp_path / "plain"), external=(other,))
    with pytest.raises(UserError, match=r"topics: \S+: no column 'text'; columns found: sentence, label$"):
        load_end_task(plain, encoder)


def test_a_repeated_column_is_an_error_and_other_columns_are_not_tried(
    encoder: EncoderConfig, pairs: DataConfig, tmp_path: Path
) -> None:
    path = tmp_path / "twice.csv"
    path.write_text("premise,premise,hyp,gold,text,label\n" + "a,a,b,x,c,y\n" * 9)
    with pytest.raises(UserError, match=r"twice\.csv: more than one column 'premise'"):
        load_end_task(with_external(pairs, str(path)), encoder)


def test_dev_and_test_texts_of_the_end_task_are_left_out(
    encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The external data set holds the same texts in another split: its labels are those of dev and test."""
    held_out = rows_of(("a film", "x"), ("dull plot", "y"))
    rows = rows_of(("the actor", "y"), ("Bad plot", "y"), ("a film", "x"), ("dull scene", "x"))
    data = DataConfig(task=str(folder()), external=(write_folder(tmp_path / "again", rows, held_out),))
    task = load_end_task(data, encoder)
    assert task.external["again"].train.labels.tolist() == [1, 0]
    assert tokens_of(task, "again") == [ids("the actor"), ids("a film")]
    assert task.manifest["external"]["again"]["left_out"] == 2
    write_jsonl(tmp_path / "again" / "train.jsonl", rows_of(("bad plot", "y"), ("very good", "x")))
    with pytest.raises(UserError, match=r"^data\.external: \S+again: all train texts of again are dev or test texts"):
        load_end_task(data, encoder)


def test_texts_are_compared_before_the_tokenizer_sees_them(
    encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path
) -> None:
    """A tokenizer that keeps case tells "Bad Plot" from "bad plot", which is in dev and test."""
    file = Path(encoder.name) / "tokenizer.json"
    content: dict[str, Any] = json.loads(file.read_text())
    content["normalizer"] = None
    content["model"]["vocab"] |= {"Bad": 17, "Plot": 18}
    file.write_text(json.dumps(content))
    (Path(encoder.name) / "config.json").write_text(
        json.dumps({"vocab_size": 19, "model_type": "bert", "max_position_embeddings": 16})
    )
    rows = rows_of(("the actor", "pos"), ("Bad  Plot", "neg"), ("Ｂad plot", "neg"), ("dull plot", "neg"))
    data = DataConfig(task=str(folder()), external=(write_folder(tmp_path / "again", rows),))
    assert tokens_of(load_end_task(data, encoder), "again") == [ids("the actor"), ids("dull plot")]


@pytest.mark.parametrize(
    "leak",
    [
        {"premise": "The plot", "hyp": "VERY dull", "gold": "no"},
        {"premise": "the plot", "hyp": "a film", "gold": "no"},
        {"premise": "a film", "hyp": "very dull", "gold": "no"},
        {"premise": "a film", "hyp": "the plot very dull", "gold": "no"},
    ],
)
def test_a_pair_is_left_out_if_one_of_its_texts_is_in_dev_or_test(
    encoder: EncoderConfig, pairs: DataConfig, tmp_path: Path, leak: Mapping[str, str]
) -> None:
    fine = [{"premise": "a scene", "hyp": "bright", "gold": "no"}, {"premise": "scene", "hyp": "a", "gold": "yes"}]
    data = with_external(pairs, write_folder(tmp_path / "more", [leak, *fine]))
    task = load_end_task(data, encoder)
    assert tokens_of(task, "more") == [[*ids(row["premise"]), *ids(row["hyp"])[1:]] for row in fine]


def test_single_texts_are_compared_with_both_texts_of_a_pair(
    encoder: EncoderConfig, pairs: DataConfig, tmp_path: Path
) -> None:
    rows = rows_of(("the PLOT", "x"), ("very dull", "y"), ("The plot very dull", "y"), ("a scene", "x"))
    task = load_end_task(with_external(pairs, write_folder(tmp_path / "single", rows)), encoder)
    assert tokens_of(task, "single") == [ids("a scene")]


def test_an_external_task_is_printed(encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path) -> None:
    rows = [*OTHER, *rows_of(("bad plot", "x"))]
    data = DataConfig(task=str(folder()), external=(write_folder(tmp_path / "topics", rows),))
    found = describe(load_end_task(data, encoder))
    assert json.loads(json.dumps(found)) == found
    stream = io.StringIO()
    print_task(data, encoder, Console(file=stream, width=200))
    assert "External task topics: 3 examples (columns text, label), 3 labels; 1 left out" in stream.getvalue()


def test_a_maximum_for_each_set(encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path) -> None:
    """Two of six examples are kept, one of each label; a set that is smaller keeps all of its own."""
    rows = rows_of(*((f"the {word}", label) for word in ("film", "plot", "scene") for label in ("x", "y")))
    large, small = (
        write_folder(tmp_path / "large", rows),
        write_folder(tmp_path / "small", rows_of(("a film", "x"), ("a plot", "y"))),
    )
    plain = with_external(DataConfig(task=str(folder())), large, small)
    data = plain.model_copy(update={"external_size": 2})
    task = load_end_task(data, encoder)
    assert sorted(task.external["large"].train.labels.tolist()) == [0, 1]
    assert len(task.external["small"].train) == 2
    assert len(load_end_task(plain, encoder).external["large"].train) == 6, "it has a cache of its own"
    with pytest.raises(UserError, match=r"data.external: .*large: data.external_size: 1 is not possible"):
        load_end_task(plain.model_copy(update={"external_size": 1}), encoder)
