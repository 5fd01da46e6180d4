"""What the trackers get, read back from what each of them writes on this machine."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from aang_ray.config import parse_config
from aang_ray.errors import UserError
from aang_ray.sweep import track
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import Evaluation
from aang_ray.sweep.track import Tracking, name_of, numbers
from tests.sweep.conftest import fake_resolve

CELLS = [
    PlannedCell(config, config.cell, "waiting")
    for config in (fake_resolve(parse_config({"method": name}, "test")) for name in ("finetune", "aang"))
]
FINETUNE, AANG = CELLS
MASKED = "end-task/mask/bidirectional/denoise"
DONE = {"status": "done", "dev": 0.75, "test": 0.5, "seconds": 9.0, "step": 30}


def evaluation(step: int, score: float) -> Evaluation:
    return Evaluation(step, 0.5 * step, score, {"end-task": 0.5, MASKED: 2.5}, 0.6, {MASKED: 1.0})


def track_two(tracker: str) -> None:
    """Track two runs that go on at the same time."""
    lines: list[str] = []
    tracking = Tracking([tracker], lines.append)
    tracking.evaluated(FINETUNE, Evaluation(15, 7.5, 0.6, {"end-task": 0.7}, None, {}))
    tracking.evaluated(AANG, evaluation(15, 0.65))
    tracking.evaluated(FINETUNE, Evaluation(30, 15.0, 0.62, {"end-task": 0.6}, None, {}))
    tracking.evaluated(AANG, evaluation(30, 0.7))
    tracking.ended(AANG, DONE)
    tracking.ended(FINETUNE, {"status": "failed", "error": "out of memory"})
    tracking.close()
    assert lines == []


WANTED = {
    "dev": [(15, 0.65), (30, 0.7)],
    "end task weight": [(15, 0.6), (30, 0.6)],
    "loss/end task": [(15, 0.5), (30, 0.5)],
    "loss/mask - bidirectional - denoise": [(15, 2.5), (30, 2.5)],
    "weight/mask - bidirectional - denoise": [(15, 1.0), (30, 1.0)],
    "final/test": [(30, 0.5)],
}
"""What a tracker must hold of the run of AANG."""


def check(found: Mapping[str, list[tuple[int, float]]]) -> None:
    for name, points in WANTED.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points])


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track_two(f"tensorboard={tmp_path}")
    assert len(list(tmp_path.iterdir())) == 2
    (folder,) = tmp_path.glob("movie_aang-td_n=6_seed_0-*")
    events = EventAccumulator(str(folder))
    events.Reload()
    check({tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]})


@pytest.mark.parametrize("place", ["files", "database"])
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = tmp_path.as_uri() if place == "files" else f"sqlite:///{tmp_path}/mlflow.db"
    track_two(f"mlflow={uri}")
    client = MlflowClient(tracking_uri=uri)
    runs = client.search_runs([client.get_experiment_by_name("aang").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs} == {AANG.title: "FINISHED", FINETUNE.title: "FAILED"}
    (run,) = (run for run in runs if run.info.run_name == AANG.title)
    assert run.data.params["method.name"] == "aang"
    assert run.data.params["cell"] == AANG.cell
    names = run.data.metrics
    check({name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)] for name in names})


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of W&B's offline file: a header of 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # a block ends with zeros where no header fits
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += 7 + length
        assert at <= len(data), "the file ends within a record"
        parts += data[at - length : at]
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    import wandb
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    track_two("wandb=project")
    wandb.teardown()  # waits for the process that writes the files: `finish` alone may return before their last block
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for file in files:
        name, points = "", {}
        for data in leveldb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                name = record.run.display_name
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for key, value in row.items():
                    points.setdefault(key, []).append((row.get("_step", record.history.step.num), value))
        found[name] = points
    check(found[AANG.title])


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trackio")
    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):  # they read TRACKIO_DIR when they are imported
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path)
    track_two("trackio=project")
    assert capsys.readouterr().out == ""
    (file,) = tmp_path.glob("project*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by step, rowid").fetchall()
    points: dict[str, list[tuple[int, float]]] = {}
    for name, step, metrics in rows:
        for key, value in json.loads(metrics).items():
            if name == AANG.title:
                points.setdefault(key, []).append((step, value))
    check(points)


def test_a_place_that_a_tracker_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(
        UserError, match=r"--track mlflow=.*: The filesystem tracking backend .* is in maintenance mode"
    ):
        Tracking([f"mlflow={tmp_path.as_uri()}"], print)


class Broken:
    """A tracker whose server has gone."""

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        pass

    def log(self, values: Mapping[str, float], step: int) -> None:
        raise ConnectionError("the server is gone")

    def end(self, *, failed: bool) -> None:
        raise AssertionError


def test_a_tracker_that_fails_is_told_once_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(track, "TRACKERS", {"broken": ("json", lambda where: Broken)})
    lines: list[str] = []
    tracking = Tracking(["broken"], lines.append)
    for step in (1, 2):
        tracking.evaluated(AANG, evaluation(step, 0.5))
    tracking.ended(AANG, DONE)
    assert lines == ["warning: broken gets nothing more: ConnectionError: the server is gone"]


def test_wrong_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--track neptune: there is no such tracker; choose one of tensorboard, mlflow"):
        Tracking(["neptune"], print)
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs a further package: pip install 'aang-ray\[wandb\]'"):
        Tracking(["wandb"], print)


def test_names_are_those_that_every_tracker_takes() -> None:
    assert (
        name_of("external:tweets/no-op/bidirectional/supervised")
        == "external:tweets - no-op - bidirectional - supervised"
    )
    assert name_of("end-task") == "end task"
    assert numbers(Evaluation(1, 2.0, None, {}, None, {})) == {"seconds": 2.0}
