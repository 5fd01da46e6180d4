"""SIGKILL at random moments to every kind of process of a sweep: is a row lost, doubled or different at the end?

    python benchmarks/chaos.py [--kills 100] [--minutes 120] [--seed 0] [--pairs] [--folder FOLDER]

The sweep has runs of one process and of two workers (W = 2). One sweep is left alone. Others, on stores of their own,
have processes killed at random moments: the driver, the raylet, the control service (gcs), the dashboard, a trial or a
worker, each in turn. Whenever the command ends before its cells are done, it is typed again. Each finished store is
compared with the one that was left alone: every column of `results`, `history`, `weights` and `predictions` but times
and logs, bit for bit. The last line is JSON; `left` counts processes that still lived 90 s after the command had ended.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
from sweep_process import SweepProcess, adopt_orphans, left_behind, write_sweep

from aang_ray.store import Store

ROLES = ("driver", "raylet", "gcs", "dashboard", "trial", "worker")
TIMES = {"seconds", "finished_at", "log_tail"}
SEEDS, STEPS, CELLS = 2, 40, 4
TWO_WORKERS = {"workers": 2}
LONGEST = 10.0
"""Seconds from the appearance of a process to its end, at most."""
SILENT = 90.0
"""Seconds that processes may take to end after their command has. Two of Ray's, its agents, try for 60 s to tell the
control service that the raylet is dead, also if it is dead itself; no setting changes that time."""


def rows(store: Path) -> dict[str, list[Any]]:
    """Return the rows of each finished cell from all tables, without times."""
    opened, found = Store(store), dict[str, list[Any]]()
    for table in (opened.results(), opened.history(), opened.weights(), opened.predictions()):
        for row in table.to_pylist():
            kept = {name: value for name, value in row.items() if name not in TIMES}
            found.setdefault(str(row["cell"]), []).append(json.dumps(kept, sort_keys=True, default=repr))
    return {cell: sorted(lines) for cell, lines in found.items()}


def status(store: Path) -> Counter[str]:
    """Return how many cells have a row of each status."""
    return Counter(Store(store).done().values())


class Chaos:
    """Counts what happens over all stores."""

    def __init__(self, folder: Path, file: Path, seed: int, minutes: float) -> None:
        self.folder, self.file, self.random, self.kills = folder, file, random.Random(seed), 0
        self.deadline = time.monotonic() + 60 * minutes
        self.kill_until = time.monotonic() + 45 * minutes
        """The last quarter of the time is for finishing."""
        self.killed: Counter[str] = Counter()
        self.next: list[str] = []
        """Kinds to kill next, the last one first."""
        self.typed = 0
        self.left: list[str] = []

    def finish(self, store: Path) -> bool:
        """Type the command again and again, killing meanwhile, until all cells are done; False: time is over."""
        while status(store)["done"] < CELLS:
            sweep = SweepProcess(self.file, store, self.folder)
            self.typed += 1
            while not sweep.ended:
                if time.monotonic() > self.deadline:
                    sweep.driver.kill()
                elif self.kills > self.killed.total() and time.monotonic() < self.kill_until:
                    self.kill_one(sweep)
                time.sleep(0.2)
            self.left += left_behind(sweep.driver.pid, SILENT)
            if time.monotonic() > self.deadline:
                return False
        return True

    def kill_one(self, sweep: SweepProcess) -> None:
        """Wait for a process of the next kind, then for a random time, and kill it, unless the command ends first.

        Each kind has its turn once in six kills, in random order. One that could not be killed keeps its turn.
        """
        if not self.next:
            self.next = self.random.sample(ROLES, len(ROLES))
        role = self.next[-1]
        while not sweep.by_role().get(role):
            if sweep.ended or time.monotonic() > self.kill_until:
                return
            time.sleep(0.2)
        time.sleep(self.random.uniform(0, LONGEST))
        members = sweep.by_role().get(role, [])
        with suppress(psutil.NoSuchProcess, IndexError):
            self.random.choice(members).kill()
            self.killed[role] += 1
            self.next.pop()


def main() -> int:
    """Kill, count and compare; the exit code is 1 if anything is lost, doubled, different or left, or time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=120, help="end after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the victims")
    parser.add_argument("--pairs", action="store_true", help="all runs have two workers, not only half of them")
    parser.add_argument("--folder", type=Path, help="keep all files here, also the sweep left alone for a next call")
    given = parser.parse_args()
    adopt_orphans()
    started = time.monotonic()
    lost = doubled = different = stores = 0
    with ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp")))
        aang = {"method": "aang", "resources": TWO_WORKERS if given.pairs else {}}
        methods = (aang, {"method": "static", "resources": TWO_WORKERS})
        chaos = Chaos(folder, write_sweep(folder, methods, SEEDS, STEPS), given.seed, given.minutes)
        in_time = chaos.finish(folder / "alone")
        expected = rows(folder / "alone")
        print(f"left alone: {len(expected)} cells in {time.monotonic() - started:.0f} s", flush=True)
        chaos.kills = given.kills
        while in_time and chaos.killed.total() < given.kills and time.monotonic() < chaos.kill_until:
            stores += 1
            store = folder / f"store-{stores}"
            shutil.rmtree(store, ignore_errors=True)  # of an earlier call with the same --folder
            in_time = chaos.finish(store)
            found = rows(store)
            results = Counter(Store(store).results(["cell"]).column("cell").to_pylist())
            lost += len(expected.keys() - found.keys())
            doubled += sum(count - 1 for count in results.values())
            different += sum(lines != expected.get(cell) for cell, lines in found.items())
            print(f"store {stores}: {chaos.killed.total()} kills so far {dict(chaos.killed)}", flush=True)
        if not in_time:
            print(chaos.folder.joinpath("log.txt").read_text(encoding="utf-8", errors="replace")[-3000:])
    for line in chaos.left:
        print("left:", line)
    # A sweep that was cut short has not lost the cells that it had no time for: nothing is known of them.
    counts = {"lost": lost if in_time else None, "doubled": doubled, "different": different, "left": len(chaos.left)}
    more = {"typed": chaos.typed, "stores": stores, "in_time": in_time, "seconds": round(time.monotonic() - started)}
    print(json.dumps({"kills": chaos.killed.total(), **counts, "roles": dict(chaos.killed), **more}))
    return int(any(counts.values()) or not in_time)


if __name__ == "__main__":
    sys.exit(main())
