"""A run that was stopped after any step and resumed ends with the same numbers as one that was not stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.store import CellRecord, HistoryRow, Store
from aang_ray.store import files as publish
from aang_ray.store.schema import Scores, WeightRow
from aang_ray.train import checkpoint as checkpoint_files
from aang_ray.train.checkpoint import Checkpointer, CheckpointFiles, checkpoint_folder, discard, discard_done
from aang_ray.train.control import Interrupted, StopSignals
from aang_ray.train.device import choose_compute
from aang_ray.train.loop import Trainer
from aang_ray.train.record import Progress, SplitScores
from aang_ray.train.run import run_cell
from aang_ray.train.setup import build
from tests.train.running import tiny_config

STEPS = 7
METHODS = {
    "finetune": ["method=finetune"],
    "static": ["method=static"],
    "aang": ["method.head_refit_every=3", "method.meta_every=2", "objectives.heads=per_objective"],
    "aang, lora": ["method.meta_every=2", "encoder.adapter={rank: 2, targets: all-linear}"],
}
PUBLISHED = ["objectives.allocation=published", "optim.clipping=published", "method.dev_sample=published"]


def short(tiny: dict[str, Any], *settings: str) -> RunConfig:
    """Seven steps, evaluated after 3, 6 and 7, every method with dropout, a checkpoint after every step."""
    often = "resources.checkpoint_minutes=0"
    return tiny_config(tiny, f"schedule.steps={STEPS}", "schedule.eval_every=3", often, *settings)


def numbers(record: CellRecord) -> dict[str, Any]:
    """A record without its times."""
    result = {key: value for key, value in vars(record.result).items() if key not in ("seconds", "finished_at")}
    history = [{**vars(row), "seconds": 0.0} for row in record.history]
    return {"result": result, "history": history, "weights": record.weights}


def last_state(folder: Path, config: RunConfig) -> dict[str, Any]:
    """The state after the last step and the best model, without times."""
    found = CheckpointFiles(folder, config.cell).load()
    assert found is not None
    history = [{**row, "seconds": 0.0} for row in found.state["progress"]["history"]]
    progress = {**found.state["progress"], "history": history}
    return {**found.state, "kept": found.kept, "progress": progress, "seconds": 0.0}


def assert_identical(left: Any, right: Any, where: str = "state") -> None:
    """Assert that two nested structures are equal, bit for bit."""
    if isinstance(left, Mapping):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_identical(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for index, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_identical(one, other, f"{where}[{index}]")
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    else:
        assert left == right, where


@pytest.fixture
def snapshots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that receives a copy of the checkpoint as it is on disk after every step: what a kill would leave."""
    taken, save = tmp_path / "snapshots", CheckpointFiles.save

    def recorded(self: CheckpointFiles, step: int, *arguments: Any) -> str:
        path = save(self, step, *arguments)
        copy = taken / str(step) / Path(path).parent.name
        if not copy.exists():
            shutil.copytree(Path(path).parent, copy)
        return path

    monkeypatch.setattr(CheckpointFiles, "save", recorded)
    return taken


@pytest.mark.parametrize("method", METHODS)
def test_resumed_after_any_step_it_ends_with_the_same_numbers(
    tiny: dict[str, Any], method: str, tmp_path: Path, snapshots: Path
) -> None:
    config = short(tiny, *METHODS[method])
    plain = run_cell(config)
    whole = run_cell(config, checkpoints=tmp_path / "whole")
    assert numbers(whole) == numbers(plain), "writing checkpoints changes nothing"
    expected = last_state(tmp_path / "whole", config)
    assert expected["progress"]["steps"] == STEPS
    for step in range(1, STEPS + 1):
        folder = snapshots / str(step)
        seen: list[HistoryRow] = []
        resumed = run_cell(config, checkpoints=folder, on_evaluation=lambda row, _, seen=seen: seen.append(row))
        assert numbers(resumed) == numbers(plain)
        assert [row.step for row in seen] == [after for after in (3, 6, 7) if after > step], "it went on, not anew"
        assert_identical(last_state(folder, config), expected)


