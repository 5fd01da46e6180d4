"""Whole runs on two workers: one record, one checkpoint, one end."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aang_ray.config.run import RunConfig
from aang_ray.errors import RunFailure, UserError
from aang_ray.gradients.engine import Request
from aang_ray.store import CellRecord
from aang_ray.train.control import Interrupted
from aang_ray.train.evaluate import Predictions
from aang_ray.train.run import run_cell
from aang_ray.train.step import Stepper
from aang_ray.train.workers.exchange import Exchange
from aang_ray.train.workers.group import WorkerLost, Workers, agreed, gathered
from tests.train.parallel.processes import together
from tests.train.running import tiny_config

SETTINGS = ["schedule.steps=7", "schedule.eval_every=3", "method.head_refit_every=3", "method.meta_every=2"]
FAILURES: dict[str, Exception] = {
    "run": RunFailure("step 3: the loss is nan"),
    "user": UserError("too large"),
    "bug": ValueError("a bug"),
}


def numbers(record: CellRecord) -> dict[str, Any]:
    """A record without its times and its sharding setting."""
    result = {key: value for key, value in vars(record.result).items() if key not in ("seconds", "finished_at")}
    result["config"] = {key: value for key, value in result["config"].items() if key != "resources"}
    history = [{**vars(row), "seconds": 0.0} for row in record.history]
    return {"result": result, "history": history, "weights": record.weights}


def raised(function: Callable[[], Any]) -> str:
    """The name and text of what a function raises."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 - which one it is, is the question
        return f"{type(error).__name__}: {error}"
    return "nothing"


def failing(workers: Workers, rank: int, error: Exception) -> list[bool]:
    with agreed(workers) as flags:
        flags += [workers.rank == 1, False]
        if workers.rank == rank:
            raise error
    return flags


def agreements(workers: Workers) -> dict[str, Any]:
    found: dict[str, Any] = {name: raised(partial(failing, workers, 1, error)) for name, error in FAILURES.items()}
    return {**found, "flags": failing(workers, 9, ValueError())}


def rescaled(workers: Workers) -> list[list[float]]:
    """Losses, inner products and norms of a step in which dropout gives each worker a different dev gradient."""
    exchange = Exchange(workers, nn.Linear(1, 1), nn.ModuleDict(), tied_in_scores=False)
    dots_S, norms2_S = (
        (torch.tensor([4.0, 3.0, 1.0]), torch.tensor([4.0, 9.0, 25.0])),
        (torch.tensor([16.0, 0.0, 2.0]), torch.tensor([16.0, 0.0, 0.0])),
    )[workers.rank]
    request = Request(torch.ones(3), scores=True)
    found = exchange._joined(request, torch.tensor([1.0, 2.0, 3.0]), dots_S, norms2_S, torch.zeros(1))
    assert found.dots_S is not None
    assert found.norms2_S is not None
    return [found.losses_S.tolist(), found.dots_S.tolist(), found.norms2_S.tolist()]


def scored(workers: Workers, examples: int) -> list[list[float]]:
    """Logits (e, -e) and label 2 e of every example e, gathered from the worker that has it."""
    own_E = np.arange(workers.rank, examples, workers.size)
    logits_EC = torch.from_numpy(np.stack((own_E, -own_E), axis=1)).float()
    found = gathered(workers, Predictions(logits_EC, 2 * own_E), classes=2)
    return [*found.logits_EC.T.tolist(), found.labels_E.tolist()]


def killed_after(step: int, workers: Workers, config: RunConfig, folder: Path) -> str:
    """A run whose second worker is told to stop after a step."""
    original = Stepper.step

    def stopping(self: Stepper, prepared: Any) -> Any:
        if prepared.batch.step == step - 1 and workers.rank == 1:
            os.kill(os.getpid(), 15)
        return original(self, prepared)

    Stepper.step = stopping  # type: ignore[method-assign]
    try:
        run_cell(config, workers=workers, checkpoints=folder)
    except Interrupted as interrupted:
        return str(interrupted)
    finally:
        Stepper.step = original  # type: ignore[method-assign]
    return "not stopped"


def drifting(workers: Workers, config: RunConfig) -> CellRecord:
    """A run in which one bit of the second worker's body is flipped."""
    original = Stepper.step

    def step(self: Stepper, prepared: Any) -> Any:
        result = original(self, prepared)
        if workers.rank == 1 and prepared.batch.step == 4:
            with torch.no_grad():
                next(self.setup.encoder.parameters())[5, 0] += 1e-3
        return result

    Stepper.step = step  # type: ignore[method-assign]
    try:
        return run_cell(config, workers=workers)
    finally:
        Stepper.step = original  # type: ignore[method-assign]


def out_of_memory(workers: Workers, config: RunConfig) -> CellRecord:
    """A run whose second worker runs out of memory in its third step."""
    original = Stepper.losses

    def losses(self: Stepper, piece: Any) -> Any:
        if workers.rank == 1 and self.schedule.last_epoch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, piece)

    Stepper.losses = losses  # type: ignore[method-assign]
    try:
        return run_cell(config, workers=workers)
    finally:
        Stepper.losses = original  # type: ignore[method-assign]


