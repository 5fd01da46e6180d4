"""`import aang_ray as aang`: quick to import, and the same verbs as the command line."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import aang_ray as aang
from aang_ray import api
from aang_ray.config import RunConfig, parse_config
from tests.sweep.conftest import done_record, fake_resolve
from tests.test_cli import HEAVY, install


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_import_loads_nothing_heavy() -> None:
    names = (*HEAVY, "pydantic", "yaml", "rich", "typer")
    assert run_python(f"import sys, aang_ray; print([name for name in {names!r} if name in sys.modules])") == "[]"


def test_every_name_of_the_face_is_there() -> None:
    for name in aang.__all__:
        assert getattr(aang, name) is not None
        assert name in dir(aang)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        _ = aang.trian


def test_functions_that_share_a_name_with_a_subpackage_are_both() -> None:
    code = """
import inspect
import aang_ray as aang
from aang_ray import api

def check():
    for name in ("train", "sweep", "objectives"):
        assert inspect.signature(getattr(aang, name)) == inspect.signature(getattr(api, name)), name

check()
import aang_ray.train.run, aang_ray.sweep.spec, aang_ray.objectives.space
check()
assert aang.train.run.run_cell
from ray import cloudpickle
assert cloudpickle.loads(cloudpickle.dumps(aang.train)) is aang.train
print(len(aang.objectives("td")))
"""
    assert run_python(code) == "32"


def test_train_takes_a_mapping_a_configuration_and_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs: list[RunConfig] = []

    def run_cell(config: RunConfig, **_: object) -> aang.CellRecord:
        runs.append(config)
        return done_record(config)

    install(monkeypatch, run_cell=run_cell)
    file = tmp_path / "run.yaml"
    file.write_text("method: static\nseed: 3\n")
    mapping = {"method": "static", "seed": 3}
    configuration = parse_config(mapping, "test")
    for number, config in enumerate((mapping, configuration, file, str(file))):
        record = aang.train(config, settings=["n=2"], store=tmp_path / str(number), quiet=True)
        assert record.result.status == "done"
        assert aang.Store(tmp_path / str(number)).done() == {record.result.cell: "done"}
    assert {(run.method.name, run.seed, run.n) for run in runs} == {("static", 3, 2)}
    with pytest.raises(aang.UserError, match=r"unknown key sed; did you mean seed\?"):
        aang.train({"sed": 1}, store=tmp_path)


def test_sweep_takes_a_mapping_and_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of cells that are all done, so that Ray does not start."""
    install(monkeypatch)
    mapping = {"methods": ["finetune"], "seeds": [0, 1]}
    file = tmp_path / "grid.yaml"
    file.write_text("methods: [finetune]\nseeds: [0, 1]\n")
    store = aang.Store(tmp_path / "store")
    for seed in (0, 1, 2):
        config = parse_config({"method": "finetune", "seed": seed, "optim": {"body_lr": 1e-3}}, "test")
        store.write(done_record(fake_resolve(config)))
    for spec in (mapping, file, str(file)):
        outcome = aang.sweep(spec, settings=["optim.body_lr=1e-3"], seeds=[0, 1, 2], store=store, quiet=True)
        assert (outcome.cells, outcome.done, outcome.remaining, dict(outcome.failed)) == (3, 3, 0, {})
    assert capsys.readouterr().out == ""


def test_the_table_is_a_frame(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = aang.Store(tmp_path)
    for seed in (0, 1):
        store.write(done_record(parse_config({"method": "finetune", "seed": seed}, "test")))
    for given in (store, tmp_path, str(tmp_path)):
        frame = aang.table(given)
        assert isinstance(frame, pd.DataFrame)
        assert list(frame["test_mean"]) == [0.75]
        assert frame["seeds"].iloc[0] == [0, 1]
    monkeypatch.setenv("AANG_STORE", str(tmp_path))
    assert len(aang.table(oracle=True)) == 2
    assert inspect.signature(aang.table) == inspect.signature(api.table)


def test_the_objectives_of_a_space() -> None:
    frame = aang.objectives("td", published=True)
    assert frame["legal"].sum() == 24
    assert set(frame["transform"]) == {"no-op", "mask", "replace", "bert-op"}
    assert frame.loc[~frame["legal"], "reason"].str.len().min() > 10
    assert frame.loc[frame["legal"], "reason"].isna().all()


def test_the_examples_of_the_docstrings() -> None:
    found = doctest.testmod(api, extraglobs={"aang": aang})
    assert (found.failed, found.attempted) == (0, 3)


def test_the_package_runs_as_a_program() -> None:
    result = subprocess.run([sys.executable, "-m", "aang_ray", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == aang.__version__
