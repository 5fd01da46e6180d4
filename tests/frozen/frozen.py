"""What the frozen tests and the script that writes their fixtures share.

Only the first block of imports below names modules of the package: when modules move, adapt that block and nothing
else. `tests.train.parallel.processes` starts the two workers; it has imports of its own.
"""

from __future__ import annotations

# Everything that is asked of the package.
from aang_ray.cli import main
from aang_ray.config import RunConfig, parse_config
from aang_ray.store import CellRecord, Store
from aang_ray.train.control import RunControl
from aang_ray.train.device import choose_compute
from aang_ray.train.loop import Trainer
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell
from aang_ray.train.setup import build

# isort: split
import hashlib
import io
import json
import math
import os
import platform
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
"""Configurations name their task and their encoder relative to this folder, so that no fixture holds another path."""
STORE = HERE / "store-v0.1"
UNFINISHED_RUNS = HERE / "unfinished-runs"
UNFINISHED_SWEEP = HERE / "unfinished-sweep"
SWEEP_FILE = HERE / "sweep.yaml"
MAIN = "import sys; from tests.frozen.frozen import main; sys.exit(main(sys.argv[1:]))"
"""Python code that is the command `aang`."""

Settings = dict[str, Any]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}

TEXT: Settings = {
    "data": {"task": "texts"},
    "encoder": {"name": "encoder", "pooling": "mean", "dropout": 0.0, "head_dropout": 0.0},
    "n": 4,
    "batch": {"end_task": 8, "auxiliary": 12, "dev": 8, "dev_head": 8},
    "schedule": {"steps": 20, "eval_every": 5, "patience": 1000},
    "optim": {"body_lr": 1e-3, "head_lr": 1e-2},
    "precision": "fp32",
    "resources": {"device": "cpu", "threads": 1, "checkpoint_minutes": 1000},
}
"""A run of 20 steps on a task of 48 texts with a random encoder of two layers, without dropout."""

DIGITS: Settings = {
    "data": {"task": "digits-left", "train_size": 200},
    "encoder": {"name": "lenet", "head_dropout": 0.0},
    "space": "digits",
    "n": "all",
    "batch": {"end_task": 16, "auxiliary": 24, "dev": 8, "dev_head": 8},
    "schedule": {"steps": 20, "eval_every": 5, "patience": 1000},
    "optim": {"body_lr": 1e-3, "head_lr": 1e-2},
    "precision": "fp32",
    "resources": {"device": "cpu", "threads": 1, "checkpoint_minutes": 1000},
}
"""A run of 20 steps on images of digits."""

AANG = {"name": "aang", "aux_lr": 1.0, "sopt_lr": 1.0}
"""Rates at which the weights move within 20 steps."""
PUBLISHED: Settings = {
    "method": {**AANG, "dev_sample": "published", "auxiliary_score": "published"},
    "objectives": {
        "legality": "published",
        "allocation": "published",
        "visibility": "published",
        "labels": "published",
        "heads": "per_objective",
    },
    "optim": {"clipping": "published"},
}
"""AANG with every switch that selects what the research code did."""
SGD: Settings = {"optim": {"algorithm": "sgd", "body_lr": 0.05, "head_lr": 0.05, "clip": 1000.0}}


