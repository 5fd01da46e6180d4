"""`ray job submit` against a local head."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aang_ray.store import Store
from tests.integration.conftest import Head, Start, Started, progress_of

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

DIVERGES: dict[str, Any] = {"method": "static", "optim": {"body_lr": 1e30}}


def states(store: Path) -> list[tuple[str, str]]:
    return sorted((row["method"], row["status"]) for row in Store(store).results().to_pylist())


def test_sweeps_as_jobs(
    start: Start, head: Head, sweep_file: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    def submit(file: Path, store: Path | str) -> Started:
        command = ["ray", "job", "submit", "--address", head.jobs, "--working-dir", "."]
        return start([*command, "--", "python", "jobs/sweep.py", str(file), "--store", str(store)], environment)

    good = submit(sweep_file(["finetune", "static"], 2, steps=10), tmp_path / "good")
    assert good.wait(180) == 0, good.output
    assert states(tmp_path / "good") == [("finetune", "done")] * 2 + [("static", "done")] * 2
    assert "[4/4] task" in good.output
    assert "| finetune" in good.output

    bad = submit(sweep_file(["finetune", "static", "aang", DIVERGES], 1, steps=10), tmp_path / "bad")
    assert bad.wait(180) == 1, bad.output
    assert states(tmp_path / "bad") == [
        ("aang", "done"),
        ("finetune", "done"),
        ("static", "done"),
        ("static", "failed"),
    ]
    assert "failed: task · static-td n=3 " in bad.output

    endless = submit(sweep_file(["static"], 1, steps=10_000_000), tmp_path / "endless")
    endless.wait_for(lambda: any(cell["step"] for cell in progress_of(tmp_path / "endless").values()), 180)
    (job,) = set(re.findall(r"raysubmit_\w+", endless.output))
    stop = start(["ray", "job", "stop", "--address", head.jobs, job], environment)
    assert stop.wait(120) == 0, stop.output
    assert "stopped, its checkpoint is written" in endless.output
    assert list((tmp_path / "endless" / ".checkpoints").glob("*/last-*.pt"))

    relative = submit(tmp_path / "sweep.yaml", "results")
    assert relative.wait(120) == 1  # Ray's own exit code for a job that ended with any other than 0
    assert (
        "error: --store results: the folder of a Ray job goes away; give an absolute path or a URI" in relative.output
    )
