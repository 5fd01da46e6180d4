"""A sweep whose store is on a full disk says so once, stops, and goes on when there is room."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aang_ray.store import Store
from tests.integration.conftest import Start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def test_a_sweep_on_a_full_disk(
    start: Start, sweep_file: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        file = sweep_file(["finetune"], 4, steps=20)
        command = [sys.executable, "jobs/sweep.py", str(file), "--store", str(disk / "store")]
        (disk / "ballast").write_bytes(bytes(1_000_000))
        first = start(command, environment)
        assert first.wait(150) == 1, first.output
        (line,) = [line for line in first.output.splitlines() if "No space left on device" in line and "error" in line]
        assert line.startswith("error: the sweep has stopped: ")
        assert "Traceback" not in first.output
        assert "FAILED" not in first.output
        assert len(first.output.splitlines()) < 20, first.output
        (disk / "ballast").unlink()
        again = start(command, environment)
        assert again.wait(150) == 0, again.output
        assert sorted(Store(disk / "store").done().values()) == ["done"] * 4
    finally:
        subprocess.run(["umount", str(disk)], check=True)
