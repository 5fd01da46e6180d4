"""Runs and a sweep that version 0.1 left unfinished are finished with the numbers of an uninterrupted run.

A checkpoint is `last-<step>-<digest>.pt` and `best-<step>-<digest>.safetensors`. The former is read with
`torch.load(weights_only=True)`: it holds tensors, numbers, strings, lists and dicts, and the name of no class of this
package, so modules may move. What it does hold is the names of parameters and of the fields of rows and progress.

A run that goes on keeps the clock of the evaluations that were made before it was stopped. A run that starts anew
does not, so the clock tells the two apart.
"""

from __future__ import annotations

import pickletools
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.frozen.frozen import (
    HALF,
    HERE,
    MAIN,
    SWEEP_FILE,
    UNFINISHED,
    UNFINISHED_RUNS,
    UNFINISHED_SWEEP,
    assert_close,
    config_of,
    machine,
    outcome,
    read_json,
    record_of,
    records,
    run,
)
from tests.integration.conftest import Start, environment, short_folder, start  # noqa: F401

EXPECTED: dict[str, Any] = read_json("checkpoints.json")
PROJECT = HERE.parents[1]


def assert_same(found: Any, expected: Any) -> None:
    """Equal to the last bit on the machine that wrote the fixtures, nearly so on another."""
    exact = machine() == EXPECTED["machine"]
    assert_close(found, expected, *((0.0, 0.0) if exact else (1e-3, 1e-3)))


def clocks(record: dict[str, Any], before: int) -> list[float]:
    """Seconds of the evaluations up to a step."""
    return [row["seconds"] for row in record["history"] if row["step"] <= before]


@pytest.mark.parametrize("name", UNFINISHED)
def test_a_run_goes_on(name: str, tmp_path: Path) -> None:
    store, expected, config = tmp_path / "store", EXPECTED["runs"][name], config_of(UNFINISHED[name])
    shutil.copytree(UNFINISHED_RUNS, store)
    assert config.cell == expected["cell"]
    assert list((store / ".checkpoints" / config.cell).glob(f"last-{HALF:010d}-*.pt"))
    record = run(config, store)
    assert_same(outcome(record), expected["outcome"])
    assert clocks(record_of(record), HALF) == expected["clocks"], "it went on, and did not start anew"


def test_a_checkpoint_names_no_class_of_this_package() -> None:
    states = [*UNFINISHED_RUNS.rglob("last-*.pt"), *UNFINISHED_SWEEP.rglob("last-*.pt")]
    assert len(states) == len(UNFINISHED) + 1
    for path in states:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            found = {argument for code, argument, _ in pickletools.genops(archive.read(name)) if code.name == "GLOBAL"}
        assert found, path
        assert all(str(name).split()[0] in {"collections", "torch", "torch._utils"} for name in found), found


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_sweep_goes_on(start: Start, environment: dict[str, str], tmp_path: Path) -> None:  # noqa: F811
    store, expected = tmp_path / "store", EXPECTED["sweep"]
    shutil.copytree(UNFINISHED_SWEEP, store)
    done = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(store.rglob("*.parquet"))}
    finished = records(store)
    assert 0 < len(finished) < len(expected["outcomes"])
    assert (store / ".checkpoints" / expected["stopped"]).is_dir()
    here = environment | {"PYTHONPATH": str(PROJECT), "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    running = start([sys.executable, "-c", MAIN, "sweep", str(SWEEP_FILE), "--store", str(store)], here)
    assert running.wait(240) == 0, running.output
    for path, state in done.items():
        assert (path.stat().st_mtime_ns, path.read_bytes()) == state, f"{path.name} was written again"
    found = records(store)
    assert sorted(found) == sorted(expected["outcomes"])
    for cell, wanted in expected["outcomes"].items():
        result = found[cell]["result"]
        assert_same({key: result[key] for key in wanted}, wanted)
    assert clocks(found[expected["stopped"]], HALF) == expected["clocks"], "it went on, and did not start anew"
    assert not (store / ".checkpoints" / expected["stopped"]).exists()
