"""SIGKILL at random moments to every kind of process of a sweep: is a row lost, doubled or different at the end?

    python benchmarks/chaos.py [--kills 100] [--minutes 120] [--seed 0]

The sweep has runs of one process and of two workers (W = 2). One sweep is left alone. Others, on stores of their own,
have processes killed at random moments: the driver, the raylet, the control service (gcs), the dashboard, a trial or a
worker. Whenever the command ends before its cells are done, it is typed again. Each finished store is compared with the
one that was left alone: every column of `results`, `history`, `weights` and `predictions` but times and logs, bit for
bit. The last line is JSON; `left` counts processes that still lived 60 s after the command had ended.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from sweep_process import SweepProcess, adopt_orphans, left_behind, write_sweep

from aang_ray.store import Store

ROLES = ("driver", "raylet", "gcs", "dashboard", "trial", "worker")
TIMES = {"seconds", "finished_at", "log_tail"}
METHODS = ("finetune", "aang", {"method": "static", "resources": {"workers": 2}})
SEEDS, STEPS, CELLS = 2, 60, 6
LONGEST = 25.0
"""Seconds from the start, or from the kill before, to a kill, at most."""
SILENT = 60.0
"""Seconds that processes may take to end after their command has."""


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

    def __init__(self, folder: Path, file: Path, seed: int, kills: int, deadline: float) -> None:
        self.folder, self.file, self.random, self.left_to_kill = folder, file, random.Random(seed), kills
        self.deadline = deadline
        self.killed: Counter[str] = Counter()
        self.typed = 0
        self.left: list[str] = []

    def kill_one(self, sweep: SweepProcess) -> None:
        """Kill one process of a random kind, of those that are there."""
        members = {role: found for role, found in sweep.by_role().items() if role in ROLES}
        if not members:
            return
        role = self.random.choice(sorted(members))
        with suppress(psutil.NoSuchProcess):
            self.random.choice(members[role]).kill()
            self.killed[role] += 1
            self.left_to_kill -= 1

    def finish(self, store: Path) -> bool:
        """Type the command again and again, killing meanwhile, until all cells are done; False: time is over."""
        while status(store)["done"] < CELLS:
            sweep = SweepProcess(self.file, store, self.folder)
            self.typed += 1
            moment = time.monotonic() + self.random.uniform(1, LONGEST)
            while not sweep.ended:
                now = time.monotonic()
                if now > self.deadline:
                    sweep.driver.kill()
                elif now > moment and self.left_to_kill > 0:
                    self.kill_one(sweep)
                    moment = now + self.random.uniform(1, LONGEST)
                time.sleep(0.1)
            self.left += left_behind(sweep.driver.pid, SILENT)
            if time.monotonic() > self.deadline:
                return False
        return True


def main() -> int:
    """Kill, count and compare; the exit code is 1 if anything is lost, doubled, different or left, or time is over."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=120, help="end after so many")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of the victims")
    given = parser.parse_args()
    adopt_orphans()
    started = time.monotonic()
    lost = doubled = different = stores = 0
    with tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        chaos = Chaos(folder, write_sweep(folder, METHODS, SEEDS, STEPS), given.seed, 0, started + 60 * given.minutes)
        in_time = chaos.finish(folder / "alone")
        expected = rows(folder / "alone")
        print(f"left alone: {len(expected)} cells in {time.monotonic() - started:.0f} s", flush=True)
        chaos.left_to_kill = given.kills
        while in_time and chaos.left_to_kill > 0:
            stores += 1
            store = folder / f"store-{stores}"
            in_time = chaos.finish(store)
            found = rows(store)
            results = Counter(Store(store).results(["cell"]).column("cell").to_pylist())
            lost += len(expected.keys() - found.keys()) if in_time else 0
            doubled += sum(count - 1 for count in results.values())
            different += sum(lines != expected.get(cell) for cell, lines in found.items())
            print(f"store {stores}: {sum(chaos.killed.values())} kills so far {dict(chaos.killed)}", flush=True)
        if not in_time:
            print(chaos.folder.joinpath("log.txt").read_text(encoding="utf-8", errors="replace")[-3000:])
    for line in chaos.left:
        print("left:", line)
    counts = {"lost": lost, "doubled": doubled, "different": different, "left": len(chaos.left)}
    kills = sum(chaos.killed.values())
    more = {"typed": chaos.typed, "stores": stores, "in_time": in_time, "seconds": round(time.monotonic() - started)}
    print(json.dumps({"kills": kills, **counts, "roles": dict(chaos.killed), **more}))
    return int(any(counts.values()) or not in_time)


if __name__ == "__main__":
    sys.exit(main())
