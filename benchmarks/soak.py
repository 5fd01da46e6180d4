"""Many small runs in one sweep: do memory, open files and threads stay flat, and does it leave anything behind?

    python benchmarks/soak.py [--cells 200] [--minutes 60]

Starts `aang sweep` on a tiny task, and looks at its driver and at the trial processes once a second. The first figure
of each pair is the median of the looks while 10 to 10 + a tenth of the cells were done, the second one that of the
last tenth. Of the trial processes the largest counts. The last line is JSON; `rss_growth` is the larger growth of
the two, as a share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from sweep_process import SweepProcess, adopt_orphans, files_left, left_behind, write_sweep

WARM = 10
"""Cells before the first looks: libraries are loaded, and caches filled."""
ROLES = ("driver", "trial")
Look = dict[str, float]


def look(sweep: SweepProcess) -> Look:
    """Return memory (MiB), open files and threads of the driver and of the largest trial process."""
    found: Look = {}
    members = sweep.by_role()
    for role in ROLES:
        for process in members.get(role, []):
            with suppress(psutil.NoSuchProcess), process.oneshot():
                figures = {
                    "rss_mib": process.memory_info().rss / 2**20,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                }
                for name, value in figures.items():
                    found[f"{role}_{name}"] = max(found.get(f"{role}_{name}", 0), value)
    return found


def main() -> int:
    """Run the sweep; the exit code is 1 if a cell is missing, something is left, or memory grows by more than 10 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60, help="end the sweep after so many")
    given = parser.parse_args()
    adopt_orphans()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as name:
        folder = Path(name)
        store = folder / "store"
        sweep = SweepProcess(write_sweep(folder, ["finetune", "static"], -(-given.cells // 2), 4), store, folder)
        cells = 2 * -(-given.cells // 2)
        looks: list[tuple[int, Look]] = []
        while not sweep.ended and time.monotonic() - started < 60 * given.minutes:
            looks.append((len(list(store.glob("results/*/*/*.parquet"))), look(sweep)))
            time.sleep(1)
        in_time = sweep.ended
        if not in_time:
            sweep.driver.terminate()
        code = sweep.driver.wait(timeout=120)
        processes, files = left_behind(sweep.driver.pid, 30), files_left(store, sweep.temporary)
        done = len(list(store.glob("results/*/*/*.parquet")))
        if code != 0:
            print(sweep.log.read_text(encoding="utf-8", errors="replace")[-3000:])
    tenth = max(cells // 10, 2)
    figures: dict[str, list[float]] = {}
    for name in sorted({name for _, one in looks for name in one}):
        first = [one[name] for count, one in looks if name in one and WARM <= count <= WARM + tenth]
        last = [one[name] for count, one in looks if name in one and count >= cells - tenth]
        if first and last:
            figures[name] = [round(statistics.median(part), 1) for part in (first, last)]
            print(f"{name}: {figures[name][0]} after {WARM} cells, {figures[name][1]} at the end")
    growth = max((figures[f"{role}_rss_mib"][1] / figures[f"{role}_rss_mib"][0] - 1 for role in ROLES), default=None)
    for line in (*processes, *files):
        print("left:", line)
    seconds = round(time.monotonic() - started)
    result = {"cells": cells, "done": done, "rss_growth": growth and round(growth, 4), **figures}
    print(json.dumps(result | {"left": len(processes) + len(files), "seconds": seconds}))
    return int(code != 0 or done != cells or bool(processes or files) or growth is None or growth > 0.1)


if __name__ == "__main__":
    sys.exit(main())
