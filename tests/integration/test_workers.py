"""A run of several workers on its own cluster that is interrupted: it ends cleanly and loses nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aang_ray.train.checkpoint import CheckpointFiles, checkpoint_folder
from tests.integration.conftest import Start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PLENTY = 1_000_000


def test_an_interruption_writes_the_checkpoint_and_ends_all_workers(
    start: Start, environment: dict[str, str], sweep_file: Callable[..., Path], tmp_path: Path
) -> None:
    sweep = json.loads(sweep_file(["static"], 1, steps=PLENTY).read_text(encoding="utf-8"))
    resources = {"workers": 2, "cpus_per_worker": 0.5}
    run = {**sweep["base"], "method": "static", "data": {"task": sweep["tasks"][0]}, "resources": resources}
    file, store = tmp_path / "run.yaml", tmp_path / "store"
    file.write_text(json.dumps(run), encoding="utf-8")
    aang = str(Path(sys.executable).with_name("aang"))
    running = start([aang, "train", str(file), "--store", str(store)], environment)
    running.wait_for(lambda: "step 10/" in running.output, 150)
    running.look()
    running.interrupt()
    assert running.wait(120) == 130, running.output
    assert "error: interrupted; what has finished is in the store, the same command continues" in running.output
    assert "Traceback" not in running.output
    (cell,) = (path.name for path in Path(checkpoint_folder(store)).iterdir())
    assert CheckpointFiles(checkpoint_folder(store), cell).newest_step() >= 10
