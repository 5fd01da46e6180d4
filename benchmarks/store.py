"""The store at scale: the paper's table of many runs before and after packing, and what adding one run takes.

    python benchmarks/store.py [--cells 100000] [--evaluations 50] [--folder FOLDER]

Writes runs of twelve methods on five tasks (ten seeds a configuration) as a sweep would leave them, without waiting for
the disk after each file. The tables are made in fresh processes, beside the same table by pandas from one CSV. The last
line is JSON: seconds of the table after packing (`table_s`) and before (`table_raw_s`), milliseconds of adding a run to
the packed store (`append_ms`, median of 21), and the highest memory of a process that made a table (`peak_gib`, GiB).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from aang_ray.config import RunConfig, parse_config
from aang_ray.store import CellRecord, HistoryRow, ResultRow, Scores, Store
from aang_ray.store.schema import to_tables
from aang_ray.store.store import cell_path, serialise
from aang_ray.store.upkeep import compact

METHODS = (
    "finetune",
    "tapt",
    "static",
    "aang",
    "attittud",
    "pcgrad",
    "mgda",
    "upgrad",
    "uncertainty",
    "dwa",
    "famo",
    "diw",
)
TASKS = ("citation_intent", "sciie", "chemprot", "hyperpartisan", "se2016")
SEEDS = 10
TABLE = """
import resource, sys, time
started = time.perf_counter()
from aang_ray.report import build_table, render
from aang_ray.store import Store
text = render(build_table(Store(sys.argv[1]), paper=True))
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, len(text))
"""
CSV = """
import sys, time
started = time.perf_counter()
import pandas as pd
frame = pd.read_csv(sys.argv[1])
means = frame.groupby(["method", "task", "group"])[["dev_score", "test_score"]].agg(["mean", "std"])
best = means.loc[means[("dev_score", "mean")].groupby(level=[0, 1]).idxmax()]
print(time.perf_counter() - started, 0, len(best.to_string()))
"""


def records(count: int, evaluations: int) -> Iterator[CellRecord]:
    """Yield runs: configurations differ in the learning rate."""
    places = len(METHODS) * len(TASKS)
    for number in range(count):
        place, rest = number % places, number // places
        config = parse_config(
            {
                "data": {"task": TASKS[place % len(TASKS)]},
                "method": METHODS[place // len(TASKS)],
                "optim": {"body_lr": 1e-4 * (1 + rest // SEEDS)},
                "fingerprints": {"data": f"print-{place % len(TASKS)}", "encoder": "e", "space": "s"},
                "seed": rest % SEEDS,
            },
            "benchmark",
        )
        yield record(config, (number * 7919 % 1000) / 1000, evaluations)


def record(config: RunConfig, score: float, evaluations: int) -> CellRecord:
    """Return the record of a run with a score."""
    scores = Scores(score, score / 2, 1000, {"a": 500, "b": 500}, 0.5)
    result = ResultRow(
        cell=config.cell,
        group=config.group,
        row=config.row_name,
        task=config.task_name,
        method=config.method.name,
        space=config.space if config.method.auxiliary else None,
        n=str(config.n) if config.method.auxiliary else None,
        seed=config.seed,
        config=config.model_dump(mode="json"),
        metric="accuracy",
        status="done",
        error=None,
        log_tail=None,
        dev=scores,
        test=scores,
        test_clean=scores,
        majority=False,
        best_step=30,
        steps=1500,
        examples=48_000,
        tokens=1_000_000,
        seconds=100.0,
        device="cpu",
        precision="fp32",
        versions={"torch": "2.13.0"},
        finished_at="2026-01-02T03:04:05+00:00",
    )
    losses = {"end-task": 1.0, "end-task/mask/bidirectional/denoise": 2.0}
    return CellRecord(result, tuple(HistoryRow(30 * i, scores, losses, i, i, i, "train") for i in range(evaluations)))


def timed(script: str, path: Path) -> tuple[float, float]:
    """Run a script in a fresh process; return its seconds and its memory in GiB."""
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    seconds, peak, _ = done.stdout.split()
    return float(seconds), float(peak)


def main() -> None:
    """Write the store, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--evaluations", type=int, default=50)
    parser.add_argument("--folder", type=Path, help="Where to put the store; none: a temporary folder.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store, csv = Store(Path(folder) / "store"), Path(folder) / "results.csv"
        lines = []
        for one in records(options.cells, options.evaluations):
            for name, table in to_tables(one).items():
                path = Path(cell_path(store._location, name, one.result.task, one.result.method, one.result.cell))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(serialise(table))
            scores = {"dev_score": 0.0 if one.result.dev is None else one.result.dev.accuracy, "test_score": 0.5}
            lines.append({"method": one.result.method, "task": one.result.task, "group": one.result.group, **scores})
        pd.DataFrame(lines).to_csv(csv, index=False)
        raw, raw_peak = timed(TABLE, Path(folder) / "store")
        print(f"table of {options.cells:,} runs in as many files: {raw:.1f} s, {raw_peak:.2f} GiB", flush=True)
        started = time.perf_counter()
        before, after = compact(store.uri)
        print(f"packing {before:,} files into {after:,}: {time.perf_counter() - started:.1f} s", flush=True)
        packed, packed_peak = timed(TABLE, Path(folder) / "store")
        from_csv, _ = timed(CSV, csv)
        print(f"table of the packed store: {packed:.1f} s, {packed_peak:.2f} GiB; pandas on one CSV: {from_csv:.1f} s")
        took = []
        for seed in range(21):
            config = parse_config({"method": "finetune", "seed": 1000 + seed}, "benchmark")
            one = record(config, 0.5, options.evaluations)
            started = time.perf_counter()
            store.write(one)
            took.append(1000 * (time.perf_counter() - started))
    names = {"table_s": packed, "table_raw_s": raw, "append_ms": statistics.median(took)}
    rounded = {name: round(value, 2) for name, value in {**names, "peak_gib": max(raw_peak, packed_peak)}.items()}
    print(json.dumps({"cells": options.cells, "evaluations": options.evaluations, **rounded}))


if __name__ == "__main__":
    main()
