"""What is read is what was written, in this process and through other readers of Parquet."""

import math
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import fsspec
import pandas as pd
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import fs

from aang_ray.errors import UserError
from aang_ray.store import CellRecord, HistoryRow, ResultRow, Scores, Store, WeightRow, files
from aang_ray.store.files import Location

MakeRecord = Callable[..., CellRecord]

texts = st.text(max_size=12)
names = st.text(min_size=1, max_size=12)
counts = st.integers(0, 2**62)
numbers = st.floats(allow_nan=False)
maps = st.dictionaries(texts, numbers, max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
scores = st.builds(
    Scores,
    accuracy=numbers,
    macro_f1=numbers,
    examples=counts,
    per_class=st.dictionaries(texts, counts, max_size=3),
    loss=numbers,
)
results = st.builds(
    ResultRow,
    cell=st.text("0123456789abcdef", min_size=16, max_size=16),
    group=texts,
    row=texts,
    task=names,
    method=names,
    space=st.none() | texts,
    n=st.none() | texts,
    seed=st.integers(0, 2**32 - 1),
    config=st.dictionaries(texts, json_values, max_size=3),
    metric=st.sampled_from(["accuracy", "macro_f1"]),
    status=st.sampled_from(["done", "failed"]),
    error=st.none() | texts,
    log_tail=st.none() | texts,
    dev=st.none() | scores,
    test=st.none() | scores,
    test_clean=st.none() | scores,
    majority=st.none() | st.booleans(),
    best_step=st.none() | counts,
    steps=counts,
    examples=counts,
    tokens=counts,
    seconds=numbers,
    device=texts,
    precision=texts,
    versions=st.dictionaries(texts, texts, max_size=3),
    finished_at=texts,
    dev_before=st.none() | scores,
    test_before=st.none() | scores,
    test_clean_before=st.none() | scores,
)
history = st.builds(
    HistoryRow,
    step=counts,
    dev=st.none() | scores,
    losses=maps,
    seconds=numbers,
    examples=counts,
    tokens=counts,
    stage=st.none() | texts,
)
weights = st.builds(
    WeightRow,
    step=counts,
    end_task_weight=numbers,
    weights=maps,
    factors=st.dictionaries(texts, maps, max_size=3),
    health=maps,
)
records = st.builds(
    CellRecord,
    result=results,
    history=st.lists(history, max_size=3).map(tuple),
    weights=st.lists(weights, max_size=3).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(record=records)
def test_a_record_comes_back_exactly(record: CellRecord) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        store.write(record)
        assert store.record(record.result.cell) == record
        assert store.done() == {record.result.cell: record.result.status}


def test_not_a_number_comes_back(tmp_path: Path, make_record: MakeRecord) -> None:
    record = make_record(1)
    lost = HistoryRow(0, record.history[0].dev, {"end_task": math.nan, "other": math.inf}, 0.0, 0, 0)
    Store(tmp_path).write(CellRecord(record.result, (lost,), ()))
    (row,) = Store(tmp_path).record(record.result.cell).history
    assert math.isnan(row.losses["end_task"])
    assert row.losses["other"] == math.inf


def test_tables_are_the_union_of_cells(tmp_path: Path, make_record: MakeRecord) -> None:
    store = Store(tmp_path)
    for number, task in enumerate(("movie", "tweets", "movie")):
        store.write(make_record(number, task=task, evaluations=number))
    table = store.results()
    assert len(table.column_names) == len(set(table.column_names))
    assert sorted(zip(table["task"].to_pylist(), table["seed"].to_pylist(), strict=True)) == [
        ("movie", 0),
        ("movie", 2),
        ("tweets", 1),
    ]
    assert store.history().num_rows == 3
    assert store.weights([f"{2:016x}"]).num_rows == 2
    assert set(store.weights([f"{2:016x}"])["task"].to_pylist()) == {"movie"}


def test_other_readers_see_hive_partitions_and_flat_scores(tmp_path: Path, make_record: MakeRecord) -> None:
    """The layout is the common one: pyarrow's dataset and pandas need nothing of ours to read it."""
    store = Store(tmp_path)
    store.write(make_record(1, task="a/b c=d"))
    store.write(make_record(2))
    frame: pd.DataFrame = ds.dataset(tmp_path / "results", partitioning="hive").to_table().to_pandas()
    assert sorted(frame["task"]) == ["a/b c=d", "movie"]
    assert sorted(frame["dev_score"]) == [0.501, 0.502]
    assert pq.read_table(tmp_path / "history").num_rows == 6
    assert len(pd.read_parquet(tmp_path / "weights")) == 6


def test_the_score_column_follows_the_metric(tmp_path: Path, make_record: MakeRecord) -> None:
    record = make_record(1)
    values = {**vars(record.result), "metric": "macro_f1"}
    Store(tmp_path).write(CellRecord(ResultRow(**values)))
    row = Store(tmp_path).results().to_pylist()[0]
    assert (row["test_score"], row["test_accuracy"], row["test_macro_f1"]) == (0.4, 0.501, 0.4)


def test_any_fsspec_filesystem_will_do(make_record: MakeRecord) -> None:
    uri = "memory://aang-store-test"
    memory = fsspec.filesystem("memory")
    try:
        assert not Store(uri).exists()
        Store(uri).write(make_record(1, status="failed"))
        Store(uri).write(make_record(1))
        Store(uri).write(make_record(2, task="x y/z"))
        assert Store(uri).record(f"{1:016x}") == make_record(1)
        assert Store(uri).done() == {f"{1:016x}": "done", f"{2:016x}": "done"}
        assert Store(uri).history().num_rows == 6
        assert not [name for name in memory.find("/aang-store-test") if ".tmp-" in name]
    finally:
        memory.rm("/aang-store-test", recursive=True)


def test_an_object_store_gets_each_file_in_one_upload(make_record: MakeRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """No temporary names and no renaming, which would be a copy there; the results row still comes last."""
    memory = fsspec.filesystem("memory")
    location = Location("objects", fs.PyFileSystem(fs.FSSpecHandler(memory)), "/aang-object-test/base", "object")
    uploads: list[str] = []
    real = files._upload

    def upload(location: Location, path: str, data: bytes) -> None:
        uploads.append(path.removeprefix("/aang-object-test/base/").partition("/")[0])
        real(location, path, data)

    monkeypatch.setattr(files, "_upload", upload)
    try:
        store = Store("memory://aang-object-test/base")
        monkeypatch.setattr(store, "_location", location)
        store.write(make_record(1))
        assert uploads == ["history", "weights", "results"]
        assert Store("memory://aang-object-test/base").record(f"{1:016x}") == make_record(1)
    finally:
        memory.rm("/aang-object-test", recursive=True)


@pytest.mark.parametrize("as_uri", [False, True])
def test_a_path_and_its_file_uri_are_one_store(tmp_path: Path, make_record: MakeRecord, as_uri: bool) -> None:
    folder = tmp_path / "a b"
    Store(folder.as_uri() if as_uri else folder).write(make_record(1))
    assert Store(folder).done() == Store(folder.as_uri()).done() == {f"{1:016x}": "done"}


def test_a_changed_byte_in_the_data_of_a_file_is_an_error(tmp_path: Path, make_record: MakeRecord) -> None:
    """Pages have checksums: a disk that turns a bit over would otherwise give another number without a word."""
    store, record = Store(tmp_path), make_record(1)
    store.write(record)
    (path,) = tmp_path.glob("results/**/*.parquet")
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # a footer of this length, its length, and PAR1
    for at in range(4, footer, 101):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with suppress(UserError):
            assert store.record(record.result.cell) == record
    path.write_bytes(whole)
    assert store.record(record.result.cell) == record
