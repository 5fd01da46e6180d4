"""Sweeps on a cluster of fixed size: more trials than fit, ASHA, search, and a trial that fits on no node."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from aang_ray.store import Store
from tests.integration.conftest import Head, Start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

RATES = {"optim.body_lr": [1e-5, 1e-4, 1e-2]}


def statuses(store: Path) -> Counter[str]:
    return Counter(row["status"] for row in Store(store).results().to_pylist())


def test_one_cluster_many_sweeps(
    start: Start, head: Head, sweep_file: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    environment["RAY_ADDRESS"] = head.address

    def sweep(file: Path, store: Path, *options: str, code: int = 0) -> str:
        command = [sys.executable, "jobs/sweep.py", str(file), "--store", str(store), *options]
        process = start(command, environment)
        assert process.wait(150) == code, process.output
        return process.output

    # Three rates with two seeds, judged after 30 of 60 steps, one after the other: the first seeds score 0.5, 0.5 and
    # more, the second seed of the first rate 0.5, which is below the best third. That of the second rate then ties.
    store = tmp_path / "halved"
    grid = sweep_file(["finetune"], 2, steps=60, grid=RATES)
    asha = ["--scheduler", "asha", "--grace", "0.5", "--set", "resources.cpus=2"]
    output = sweep(grid, store, *asha)
    cut = 1
    assert statuses(store) == {"cut": cut, "done": 6 - cut}, output
    assert output.count("cut short after step 30") == cut
    assert f"{cut} cells were cut short by asha and have no test score" in output
    assert f"‡ finetune on task: {cut} run was cut short by a scheduler after 30 steps and did not compete." in output
    rows = Store(store).results().to_pylist()
    finished = {row["cell"] for row in rows if row["status"] == "done"}
    best = {row["seed"]: row["status"] for row in rows if json.loads(row["config"])["optim"]["body_lr"] == 1e-2}
    assert best == {0: "done", 1: "done"}, "the best rate is run to its end with both seeds"
    checkpoints = {path.parent.name for path in store.glob(".checkpoints/*/last-*.pt")}
    assert checkpoints == {row["cell"] for row in rows if row["status"] == "cut"}

    # Started again it knows what it knew: what is done stays, what was cut may go on from its checkpoint.
    output = sweep(grid, store, *asha)
    assert f"6 cells, {6 - cut} of them done" in output
    assert finished <= {cell for cell, status in Store(store).done().items() if status == "done"}
    left = statuses(store)["cut"]
    assert left + output.count("accuracy ·") == cut

    # The whole sweep later: what was cut goes on, what is done is left alone.
    output = sweep(grid, store)
    assert statuses(store) == {"done": 6}
    assert f"6 cells, {6 - left} of them done" in output
    assert output.count("continues from step 30") == left
    assert "‡" not in output
    assert finished < set(Store(store).done())

    store = tmp_path / "searched"
    search = {"samples": 3, "space": {"optim.body_lr": {"log": [1e-5, 1e-2]}}}
    searched = sweep_file(["finetune"], 2, steps=10, search=search)
    output = sweep(searched, store)
    rows = Store(store).results().to_pylist()
    assert sorted(Counter(row["group"] for row in rows).values()) == [2, 2, 2], "each configuration with both seeds"
    assert "best mean dev of 3 configurations" in output
    assert "all 6 cells are done" in sweep(searched, store)

    # Workers that fill the cluster leave the trial itself a place; two such trials run one after the other.
    store = tmp_path / "workers"
    output = sweep(sweep_file(["finetune"], 2, steps=10), store, "--set", "resources.workers=2")
    assert statuses(store) == {"done": 2}, output

    # That it is told within a minute: tests/sweep/test_cluster.py, on a clock of its own.
    output = sweep(grid, tmp_path / "none", "--set", "resources.cpus=3", code=2)
    assert "error: resources: a trial needs 3 CPU, the cluster has 1 node with 2 CPU" in output
    assert not statuses(tmp_path / "none")
