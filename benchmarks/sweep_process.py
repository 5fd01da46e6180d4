"""A small sweep in a process of its own, for `soak.py` and `chaos.py`: its files, its processes, and what it leaves.

The calling process becomes the new parent of orphans (`PR_SET_CHILD_SUBREAPER`), so that every process that it started,
directly or not, is found among its descendants and can be ended by its id, whatever died in between.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parents[1]
_PR_SET_CHILD_SUBREAPER = 36
_WORDS = [f"w{number}" for number in range(60)]


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent has died."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def write_sweep(folder: Path, methods: Sequence[str | dict[str, Any]], seeds: int, steps: int) -> Path:
    """Write a tiny task of two classes, and a sweep file of it with a small random encoder; return the sweep file."""
    source, task = random.Random(0), folder / "task"
    task.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 60), ("dev", 30), ("test", 40)):
        lines = []
        for number in range(count):
            words = (_WORDS[:40], _WORDS[20:])[number % 2]
            text = " ".join(source.choices(words, k=source.randint(4, 12)))
            lines.append(json.dumps({"text": text, "label": ("neg", "pos")[number % 2]}))
        (task / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    base = {
        "encoder": {"name": "random:1x32"},
        "batch": {"end_task": 8, "auxiliary": 6, "dev": 8, "dev_head": 8},
        "schedule": {"steps": steps, "eval_every": max(1, steps // 4), "patience": 1_000_000},
        "precision": "fp32",
        "n": 3,
        "resources": {"checkpoint_minutes": 0},  # after every step
    }
    spec = {"base": base, "tasks": [str(task)], "methods": list(methods), "seeds": list(range(seeds))}
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(spec), encoding="utf-8")  # JSON is YAML
    return path


class SweepProcess:
    """The command `aang sweep FILE --store STORE`, and all processes that come of it."""

    def __init__(self, file: Path, store: Path, folder: Path, cpus: int = 2) -> None:
        """Start the sweep.

        Args:
            file: The sweep file.
            store: The store.
            folder: Where cache, temporary files and the log are.
            cpus: How many CPUs Ray shall see, however many the machine has.
        """
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AANG_"))}
        own = {
            "AANG_CACHE": str(folder / "cache"),
            "TMPDIR": str(self.temporary),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": cpus}),
            "PYTHONPATH": f"{PROJECT}{os.pathsep}{kept.get('PYTHONPATH', '')}",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}",
        }
        self.log = folder / "log.txt"
        with self.log.open("ab") as stream:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "aang_ray", "sweep", str(file), "--store", str(store)],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=kept | own,
                cwd=folder,
                start_new_session=True,
            )

    @property
    def ended(self) -> bool:
        """Whether the command itself is over."""
        return self.driver.poll() is not None

    def by_role(self) -> dict[str, list[psutil.Process]]:
        """Return the living processes: driver, raylet, gcs, dashboard, trial, worker, idle and other."""
        found: dict[str, list[psutil.Process]] = {}
        for process in family(self.driver.pid):
            with suppress(psutil.NoSuchProcess):
                found.setdefault(self._role(process), []).append(process)
        return found

    def _role(self, process: psutil.Process) -> str:
        if process.pid == self.driver.pid:
            return "driver"
        line = " ".join(process.cmdline())
        for word, role in (
            ("raylet/raylet", "raylet"),
            ("gcs_server", "gcs"),
            ("dashboard/dashboard.py", "dashboard"),
            ("ray::IDLE", "idle"),
            ("ray::RayTrainWorker", "worker"),
            ("ray::TrainController", "other"),
            ("ray::", "trial"),
        ):
            if word in line:
                return role
        return "other"


def family(driver: int) -> list[psutil.Process]:
    """Return the living descendants of this process; those that are dead, but the driver, are reaped."""
    living = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                living.append(process)
            elif process.ppid() == os.getpid() and process.pid != driver:
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return living


def left_behind(driver: int, seconds: float) -> list[str]:
    """Wait until all processes of a sweep whose command is over have ended, and end the others by their ids.

    Args:
        driver: The process id of the command.
        seconds: How long they may take.

    Returns:
        The command lines of those that had to be ended.
    """
    deadline = time.monotonic() + seconds
    while (living := family(driver)) and time.monotonic() < deadline:
        time.sleep(0.2)
    lines = []
    for process in living:
        with suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline())[:120])
            process.kill()
    psutil.wait_procs(living, timeout=10)
    return lines


def files_left(store: Path, temporary: Path) -> list[str]:
    """Return what a finished sweep should have removed: unfinished files, checkpoints, and Ray's folder."""
    found = [*store.rglob(".tmp-*"), *(path for path in store.glob(".checkpoints/**/*") if path.is_file())]
    # PyTorch makes one folder a user, for all processes, and leaves it there.
    found += [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")]
    return [str(path) for path in found]
