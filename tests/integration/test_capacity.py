"""Sweeps on a cluster that does not grow: larger than it, cut short, searched, and a trial that fits no node."""

from __future__ import annotations

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

    # Six cells on two CPUs, each configuration with two seeds. All pause after 10 of 30 steps, the best goes on.
    store = tmp_path / "halved"
    grid = sweep_file(["finetune"], 2, steps=30, grid=RATES)
    output = sweep(grid, store, "--scheduler", "asha", "--grace", "0.33")
    assert statuses(store) == {"cut": 4, "done": 2}, output
    assert output.count("paused after step 10") == 6
    assert output.count("goes on from step 10") == 2
    assert "4 cells were cut short by asha and have no test score" in output
    assert "‡ finetune on task: 4 runs were cut short by a scheduler after 10 steps and did not compete." in output
    finished = {row["cell"] for row in Store(store).results().to_pylist() if row["status"] == "done"}

    # The whole sweep later: what was cut goes on, what is done is left alone.
    output = sweep(grid, store)
    assert statuses(store) == {"done": 6}
    assert "6 cells, 2 of them done" in output
    assert output.count("goes on from step 10") == 4
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

    # That it is told within a minute: tests/sweep/test_capacity.py, on a clock of its own.
    output = sweep(grid, tmp_path / "none", "--set", "resources.cpus=3", code=2)
    assert "error: resources: a trial needs 3 CPU, the cluster has 1 node with 2 CPU" in output
    assert not statuses(tmp_path / "none")