def runs(workers: Workers, tiny: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All runs on two workers that the tests below check."""
    shards = "resources.optimizer_state=sharded"
    plain, sharded = tiny_config(tiny, *SETTINGS), tiny_config(tiny, *SETTINGS, shards)
    static = tiny_config(tiny, *SETTINGS[:2], "method=static")
    heard: list[int] = []
    found: dict[str, Any] = {"agreements": agreements(workers)}
    found["rescaled"] = rescaled(workers)
    found["scored"] = [scored(workers, examples) for examples in (1, 5)]
    whole = run_cell(plain, workers=workers, on_evaluation=lambda row, _: heard.append(row.step))
    found |= {"whole": numbers(whole), "heard": heard}
    for name, config in (("plain", plain), ("sharded", sharded)):
        found[f"{name} stopped"] = killed_after(4, workers, config, folder / name)
        found[f"{name} files"] = sorted(path.name for path in (folder / name / config.cell).iterdir())
        workers.wait_for_all()
        found[f"{name} resumed"] = numbers(run_cell(config, workers=workers, checkpoints=folder / name))
    killed_after(5, workers, tiny_config(tiny, *SETTINGS[:2], "method=static", shards), folder / "static")
    workers.wait_for_all()
    found["drifted"] = drifting(workers, static).result
    found["out of memory"] = out_of_memory(workers, static).result
    return found


def test_two_workers(tiny: dict[str, Any], tmp_path: Path) -> None:
    by_rank = together(2, tmp_path / "group", runs, tiny, tmp_path)
    for found in by_rank:
        assert isinstance(found, dict), found
        for name in ("whole", "plain resumed", "sharded resumed"):
            assert found[name] == by_rank[0]["whole"], name
        for name in ("plain", "sharded"):
            assert "stopped by" in found[f"{name} stopped"]
            assert "after step 4" in found[f"{name} stopped"]
            assert len(found[f"{name} files"]) == 2  # last and best, written once
        assert found["drifted"].status == found["out of memory"].status == "failed"
        assert "differ in encoder." in str(found["drifted"].error)
        assert "out of memory" in str(found["out of memory"].error)
        assert "batch.micro" in str(found["out of memory"].error)
        # ||v||^2 is 4 and 16: 10 in the mean. <v, g_1> = 3 / 2 * sqrt(10), <v, g_2> = (1 / 2 + 2 / 4) * sqrt(10).
        losses, dots, norms2 = found["rescaled"]
        assert losses == [1, 4, 6]
        assert norms2 == [10, 9, 25]
        assert dots[1:] == pytest.approx([1.5 * 10**0.5, 10**0.5])
        assert found["scored"] == [[[0], [0], [0]], [[0, 1, 2, 3, 4], [0, -1, -2, -3, -4], [0, 2, 4, 6, 8]]]
        assert found["agreements"]["flags"] == [True, False]
        assert found["agreements"]["run"] == "RunFailure: step 3: the loss is nan"
        assert found["agreements"]["user"] == "UserError: too large"
    assert [found["agreements"]["bug"] for found in by_rank] == [
        "WorkerLost: worker 1 of this run failed: a bug",
        "ValueError: a bug",
    ]
    assert [found["heard"] for found in by_rank] == [[3, 6, 7]] * 2
    # A checkpoint of two workers, who had half of the optimiser's state each, is any number's.
    config = tiny_config(tiny, *SETTINGS[:2], "method=static")
    record = run_cell(config, checkpoints=tmp_path / "static")
    assert record.result.status == "done"
    assert record.result.steps == 7


def leaving(workers: Workers, config: RunConfig) -> Any:
    """The second worker's process ends in the middle of a step, without a message."""
    original = Stepper.losses

    def losses(self: Stepper, piece: Any) -> Any:
        if workers.rank == 1 and self.schedule.last_epoch == 2:
            os._exit(1)
        return original(self, piece)

    Stepper.losses = losses  # type: ignore[method-assign]
    return run_cell(config, workers=workers)


def test_a_worker_that_is_gone(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tiny, *SETTINGS[:2], "method=static")
    first, second = together(2, tmp_path / "group", leaving, config)
    assert isinstance(first, WorkerLost)
    assert "another worker" in str(first)
    assert second is None


def test_alone_every_message_is_the_workers_own() -> None:
    workers = Workers()
    tensor = torch.ones(2)
    workers.sum_(tensor)
    workers.broadcast_(tensor)
    workers.sum_later(tensor).wait()
    workers.sum_in_host_(tensor)
    assert torch.equal(tensor, torch.ones(2))
    assert workers.first
    assert workers.max_host([1, 2]) == [1, 2]
    assert workers.sum_host([0.5]) == [0.5]
    assert workers.text_of("here", 0) == "here"
    assert Workers.connect(0, 1, torch.device("cpu")).size == 1


@pytest.mark.parametrize("error", [RunFailure("x"), ValueError("x")])
def test_alone_an_error_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error), match="x"):
        failing(Workers(), 0, error)
