"""The comparison of alphaVIL's Table 1 on superimposed digits: which way of using other tasks helps one of two digits.

    python benchmarks/digits.py [--seeds 20] [--targets digits-left digits-right] [--jobs 2] [--max-minutes 60]

The first four rows are the paper's (the two digits alone: `digits_pair`), the others train on the full space `digits`.
As in the paper: LeNet, SGD with momentum 0.9, batches of 256, no dropout, no clipping, the best dev snapshot scored on
test. Unlike it: 8 x 8 digits and 2,048 train pairs, 30 epochs of end-task examples for every row but DIW (which gets
four times the steps of one task), and the learning rate decays to 0.

One thing is tuned, for all rows alike: the learning rate, on the dev score of the left digit, over seeds that are
not reported. Everything else has its default, or the paper's value. Every run is a cell of the store, so the benchmark
can be stopped and typed again. Ends by writing `benchmarks/results/digits.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import ttest_rel

from aang_ray.config import RunConfig, parse_config
from aang_ray.store import Store
from aang_ray.store.schema import ResultRow
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell

RESULTS = Path(__file__).resolve().parent / "results"
TARGETS = ("digits-left", "digits-right")
EPOCHS, STEPS_AN_EPOCH = 30, 8
LEARNING_RATES = (0.05, 0.1, 0.2, 0.4, 0.8)
TUNING_TARGET, TUNING_SEEDS = "digits-left", (1000, 1001)
BASE: dict[str, Any] = {
    "encoder": {"name": "lenet", "head_dropout": 0.0},
    "n": "all",
    "batch": {"end_task": 256, "auxiliary": 256},
    "optim": {
        "algorithm": "sgd",
        "momentum": 0.9,
        "body_weight_decay": 0.0,
        "head_weight_decay": 0.0,
        "clip": 1e6,
    },
    "schedule": {"eval_every": STEPS_AN_EPOCH, "warmup_fraction": 0.0, "patience": 10**6},
    "precision": "fp32",
    "resources": {"device": "cpu", "threads": 1},
}


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    method: dict[str, Any]
    space: str
    tasks: int = 1
    """Optimiser steps for each step of the end task: methods of rounds train task by task."""


ROWS = (
    Row("single task", {"name": "finetune"}, "digits_pair"),
    Row("multitask", {"name": "static"}, "digits_pair"),
    Row("DIW", {"name": "diw"}, "digits_pair", tasks=4),
    Row("alphaVIL", {"name": "alphavil", "alpha_lr": 0.005}, "digits_pair", tasks=2),
    Row("static", {"name": "static"}, "digits"),
    Row("aang", {"name": "aang"}, "digits"),
    Row("attittud", {"name": "attittud"}, "digits"),
    Row("pcgrad", {"name": "pcgrad"}, "digits"),
    Row("upgrad", {"name": "upgrad"}, "digits"),
)


def configuration(row: Row, target: str, rate: float, seed: int) -> RunConfig:
    """One run."""
    changes = {
        "data": {"task": target},
        "method": row.method,
        "space": row.space,
        "seed": seed,
        "optim": {**BASE["optim"], "body_lr": rate, "head_lr": rate},
        "schedule": {**BASE["schedule"], "steps": EPOCHS * STEPS_AN_EPOCH * row.tasks},
    }
    return resolve(parse_config({**BASE, **changes}, f"row {row.name}"))


def run(config: RunConfig, store: str, deadline: float) -> None:
    """Run a cell in this process and keep its row, unless the time (as `time.time` has it) is up."""
    if time.time() < deadline:
        Store(store).write(run_cell(config))


class Benchmark:
    """Runs what the store does not hold, several processes side by side, until the time is up."""

    def __init__(self, store: Store, jobs: int, deadline: float) -> None:
        self.store, self.jobs, self.deadline = store, jobs, deadline

    def run(self, configs: Iterable[RunConfig]) -> None:
        """Cells in order; those that the deadline leaves out stay missing."""
        done = self.store.done()
        waiting = [config for config in configs if done.get(config.cell) != "done"]
        with ProcessPoolExecutor(self.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            finished = pool.map(run, waiting, itertools.repeat(self.store.uri), itertools.repeat(self.deadline))
            for number, _ in enumerate(finished, start=1):
                if number % 20 == 0 or number == len(waiting):
                    print(f"{number} of {len(waiting)} cells", flush=True)

    def rows(self, configs: Iterable[RunConfig]) -> list[ResultRow]:
        """The finished ones among these."""
        done = self.store.done()
        cells = [config.cell for config in configs if done.get(config.cell) == "done"]
        return [self.store.record(cell).result for cell in cells]

    def learning_rate(self, row: Row) -> tuple[float, dict[str, float]]:
        """The one with the best mean dev score of the tuning seeds, and all of these means."""
        found = {}
        for rate in LEARNING_RATES:
            rows = self.rows(configuration(row, TUNING_TARGET, rate, seed) for seed in TUNING_SEEDS)
            found[rate] = statistics.mean(accuracy(rows, "dev")) if len(rows) == len(TUNING_SEEDS) else float("nan")
        if any(mean != mean for mean in found.values()):
            raise SystemExit(f"row {row.name}: the learning rate is not tuned yet; start again to go on")
        return max(found, key=lambda rate: found[rate]), {str(rate): round(mean, 4) for rate, mean in found.items()}


def accuracy(rows: Sequence[ResultRow], split: str) -> list[float]:
    """Accuracy of every row on a split."""
    return [float(getattr(row, split).accuracy) for row in rows]


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, sample standard deviation, minimum and maximum, in %."""
    deviation = 100 * statistics.stdev(values) if len(values) > 1 else None
    numbers = {"mean": 100 * statistics.mean(values), "sd": deviation}
    numbers |= {"min": 100 * min(values), "max": 100 * max(values)}
    return {name: None if value is None else round(value, 2) for name, value in numbers.items()}