def test_a_checkpoint_holds_adapters_alone(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = short(tiny, "method=finetune", "encoder.adapter.rank=2")
    run_cell(config, checkpoints=tmp_path)
    found = CheckpointFiles(tmp_path, config.cell).load()
    assert found is not None
    body, optimizer = found.state["stepper"]["body"], found.state["stepper"]["optimizer"]
    kept = {name: value for name, value in found.kept.items() if name.startswith("encoder.")}
    assert {f"encoder.{name}" for name in body} == set(kept)
    # Query and value of each layer, A and B each, and what the optimiser knows of them and of the head.
    assert len(body) == tiny_layers(tiny) * 2 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in body)
    assert len(optimizer["state"]) == len(body) + 4
    found.state["stepper"]["body"].popitem()
    CheckpointFiles(tmp_path, config.cell).save(STEPS, found.state, 3, found.kept)
    with pytest.raises(UserError, match=r"does not fit this version \(1 names are of another model, "):
        run_cell(config, checkpoints=tmp_path)


def tiny_layers(tiny: dict[str, Any]) -> int:
    layers: int = json.loads((Path(tiny["encoder"]["name"]) / "config.json").read_text())["num_hidden_layers"]
    return layers


def test_published_allocation_and_two_stops(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Batches follow the factors here, so nothing is prepared ahead."""
    config = short(tiny, *PUBLISHED)
    plain = run_cell(config)
    for _ in range(2):
        with pytest.raises(Interrupted):
            run_cell(config, checkpoints=tmp_path, on_evaluation=lambda *_: signal.raise_signal(signal.SIGTERM))
    assert numbers(run_cell(config, checkpoints=tmp_path)) == numbers(plain)


def test_a_run_that_stopped_early_is_not_trained_on(tiny: dict[str, Any], tmp_path: Path) -> None:
    still = ["optim.body_lr=1e-12", "optim.head_lr=1e-12", "schedule.patience=1", "schedule.steps=100"]
    config = short(tiny, "method=finetune", *still)
    first = run_cell(config, checkpoints=tmp_path)
    assert first.result.steps == 6
    seen: list[HistoryRow] = []
    assert numbers(run_cell(config, checkpoints=tmp_path, on_evaluation=lambda row, _: seen.append(row))) == numbers(
        first
    )
    assert not seen


def test_seconds_and_the_size_of_a_forward_pass_go_on(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = short(tiny, "method=finetune")
    run_cell(config, checkpoints=tmp_path)
    files = CheckpointFiles(tmp_path, config.cell)
    found = files.load()
    assert found is not None
    found.state["seconds"] = 5000.0
    found.state["stepper"]["micro"] = 3
    files.save(STEPS, found.state, found.state["progress"]["best_step"], found.kept)
    assert 5000 < run_cell(config, checkpoints=tmp_path).result.seconds < 5100
    for micro, texts in (("auto", 3), ("5", 5)):
        stated = short(tiny, "method=finetune", f"batch.micro={micro}")
        compute = choose_compute(stated)
        trainer = Trainer(build(stated, compute), checkpointer=Checkpointer(files, compute, minutes=5.0))
        trainer.run()
        assert trainer.stepper.micro.texts == texts


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Interrupted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_ends_the_step_at_hand_and_writes(
    tiny: dict[str, Any], tmp_path: Path, number: signal.Signals, error: type[BaseException]
) -> None:
    config = short(tiny, "method=static")
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    steps: list[int] = []

    def stop(row: HistoryRow, _: object) -> None:
        steps.append(row.step)
        signal.raise_signal(number)

    with pytest.raises(error) as stopped:
        run_cell(config, checkpoints=tmp_path, on_evaluation=stop)
    if isinstance(stopped.value, Interrupted):
        assert stopped.value.code == 143
        assert "stopped by SIGTERM after step 3; the same command continues from there (" in str(stopped.value)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before
    assert steps == [3]
    assert numbers(run_cell(config, checkpoints=tmp_path)) == numbers(run_cell(config))


def test_signals_on_another_thread_are_left_alone(tiny: dict[str, Any], tmp_path: Path) -> None:
    config, records = short(tiny, "method=finetune"), []
    handlers: list[Any] = []

    def work() -> None:
        look = handlers.append
        records.append(
            run_cell(config, checkpoints=tmp_path, on_evaluation=lambda *_: look(signal.getsignal(signal.SIGTERM)))
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert [record.result.status for record in records] == ["done"]
    assert set(handlers) == {signal.getsignal(signal.SIGTERM)}


def test_without_checkpoints_a_signal_does_what_it_always_did(tiny: dict[str, Any]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_cell(short(tiny, "method=finetune"), on_evaluation=lambda *_: signal.raise_signal(signal.SIGINT))


def test_a_second_interrupt_acts_at_once_and_a_late_signal_is_not_lost() -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signals.received = None
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    try:
        with StopSignals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert not heard
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


STATE = {"numbers": [1, 2.5], "tensor": torch.arange(3.0)}
KEPT = {"head.weight": torch.ones(2, 2)}


def test_the_newest_state_and_the_best_model_alone_are_kept(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path, "cell")
    assert files.load() is None
    files.save(1, STATE, 0, {})
    assert [path.name.split("-")[:2] for path in (tmp_path / "cell").iterdir()] == [["last", f"{1:010d}"]]
    for step, best in ((2, 2), (3, 2), (40, 2), (50, 50)):
        files.save(step, {**STATE, "step": step}, best, {name: value * best for name, value in KEPT.items()})
    (tmp_path / "cell" / ".tmp-left").write_bytes(b"by a writer that was killed")
    path = files.save(100, {**STATE, "step": 100}, 50, {name: value * 50 for name, value in KEPT.items()})
    names = sorted(one.name for one in (tmp_path / "cell").iterdir())
    assert [name.rpartition("-")[0] for name in names] == [f"best-{50:010d}", f"last-{100:010d}"]
    found = CheckpointFiles(tmp_path, "cell").load()
    assert found is not None
    assert found.path == path
    assert_identical(found.state, {**STATE, "step": 100})
    assert_identical(found.kept, {"head.weight": torch.full((2, 2), 50.0)})


def test_a_best_model_that_another_run_of_the_cell_removed_is_written_again(tmp_path: Path) -> None:
    one, other = CheckpointFiles(tmp_path, "cell"), CheckpointFiles(tmp_path, "cell")
    one.save(2, STATE, 2, KEPT)
    other.save(3, STATE, 3, {"head.weight": torch.zeros(2, 2)})
    one.save(4, STATE, 2, KEPT)
    found = CheckpointFiles(tmp_path, "cell").load()
    assert found is not None
    assert_identical(found.kept, KEPT)


class Died(BaseException):
    """Simulates a kill: no code catches it."""


def test_dying_at_every_change_of_the_disk_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        CheckpointFiles(folder, "cell").save(1, {"step": 1}, 1, KEPT)
        with pytest.MonkeyPatch.context() as patch:
            die_at(moment, patch)
            try:
                CheckpointFiles(folder, "cell").save(2, {"step": 2}, 2, {"head.weight": torch.zeros(2, 2)})
                finished = True
            except Died:
                finished = False
        found = CheckpointFiles(folder, "cell").load()
        assert found is not None
        step = found.state["step"]
        assert_identical(found.kept, KEPT if step == 1 else {"head.weight": torch.zeros(2, 2)})
        if finished:
            assert step == 2
            assert moment > 16, "two files, each flushed, renamed and its folder flushed, and two removed"
            return
    pytest.fail("a checkpoint changes the disk more often than this test looks")


def die_at(moment: int, patch: pytest.MonkeyPatch) -> None:
    left = moment

    def count() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Died

    def dying(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            count()
            result = function(*arguments)
            count()
            return result

        return call

    for owner, name in ((os, "replace"), (os, "fsync"), (publish, "remove"), (checkpoint_files, "remove")):
        patch.setattr(owner, name, dying(getattr(owner, name)))


def only(folder: Path, kind: str) -> Path:
    (path,) = folder.glob(f"cell/{kind}-*")
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
@pytest.mark.parametrize("kind", ["last", "best"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[Path], None], kind: str) -> None:
    files = CheckpointFiles(tmp_path, "cell")
    files.save(2, STATE, 1, KEPT)
    damage(path := only(tmp_path, kind))
    if kind == "last" and damage is Path.unlink:
        assert files.load() is None  # then there is no checkpoint
        return
    with pytest.raises(UserError, match=r"^checkpoint .*; delete .*/cell to start this run anew$") as error:
        files.load()
    assert str(path) in str(error.value)


def test_another_configuration_or_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CheckpointFiles(tmp_path, "cell").save(2, STATE, 1, KEPT)
    shutil.copytree(tmp_path / "cell", tmp_path / "other")
    with pytest.raises(UserError, match=r"belongs to another configuration \(cell cell, not other\); delete"):
        CheckpointFiles(tmp_path, "other").load()
    monkeypatch.setattr(checkpoint_files, "FORMAT", 2)
    with pytest.raises(UserError, match="has format 1, this version reads format 2"):
        CheckpointFiles(tmp_path, "cell").load()


def test_a_state_of_another_model_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = short(tiny, "method=finetune")
    run_cell(config, checkpoints=tmp_path)
    files = CheckpointFiles(tmp_path, config.cell)
    found = files.load()
    assert found is not None
    found.state["stepper"]["body"].popitem()
    files.save(STEPS, found.state, 3, found.kept)
    with pytest.raises(UserError, match="does not fit this version") as error:
        run_cell(config, checkpoints=tmp_path)
    assert "\n" not in str(error.value)


class Executed:
    """Unpickling it would create a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_code_in_a_state_is_not_run(tmp_path: Path) -> None:
    files = CheckpointFiles(tmp_path, "cell")
    files.save(2, {"code": Executed(tmp_path / "mark")}, 0, {})
    with pytest.raises(UserError, match="is no state of a run"):
        files.load()
    assert not (tmp_path / "mark").exists()


def test_beside_a_store(tiny: dict[str, Any], tmp_path: Path) -> None:
    assert checkpoint_folder("results/") == "results/.checkpoints"
    assert checkpoint_folder("/a?b") == "/a?b/.checkpoints"
    assert checkpoint_folder("s3://bucket/a?region=x&scheme=http") == "s3://bucket/a/.checkpoints?region=x&scheme=http"
    config, store = short(tiny, "method=finetune"), Store(tmp_path)
    checkpoints = checkpoint_folder(store.uri)
    store.write(run_cell(config, checkpoints=checkpoints))
    other = "0" * 16
    CheckpointFiles(checkpoints, other).save(1, STATE, 1, KEPT)
    assert store.done() == {config.cell: "done"}
    discard(checkpoints, config.cell)
    discard(checkpoints, config.cell)  # nothing is there: nothing to do
    assert [path.name for path in (tmp_path / ".checkpoints").iterdir()] == [other]


def test_on_a_remote_filesystem(tiny: dict[str, Any]) -> None:
    config, folder = short(tiny, "method=finetune"), "memory://bucket/.checkpoints"
    with pytest.raises(Interrupted):
        run_cell(config, checkpoints=folder, on_evaluation=lambda *_: signal.raise_signal(signal.SIGTERM))
    found = CheckpointFiles(folder, config.cell).load()
    assert found is not None
    assert found.state["progress"]["steps"] == 3
    assert numbers(run_cell(config, checkpoints=folder)) == numbers(run_cell(config))
    discard(folder, config.cell)
    assert CheckpointFiles(folder, config.cell).load() is None


def test_progress_comes_back_as_rows() -> None:
    dev = Scores(0.5, 0.25, 4, {"a": 1, "b": 3}, 0.7)
    weights = WeightRow(2, 0.5, {"k": 1.0}, {"A": {"k": 0.1}}, {})
    pretraining = HistoryRow(1, None, {"mlm": 3.0}, 0.5, 0, 50, "tapt")
    history = [pretraining, HistoryRow(2, dev, {"end_task": 0.1}, 1.5, 32, 99)]
    before = SplitScores(dev, dev, dev)
    progress = Progress(3, 1, 2, 32, 99, history, [weights], 2, 0.5, 1, False, before)
    assert Progress.from_state(progress.state_dict()) == progress


def test_what_a_kill_left_of_done_cells_is_removed(tmp_path: Path) -> None:
    for cell in ("done", "begun"):
        CheckpointFiles(tmp_path / "checkpoints", cell).save(1, {}, 0, {})
    discard_done(tmp_path / "checkpoints", {"done", "elsewhere"})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["begun"]
    discard_done(tmp_path / "nothing", {"done"})
