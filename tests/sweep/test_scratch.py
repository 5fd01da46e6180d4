"""The folder of a killed driver is removed, that of a living one stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from aang_ray.sweep.scratch import hold_folder, remove_left_folders


def test_folders_of_killed_drivers_are_removed(tmp_path: Path) -> None:
    alive, dead, other = (tmp_path / name for name in ("aang-alive", "aang-dead", "aang-other"))
    for folder in (alive, dead, other):
        (folder / "session").mkdir(parents=True)
    held = hold_folder(alive)
    code = "import pathlib, sys, time\nfrom aang_ray.sweep.scratch import hold_folder\n"
    code += "held = hold_folder(pathlib.Path(sys.argv[1]))\nprint('held', flush=True)\ntime.sleep(60)"
    driver = subprocess.Popen([sys.executable, "-c", code, str(dead)], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "held\n"
        remove_left_folders(tmp_path)
        assert {folder.name for folder in tmp_path.iterdir()} == {"aang-alive", "aang-dead", "aang-other"}
    finally:
        driver.kill()
        driver.wait()
    remove_left_folders(tmp_path)
    assert {folder.name for folder in tmp_path.iterdir()} == {"aang-alive", "aang-other"}
    held.close()