def against(rows: Sequence[ResultRow], single: Sequence[ResultRow]) -> dict[str, float | None]:
    """Test accuracy less the single task's over matching seeds, in points, and the p-value of a paired t-test."""
    of_single = dict(zip((row.seed for row in single), accuracy(single, "test"), strict=True))
    pairs = [
        (score, of_single[row.seed])
        for row, score in zip(rows, accuracy(rows, "test"), strict=True)
        if row.seed in of_single
    ]
    if len(pairs) < 2 or all(a == b for a, b in pairs):
        return {"test_minus_single": None, "p": None}
    difference = 100 * statistics.mean(a - b for a, b in pairs)
    p = float(ttest_rel(*zip(*pairs, strict=True)).pvalue)
    return {"test_minus_single": round(difference, 2), "p": float(f"{p:.2g}")}


def summary(row: Row, target: str, rate: float, rows: Sequence[ResultRow], wanted: int) -> dict[str, Any]:
    """One line of the table as JSON values."""
    return {
        "target": target,
        "row": row.name,
        "method": row.method,
        "space": row.space if row.method["name"] != "finetune" else None,
        "learning_rate": rate,
        "seeds": len(rows),
        "missing": wanted - len(rows),
        "dev": spread(accuracy(rows, "dev")) if rows else None,
        "test": spread(accuracy(rows, "test")) if rows else None,
        "steps": statistics.mean(r.steps for r in rows) if rows else None,
        "examples": statistics.mean(r.examples for r in rows) if rows else None,
        "images": statistics.mean(r.tokens for r in rows) if rows else None,
        "seconds": round(statistics.mean(r.seconds for r in rows), 2) if rows else None,
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown, a table a target, in the layout of the paper's Table 1."""
    parts = []
    for target in dict.fromkeys(line["target"] for line in lines):
        parts.append(
            f"\n| {target} | dev min | max | mean ± sd | test min | max | mean ± sd | - single | p | seconds |"
        )
        parts.append("|---|---|---|---|---|---|---|---|---|---|")
        for line in (line for line in lines if line["target"] == target and line["seeds"]):
            cells = [
                text
                for split in (line["dev"], line["test"])
                for text in (split["min"], split["max"], f"{split['mean']} ± {split['sd']}")
            ]
            tail = [line["test_minus_single"], line["p"], line["seconds"]]
            parts.append("| " + " | ".join(str(cell) for cell in [line["row"], *cells, *tail]) + " |")
    return "\n".join(parts)


def main() -> None:
    """Tune, run what is missing and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="0, 1, ... up to so many")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--max-minutes", type=float, default=60.0)
    parser.add_argument("--store", default=str(RESULTS / "digits-store"))
    options = parser.parse_args()
    seeds = range(options.seeds)
    benchmark = Benchmark(Store(options.store), options.jobs, time.time() + 60 * options.max_minutes)
    benchmark.run(
        configuration(row, TUNING_TARGET, rate, seed)
        for seed in TUNING_SEEDS
        for row in ROWS
        for rate in LEARNING_RATES
    )
    tuned = {row.name: benchmark.learning_rate(row) for row in ROWS}
    lines = []
    for target in options.targets:
        cells = {row.name: [configuration(row, target, tuned[row.name][0], seed) for seed in seeds] for row in ROWS}
        # Seeds vary slowest: what is cut short holds whole seeds of all rows.
        benchmark.run(config for of_seed in zip(*cells.values(), strict=True) for config in of_seed)
        single = benchmark.rows(cells[ROWS[0].name])
        for row in ROWS:
            rows = benchmark.rows(cells[row.name])
            lines.append(summary(row, target, tuned[row.name][0], rows, len(seeds)) | against(rows, single))
    report = {
        "epochs": EPOCHS,
        "tuned": {
            "what": "learning rate, by mean dev accuracy",
            "target": TUNING_TARGET,
            "seeds": list(TUNING_SEEDS),
            "dev": {name: means for name, (_, means) in tuned.items()},
        },
        "rows": lines,
    }
    (RESULTS / "digits.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(lines))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
