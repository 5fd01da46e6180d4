"""The sweep file: its runs, their order, and error messages of one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.config import RunConfig, parse_config
from aang_ray.config.methods import AangConfig
from aang_ray.errors import UserError
from aang_ray.sweep.plan import plan
from aang_ray.sweep.spec import Asha, SweepOverrides, SweepSpec, check_space, expand, load_sweep, parse_seeds
from tests.sweep.conftest import fake_resolve

NOTHING = SweepOverrides()


def runs_of(overrides: SweepOverrides = NOTHING, **fields: object) -> list[RunConfig]:
    return expand(SweepSpec.model_validate(fields), overrides, "sweep.yaml")


def aux_lr(config: RunConfig) -> float | None:
    return config.method.aux_lr if isinstance(config.method, AangConfig) else None


def test_tasks_times_methods_tasks_slowest() -> None:
    runs = runs_of(tasks=["movie", "tweets"], methods=["finetune", {"method": "static", "n": 3}])
    assert [(run.data.task, run.row_name) for run in runs] == [
        ("movie", "finetune"),
        ("movie", "static-td n=3"),
        ("tweets", "finetune"),
        ("tweets", "static-td n=3"),
    ]


def test_grid_reaches_the_methods_that_have_the_setting() -> None:
    runs = runs_of(methods=["finetune", "static", "aang"], grid={"method.aux_lr": [1.0, 0.1]})
    assert [(run.method.name, aux_lr(run)) for run in runs] == [
        ("finetune", None),
        ("static", None),
        ("aang", 1.0),
        ("aang", 0.1),
    ]


def test_a_methods_own_grid_overrides_the_common_one() -> None:
    methods = [{"method": "aang", "grid": {"n": [3, 6], "method.aux_lr": [0.5]}}]
    runs = runs_of(methods=methods, grid={"method.aux_lr": [1.0, 0.1], "n": [1]})
    assert [(run.n, aux_lr(run)) for run in runs] == [(3, 0.5), (6, 0.5)]


def test_a_learning_curve_is_one_line() -> None:
    runs = runs_of(methods=["finetune"], grid={"data.train_size": [100, 300, 1000]})
    assert [run.data.train_size for run in runs] == [100, 300, 1000]


def test_methods_lie_over_the_base_section_by_section() -> None:
    base = {"optim": {"body_lr": 1e-5, "head_lr": 2e-3}, "n": 3}
    (run,) = runs_of(base=base, methods=[{"method": "static", "optim": {"body_lr": 5e-5}}])
    assert (run.optim.body_lr, run.optim.head_lr, run.n) == (5e-5, 2e-3, 3)


def test_a_task_may_be_a_mapping_and_defaults_to_the_base() -> None:
    base = {"data": {"task": "tweets", "train_size": 100}}
    (run,) = runs_of(base=base, methods=["finetune"])
    assert (run.data.task, run.data.train_size) == ("tweets", 100)
    (run,) = runs_of(base=base, tasks=[{"task": "movie", "metric": "macro_f1"}], methods=["finetune"])
    assert (run.data.task, run.data.metric, run.data.train_size) == ("movie", "macro_f1", 100)


def test_command_line_settings_come_last_and_only_where_they_apply() -> None:
    overrides = SweepOverrides(metric="macro_f1", settings=("method.aux_lr=0.7", "optim.body_lr=1e-5"))
    runs = runs_of(overrides, methods=["finetune", {"method": {"name": "aang", "aux_lr": 0.1}}])
    assert [aux_lr(run) for run in runs] == [None, 0.7]
    assert all(run.optim.body_lr == 1e-5 and run.data.metric == "macro_f1" for run in runs)


def test_equal_runs_are_one() -> None:
    assert len(runs_of(methods=["finetune", "finetune", {"method": {"name": "finetune"}}])) == 1


def test_paths_become_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("mytask", "encoder", "movie"):
        (tmp_path / folder).mkdir()
    (tmp_path / "space.yaml").write_text("[]")
    monkeypatch.chdir(tmp_path)
    base = {"encoder": {"name": "./encoder"}, "space": "space.yaml"}
    movie, mine = runs_of(base=base, tasks=["movie", "./mytask"], methods=["aang"])
    assert (movie.data.task, mine.data.task) == ("movie", str(tmp_path / "mytask"))
    assert (mine.encoder.name, mine.space) == (str(tmp_path / "encoder"), str(tmp_path / "space.yaml"))


def test_command_line_tasks_and_seeds_replace_the_files(sweep_file: Callable[[str], Path]) -> None:
    path = sweep_file("tasks: [movie]\nmethods: [finetune]\nseeds: [0, 1]\n")
    spec = load_sweep(path, SweepOverrides(tasks=("a", "b"), seeds=(5,)))
    assert (spec.tasks, spec.seeds) == (["a", "b"], [5])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("methods: [finetun]", r"methods\[0\]: method.name: 'finetun' is not one of .*did you mean finetune"),
        ("methods: []", "methods: "),
        ("methods: [aang]\nseed: [1]", "unknown key seed; did you mean seeds"),
        ("methods: [aang]\nseeds: [-1]", "seeds.0: must be greater than or equal to 0, got -1"),
        ("methods: [aang]\nseeds: 3", "seeds: must be a valid list, got 3"),
        ("methods: [aang]\ngrid: {method.auxlr: [1]}", "grid: unknown key method.auxlr; did you mean method.aux_lr"),
        ("methods: [aang]\ngrid: {method.nosuch: [1]}", "grid: unknown key method.nosuch; allowed: a"),
        (
            "methods: [upgrad, {method: {name: tapt}}]\ngrid: {method.aux_lr: [1, 2]}",
            r"grid: no method of the sweep \(upgrad, tapt\) has method.aux_lr; it is of aang$",
        ),
        (
            "methods: [{n: 3}]\nbase: {method: mgda}\nsearch: {samples: 2, space: {method.aux_lr: [1, 2]}}",
            r"search.space: no method of the sweep \(mgda\) has method.aux_lr",
        ),
        ("methods: [aang]\ngrid: {seed: [1]}", "grid: seed is not set here, use seeds"),
        ("methods: [{method: aang, grid: {data.task: [x]}}]", r"methods\[0\].grid: data.task is not set here"),
        ("methods: [{method: finetune, grid: {method.aux_lr: [1]}}]", "unknown key method.aux_lr"),
        ("methods: [{method: aang, grid: {n: 3}}]", r"methods\[0\].grid: expected settings with a list"),
        ("methods: [aang]\nbase: {data: 3}", "base: data: expected a section of settings, got 3"),
        ("methods: [aang]\nbase: {optim: {body_l: 1}}", "unknown key optim.body_l; did you mean optim.body_lr"),
        ("optim: {body_lr: 1}", "not a sweep file"),
        ("methods: [aang", "not valid YAML"),
    ],
)
def test_one_clear_line(sweep_file: Callable[[str], Path], text: str, line: str) -> None:
    path = sweep_file(text)
    with pytest.raises(UserError, match=line) as caught:
        expand(load_sweep(path, NOTHING), NOTHING, str(path))
    assert "\n" not in str(caught.value)


def test_a_grid_reaches_the_default_method() -> None:
    assert [aux_lr(run) for run in runs_of(methods=[{"n": 3}], grid={"method.aux_lr": [1, 2]})] == [1, 2]


@given(st.lists(st.integers(0, 99), min_size=1))
def test_seeds_as_a_list(seeds: list[int]) -> None:
    assert parse_seeds(",".join(map(str, seeds))) == tuple(dict.fromkeys(seeds))


def test_seeds_as_ranges() -> None:
    assert parse_seeds("0-2, 7,1-3") == (0, 1, 2, 7, 3)
    for text in ("", "a", "1-", "-1", "2-1", "1,,2"):
        with pytest.raises(UserError, match="--seeds"):
            parse_seeds(text)


def test_the_demo_compares_three_methods_at_equal_budgets() -> None:
    for path in (Path("jobs/demo.yaml"), Path("jobs/own_data.yaml")):
        spec = load_sweep(path, NOTHING)
        runs = expand(spec, NOTHING, str(path))
        assert [run.method.name for run in runs] == ["finetune", "static", "aang"]
        assert len(spec.seeds) == 3
        tied = path.name == "demo.yaml"  # there fine-tuning sees as many examples in all, here as many of the task
        work = {
            run.train_steps * ((run.batch.end_task or 0) + (48 if tied and run.method.auxiliary else 0)) for run in runs
        }
        assert len(work) == 1


def test_a_label_makes_rows_of_one_method_stand_apart() -> None:
    methods = ["static", {"method": "static", "n": 3, "label": "static, few"}]
    cells = plan(runs_of(methods=methods), [0], {}, fake_resolve)
    assert [cell.title for cell in cells] == ["movie · static-td n=6 · seed 0", "movie · static, few · seed 0"]
    unlabelled = plan(runs_of(methods=["static", {"method": "static", "n": 3}]), [0], {}, fake_resolve)
    assert [cell.cell for cell in cells] == [cell.cell for cell in unlabelled]


def run_of(**more: object) -> RunConfig:
    """A run of 60 steps that is evaluated after every sixth."""
    return fake_resolve(parse_config({"method": "finetune", "schedule": {"eval_every": 6}, **more}, "test"))


def test_rungs() -> None:
    assert Asha(0.1, 3).rungs(run_of()) == [(0.1, 6), (pytest.approx(0.3), 18), (pytest.approx(0.9), 54)]
    assert Asha(0.5, 2).rungs(run_of()) == [(0.5, 30)]
    assert Asha(0.01, 10).rungs(run_of()) == [(0.01, 6)], "at 0.6 and at 6 steps: after an evaluation, each step once"
    pretrained = run_of(final_finetune={"steps": 12, "body_lr": 1e-5})
    assert [step for _, step in Asha(0.1, 3).rungs(pretrained)] == [6, 18, 54], "in the stage that dev decides"


@pytest.mark.parametrize("values", [{"grace": 0.0}, {"grace": 1.0}, {"reduction": 1}])
def test_settings_without_rungs_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--grace|--reduction"):
        Asha(**values)


@pytest.mark.parametrize(
    ("search", "line"),
    [
        ("{space: {n: [1]}}", "search.samples is missing"),
        ("{samples: 0, space: {n: [1]}}", "search.samples: "),
        ("{samples: 2, space: {}}", "search.space: "),
        ("{samples: 2, space: {n: {integer: [3, 1]}}}", "low below high"),
        ("{samples: 2, space: {n: {integer: [1.5, 3]}}}", "whole bounds"),
        ("{samples: 2, space: {optim.clip: {log: [0, 1]}}}", "bounds above 0"),
        ("{samples: 2, space: {optim.clip: {}}}", "one of uniform, log, integer"),
        ("{samples: 2, space: {optim.clipp: [1.0]}}", "unknown key optim.clipp; did you mean optim.clip"),
        ("{samples: 2, space: {seed: [1]}}", "seed is not set here, use seeds"),
        ("{samples: 2, space: {optim.clip: [-1.0]}}", "optim.clip"),
    ],
)
def test_one_clear_line_about_a_search(sweep_file: Callable[[str], Path], search: str, line: str) -> None:
    path = sweep_file(f"methods: [finetune]\nsearch: {search}")
    with pytest.raises(UserError, match=line) as caught:
        checked(path)
    assert "\n" not in str(caught.value)


def checked(path: Path) -> None:
    """Check a sweep file as `aang sweep` does before it runs anything."""
    spec = load_sweep(path, SweepOverrides())
    runs = expand(spec, SweepOverrides(), str(path))
    assert spec.search is not None
    check_space(spec.search, runs)


def test_numbers_as_people_write_them(sweep_file: Callable[[str], Path]) -> None:
    checked(sweep_file("methods: [finetune]\nsearch: {samples: 2, space: {optim.body_lr: {log: [1e-5, 1e-3]}}}"))
    checked(sweep_file("methods: [finetune]\nsearch: {samples: 2, space: {optim.body_lr: [1e-5, 0.001]}}"))