def merged(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> Settings:
    """A copy of nested settings with others laid over it."""
    result = dict(base)
    for change in changes:
        for key, value in change.items():
            inner = result.get(key)
            both = isinstance(inner, Mapping) and isinstance(value, Mapping)
            result[key] = merged(inner, value) if both else value
    return result


def plain(value: Any) -> Any:
    """A value as it comes back from JSON."""
    return json.loads(json.dumps(value))


def read_json(name: str) -> Any:
    """A committed file of this folder."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


RELEASED = {
    "name": "aang",
    "aux_lr": 0.1,
    "dev_head": "refit",
    "update": "sgd",
    "dev_calibration": False,
    "dev_memory": 0.0,
}
"""The defaults of AANG in release 0.1. Later ones search with evidence."""


def as_released(settings: Mapping[str, Any]) -> Settings:
    """The settings, with what was the default of AANG when they were frozen."""
    method = settings.get("method", {})
    method = {"name": method} if isinstance(method, str) else method
    return {**settings, "method": RELEASED | method} if method.get("name", "aang") == "aang" else dict(settings)


def config_of(settings: Mapping[str, Any]) -> RunConfig:
    """The configuration that a user's nested settings stand for, with what the task and the encoder fill in."""
    return resolve(parse_config(as_released(settings), "frozen"))


def names_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """What a run is called, as it was written by the user: nothing is filled in."""
    config = parse_config(as_released(settings), "frozen")
    return {"cell": config.cell, "group": config.group, "row_name": config.row_name}


def run(config: RunConfig, store: Path | None = None, until: int | None = None) -> CellRecord:
    """Run a cell to its end, or to the step `until`; from the checkpoint that the store holds, if it holds one."""
    checkpoints = None if store is None else store / ".checkpoints"
    return run_cell(config, checkpoints=checkpoints, control=RunControl(until=until))


def record_of(record: CellRecord) -> Settings:
    """A record as plain values."""
    value: Settings = plain(asdict(record))
    return value


def records(store: Path) -> dict[str, Settings]:
    """Every record of a store by its cell."""
    opened = Store(store)
    return {cell: record_of(opened.record(cell)) for cell in sorted(opened.done())}


def printed(*arguments: str) -> str:
    """What `aang` prints with these arguments."""
    with redirect_stdout(io.StringIO()) as stream:
        code = main(list(arguments))
    assert code == 0, code
    return stream.getvalue()


def outcome(record: CellRecord) -> Settings:
    """What a run computes: all of its record but clocks, versions and the machine.

    A row states the settings that AANG has had since release 0.1 where they are no defaults; the rows of 0.1 do not.
    """
    value = record_of(record)
    method = value["result"]["config"]["method"]
    for name in ("update", "dev_calibration", "dev_memory"):
        if method["name"] == "aang" and method.get(name) == RELEASED[name]:
            del method[name]
    for name in ("seconds", "finished_at", "versions", "device"):
        del value["result"][name]
    for row in value["history"]:
        del row["seconds"]
    return value


def arithmetic() -> str:
    """What the random numbers that parameters start from depend on, in their last bits."""
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"


def machine() -> str:
    """What all rounding depends on: machines of one name compute the same bits with one thread."""
    model = platform.processor()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        lines = [line for line in cpus.read_text(encoding="utf-8").splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return f"{arithmetic()}, {model}"


def assert_close(found: Any, expected: Any, relative: float, absolute: float, where: str = "") -> None:
    """Equal all the way down; numbers with a fraction within the tolerances."""
    if isinstance(expected, Mapping):
        assert isinstance(found, Mapping), where
        assert sorted(found) == sorted(expected), where
        for key, value in expected.items():
            assert_close(found[key], value, relative, absolute, f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_close(found[number], value, relative, absolute, f"{where}[{number}]")
    elif isinstance(expected, float) and isinstance(found, float):
        same = found == expected or math.isclose(found, expected, rel_tol=relative, abs_tol=absolute)
        assert same or (math.isnan(found) and math.isnan(expected)), f"{where}: {found!r} is not {expected!r}"
    else:
        assert found == expected, f"{where}: {found!r} is not {expected!r}"


def trace(settings: Mapping[str, Any], dtype: torch.dtype, workers: Any = None) -> Settings:
    """A run in a dtype of choice, as plain values: losses, scores, weights and parameters at every evaluation.

    `sha256` is that of the bytes of the last parameters. Of several workers the first alone sees the parameters.
    """
    torch.set_num_threads(1)
    config = config_of(settings)
    setup = build(config, choose_compute(config), workers)
    setup.encoder.to(dtype)
    setup.heads.to(dtype)
    parameters: list[dict[str, float]] = []
    digests: list[str] = []

    def look(_: object) -> None:
        modules = (trainer.setup.encoder, trainer.setup.heads)
        vector = torch.cat([value.detach().flatten() for module in modules for value in module.parameters()])
        wide = vector.double()
        sums = {"norm": float(wide.norm()), "sum": float(wide.sum()), "absolute": float(wide.abs().sum())}
        parameters.append(sums)
        digests.append(hashlib.sha256(vector.numpy().tobytes()).hexdigest())

    trainer = Trainer(setup, look)
    finished = trainer.run()
    history = [asdict(row) for row in finished.progress.history]
    for row in history:
        del row["seconds"]
    found = {
        "history": history,
        "weights": [asdict(row) for row in finished.progress.weights],
        "test": asdict(finished.scores.test),
        "best_step": finished.progress.best_step,
        "parameters": parameters,
        "sha256": digests[-1] if digests else "",
    }
    value: Settings = plain(found)
    return value


ROUNDS = {"n": 3, "schedule": {"steps": 24}}
"""Two rounds or more within the run; dev is scored at their ends."""
TRACES: dict[str, Settings] = {
    "text: finetune": merged(TEXT, {"method": "finetune"}),
    "text: tapt": merged(
        TEXT, {"method": {"name": "tapt", "tapt_steps": 10, "batch": 8, "lr": 1e-3}, "schedule": {"steps": 10}}
    ),
    "text: static": merged(TEXT, {"method": "static"}),
    "text: aang": merged(TEXT, {"method": AANG}),
    "text: aang, live": merged(TEXT, {"method": {**AANG, "dev_head": "live"}}),
    "text: aang, published": merged(TEXT, PUBLISHED),
    "text: attittud": merged(TEXT, {"method": {"name": "attittud", "rank": 3, "refresh_every": 5}}),
    "text: upgrad": merged(TEXT, {"method": "upgrad"}),
    "text: alphavil": merged(TEXT, ROUNDS, {"method": {"name": "alphavil", "round_steps": 2, "alpha_lr": 0.1}}),
    "text: diw": merged(TEXT, ROUNDS, {"method": {"name": "diw", "round_steps": 1, "tries": 2}}),
    "digits: finetune": merged(DIGITS, {"method": "finetune"}),
    "digits: static": merged(DIGITS, {"method": "static"}),
    "digits: aang": merged(DIGITS, {"method": AANG}),
    "digits: aang, live": merged(DIGITS, {"method": {**AANG, "dev_head": "live"}}),
    "digits: attittud": merged(DIGITS, {"method": {"name": "attittud", "rank": 3, "refresh_every": 5}}),
    "digits: upgrad": merged(DIGITS, {"method": "upgrad"}),
    "digits: alphavil": merged(
        DIGITS, ROUNDS, {"method": {"name": "alphavil", "round_steps": 2, "alpha_lr": 0.1, "alpha_steps": 3}}
    ),
    "digits: diw": merged(DIGITS, ROUNDS, {"method": {"name": "diw", "round_steps": 1, "tries": 2}}),
}
"""Runs whose numbers are frozen in fp64 and in fp32."""
FURTHER: dict[str, Settings] = {
    "text: aang, softmax": merged(TEXT, {"method": {**AANG, "jacobian": "softmax", "score": "dot"}}),
    "text: aang, loop": merged(TEXT, {"method": AANG, "gradients": {"engine": "loop"}}),
    "text: aang, seldom": merged(TEXT, {"method": {**AANG, "head_refit_every": 3, "meta_every": 2}}),
    "text: static, external": merged(
        TEXT, {"method": "static", "data": {"external": ["other"]}, "space": "external.yaml", "n": "all"}
    ),
    "text: static, final": merged(TEXT, {"method": "static", "final_finetune": {"steps": 5}, "seed": 1}),
    "text: mt_tartan": merged(TEXT, {"method": "mt_tartan", "space": "tapt_dapt", "n": "all"}),
    "text: pcgrad": merged(TEXT, {"method": "pcgrad"}),
    "text: gradnorm": merged(TEXT, {"method": "gradnorm"}),
    "text: cosine_gating": merged(TEXT, {"method": "cosine_gating"}),
    "text: dwa": merged(TEXT, {"method": {"name": "dwa", "epoch_steps": 3}}),
    "text: uncertainty": merged(TEXT, {"method": "uncertainty"}),
    "text: static, sgd": merged(TEXT, SGD, {"method": "static"}),
    "text: aang, dropout": merged(TEXT, {"method": AANG, "encoder": {"dropout": 0.1, "head_dropout": 0.3}}),
}
"""Runs whose numbers are frozen in fp64 alone."""
CASES: dict[str, tuple[Settings, str]] = {
    **{f"{name}, {precision}": (settings, precision) for name, settings in TRACES.items() for precision in DTYPES},
    **{f"{name}, fp64": (settings, "fp64") for name, settings in FURTHER.items()},
}
"""Settings and precision of every trace of one worker."""
CASES_OF_TWO = {
    name: CASES[name]
    for name in (
        "text: static, fp64",
        "text: static, fp32",
        "text: aang, fp64",
        "text: aang, fp32",
        "digits: static, fp64",
        "digits: aang, fp64",
    )
}
"""The same of every trace of two workers."""


def trace_of(name: str) -> Settings:
    """The trace of a case with one worker."""
    settings, precision = CASES[name]
    return trace(settings, DTYPES[precision])


def traces_of_two(workers: Any, cache: str) -> dict[str, Settings]:
    """What each of two workers does: the traces of all cases of two."""
    os.chdir(HERE)
    os.environ["AANG_CACHE"] = cache
    return {name: trace(settings, DTYPES[precision], workers) for name, (settings, precision) in CASES_OF_TWO.items()}


UNFINISHED: dict[str, Settings] = {
    "digits, sgd": merged(DIGITS, SGD, {"method": "static"}),
    "text, rounds": merged(TEXT, ROUNDS, {"method": {"name": "alphavil", "round_steps": 2}}),
    "text, adamw": merged(TEXT, {"method": AANG, "encoder": {"dropout": 0.1, "head_dropout": 0.3}}),
}
"""Runs that are stopped after step `HALF`, by what is special about them."""
HALF = 11
