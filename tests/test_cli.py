"""The command line: quick help, one line for what is wrong, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import aang_ray
from aang_ray.cli import main
from aang_ray.config import RunConfig
from aang_ray.config.methods import method_sections
from aang_ray.store import CellRecord, Store
from aang_ray.theory import Problem, generalisation_bound
from aang_ray.train.record import Heartbeat
from tests.sweep.conftest import done_record, fake_resolve, history_row

HEAVY = ("torch", "ray", "transformers", "datasets", "pandas", "pyarrow", "scipy", "sklearn", "numpy")
JOBS = {"train.py": "train", "sweep.py": "sweep", "tables.py": "table"}


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from aang_ray.cli import main
alone = ["train", "sweep", "table", "plot", "report", "export", "predict", "data"]
for verb in ([], *([name] for name in alone), ["data", "show"], ["space", "show"]):
    assert main([*verb, "--help"]) == 0
found = [name for name in {HEAVY!r} if name in sys.modules]
sys.exit(f"imported: {{found}}" if found else 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "--max-hours" in result.stdout


@pytest.mark.parametrize("verb", ["train", "sweep"])
def test_the_help_of_what_trains_names_the_methods(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main([verb, "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(f" {name}" in said for name in method_sections())
    assert "docs/methods/README.md" in said


def test_theory_starts_from_the_defaults_of_its_problem(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["theory"]) == 0
    assert f": {generalisation_bound(Problem()).value:.4g} (the tighter one)" in capsys.readouterr().out


def test_an_n_that_its_space_is_too_small_for_is_refused_in_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch)
    file = tmp_path / "sweep.yaml"
    arguments = ["sweep", str(file), "--dry-run", "--store", str(tmp_path / "store")]
    file.write_text("methods: [aang, finetune]\nbase: {space: xyz, n: 4}\n")
    assert main(arguments) == 2
    assert complaint(capsys) == "error: n: 4 exceeds the 3 objectives of space xyz; use at most that, or all"
    for fits in (
        "methods: [aang]\nbase: {space: xyz, n: 3}\n",
        "methods: [finetune, tapt]\nbase: {space: xyz, n: 4}\n",
    ):
        file.write_text(fits)
        assert main(arguments) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == aang_ray.__version__


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["swep"], "No such command 'swep'"),
        (["sweep"], "give either a sweep file or --preset NAME"),
        (["sweep", "x.yaml", "--bad"], "No such option"),
        (["sweep", "missing.yaml"], "missing.yaml: No such file or directory"),
        (["sweep", "jobs/demo.yaml", "--seeds", "x"], "--seeds x: expected whole numbers"),
        (["sweep", "jobs/demo.yaml", "--max-hours", "0"], "--max-hours 0: must be above 0"),
        (["sweep", "jobs/demo.yaml", "--scheduler", "asha", "--grace", "2"], "--grace 2: must be a share of a run's"),
        (["sweep", "jobs/demo.yaml", "--scheduler", "fifo"], "Invalid value for '--scheduler'"),
        (["sweep", "jobs/demo.yaml", "--set", "method.aux=1"], "unknown key method.aux"),
        (["sweep", "jobs/demo.yaml", "--metric", "f1"], "data.metric: 'f1' is not allowed"),
        (["train", "--set", "optim.body_l=1"], "unknown key optim.body_l; did you mean optim.body_lr?"),
        (["train", "--set", "n"], "--set n: expected key.path=value"),
        (["train", "missing.yaml"], "missing.yaml: No such file or directory"),
        (["table", "--format", "xml"], "'xml' is not one of"),
        (["space", "show", "nothing"], "nothing"),
        (["data", "show", "./nothing"], "nothing"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    line: str,
) -> None:
    monkeypatch.setenv("AANG_STORE", str(tmp_path / "store"))
    assert main(arguments) == 2
    said = complaint(capsys)
    assert said.startswith("error: ")
    assert line in said
    assert not (tmp_path / "store").exists()


def test_a_store_in_a_jobs_own_folder_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert main(["train", "--store", "results"]) == 2
    assert "the folder of a Ray job goes away" in complaint(capsys)


def install(monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    """Replace planning by `fake_resolve`, and functions of `train.run` by the given ones."""
    monkeypatch.setattr("aang_ray.train.plan.resolve", fake_resolve)
    monkeypatch.setattr("aang_ray.train.check.check_runs", lambda runs, here: [])
    for name, function in functions.items():
        monkeypatch.setattr(f"aang_ray.train.run.{name}", function)


def test_train_prints_scores_keeps_them_and_does_not_run_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs: list[RunConfig] = []

    def run_cell(config: RunConfig, *, on_evaluation: object, **_: object) -> CellRecord:
        runs.append(config)
        assert callable(on_evaluation)
        on_evaluation(history_row(30), None)
        return done_record(config)

    install(monkeypatch, run_cell=run_cell)
    arguments = ["train", "--set", "method=static", "--store", str(tmp_path)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "step 30/60 · dev accuracy 75.00" in first
    assert "test: accuracy 75.00, macro-F1 70.00, 40 examples" in first
    assert Store(tmp_path).done() == {runs[0].cell: "done"}
    assert main(arguments) == 0
    assert "is done already" in capsys.readouterr().out
    assert len(runs) == 1


def test_a_failed_run_is_one_line_a_row_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = {"status": "failed", "error": "loss is nan at step 3", "dev": None, "test": None, "test_clean": None}
    install(monkeypatch, run_cell=lambda config, **_: done_record(config, **failed))
    assert main(["train", "--store", str(tmp_path)]) == 1
    assert complaint(capsys) == "error: loss is nan at step 3"
    assert list(Store(tmp_path).done().values()) == ["failed"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "/tmp/x"), "error: /tmp/x: No space left on device"),
        (OSError("the bucket refuses"), "error: the bucket refuses"),
        (MemoryError(), "error: out of memory: lower data.train_size, batch.auxiliary or encoder.layers"),
        (RecursionError("deep"), "error: nested too deeply: deep"),
    ],
)
def test_what_the_machine_refuses_is_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    line: str,
) -> None:
    def run_cell(config: RunConfig, **_: object) -> CellRecord:
        raise error

    install(monkeypatch, run_cell=run_cell)
    assert main(["train", "--store", str(tmp_path)]) == 1
    assert complaint(capsys) == line


def test_signs_of_life_are_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a pipe one a minute, with speed and time left."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("aang_ray.sweep.progress.time", clock)
    monkeypatch.setattr("aang_ray.sweep.progress.QUICKEST_SECONDS", 3600.0)

    def run_cell(config: RunConfig, *, on_beat: object, **_: object) -> CellRecord:
        assert callable(on_beat)
        for step in range(1, 40):
            clock.now += 10
            on_beat(Heartbeat(step, 10.0 * step, 0.5))
        return done_record(config)

    install(monkeypatch, run_cell=run_cell)
    assert main(["train", "--set", "method=static", "--store", str(tmp_path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "texts a second" in line]
    assert len(lines) == 6
    assert lines[0] == (
        "0/1 cells, 10 % of the work, 8 texts a second, about 9 min 00 s left; "
        "movie · static-td n=6 · seed 0: step 6/60, loss 0.500"
    )


def test_an_interruption_is_one_line_and_exit_code_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run_cell(config: RunConfig, *, on_evaluation: object, **_: object) -> CellRecord:
        raise KeyboardInterrupt

    install(monkeypatch, run_cell=run_cell)
    assert main(["train", "--store", str(tmp_path)]) == 130
    assert complaint(capsys).startswith("error: interrupted; what has finished is in the store")


def test_a_dry_run_shows_the_cells_and_touches_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch)
    store = tmp_path / "store"
    assert main(["sweep", "jobs/demo.yaml", "--dry-run", "--seeds", "0-2", "--store", str(store)]) == 0
    assert "9 cells, 9 to run" in capsys.readouterr().out
    assert not store.exists()


def test_a_sweep_with_everything_done_prints_the_table_without_ray(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from aang_ray.sweep.plan import plan
    from aang_ray.sweep.spec import SweepOverrides, expand, load_sweep

    install(monkeypatch)
    monkeypatch.setattr("aang_ray.sweep.cluster.ray_cluster", lambda: pytest.fail("started Ray"))
    monkeypatch.setitem(sys.modules, "aang_ray.sweep.tune", None)  # importing it is an error
    spec = load_sweep(Path("jobs/demo.yaml"), SweepOverrides())
    store = Store(tmp_path)
    for cell in plan(expand(spec, SweepOverrides(), "demo"), spec.seeds, {}, fake_resolve):
        store.write(done_record(cell.config))
    assert main(["sweep", "jobs/demo.yaml", "--store", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "all 9 cells are done" in text
    assert "75.00" in text
    assert f"results: {tmp_path}" in text


def test_table_formats(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from aang_ray.config import parse_config

    Store(tmp_path).write(done_record(fake_resolve(parse_config({"method": "finetune"}, "test"))))
    for form in ("markdown", "json", "csv", "latex", "html", "terminal"):
        assert main(["table", "--store", str(tmp_path), "--format", form]) == 0
        text = capsys.readouterr().out
        assert "finetune" in text
        if form == "json":
            json.loads(text)


def test_verbs_that_read_a_store(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from aang_ray.config import parse_config

    store, other = str(tmp_path / "store"), str(tmp_path / "other")
    for seed in range(2):
        Store(store).write(done_record(fake_resolve(parse_config({"method": "finetune", "seed": seed}, "test"))))

    def printed(*arguments: str, code: int = 0) -> str:
        assert main([*arguments]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    assert "finetune on" in printed("table", "--store", store, "--trace", "finetune")
    assert "| row" in printed("table", "--store", store, "--rows", "method", "--cols", "data.max_tokens")
    assert "Table 2" not in printed("table", "--store", store, "--paper", "--tests", "--clean")
    assert "drawn: " in printed("plot", "bars", store, "-o", str(tmp_path / "bars.svg"))
    assert "error: no run of the store has weights" in printed("weights", store, code=2)
    assert "has no stored predictions" in printed("errors", "finetune", "--store", store, code=2)
    assert "written: " in printed("report", store, "-o", str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "cannot be written" in printed("report", store, "-o", str(tmp_path / "bars.svg" / "x.html"), code=2)
    assert json.loads(printed("query", "select count(*) as n from results", "--store", store, "--format", "json")) == [
        {"n": 2}
    ]
    assert "| 2   |" in printed("query", "select count(*) as n from results", "--store", store)
    assert "2 runs copied, 0 were there already" in printed("store", "merge", other, store)
    assert "6 files before, 3 now" in printed("store", "compact", other)
    assert "is sound" in printed("store", "verify", other)
    for packed in Path(other).rglob("results/**/*.parquet"):
        packed.write_bytes(b"no Parquet")
    assert "error: " in printed("store", "verify", other, code=1)


@pytest.mark.parametrize("script", JOBS)
def test_jobs_are_the_same_verbs(script: str, tmp_path: Path) -> None:
    """The same arguments, the same one line, the same exit code."""
    command = [sys.executable, f"jobs/{script}", "--nothing"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.strip()) == (2, "error: No such option: --nothing")
    shown = subprocess.run([sys.executable, f"jobs/{script}", "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    assert f"aang {JOBS[script]}" in shown.stdout


def test_a_machine_without_a_home_says_what_to_set(tmp_path: Path) -> None:
    """The cache cannot be made there. The table of a store needs none."""
    environment = {**os.environ, "HOME": "/proc/none", "PYTHONPATH": str(Path.cwd())}
    environment.pop("AANG_CACHE", None)

    def run(*arguments: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "aang_ray", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/proc", env=environment)
        return result.returncode, result.stderr

    code, error = run("data", "show", "movie")
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: the cache folder /proc/none/.cache/aang_ray cannot be made")
    assert "set AANG_CACHE" in error
    code, error = run("table", "--store", str(tmp_path / "none"))
    assert (code, error.count("\n")) == (2, 1)
    assert "there is no store at" in error
