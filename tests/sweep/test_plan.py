"""The cells of a sweep: order, states, work, resources of a trial, and the estimate of time."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from aang_ray.config import RunConfig, parse_config
from aang_ray.store import Status, Store
from aang_ray.sweep.plan import (
    OWN_CPUS,
    Need,
    PlannedCell,
    duration,
    plan,
    preview,
    seconds_per_text,
    to_run,
    trials_at_once,
)
from aang_ray.train.record import failed_record
from tests.sweep.conftest import done_record, fake_resolve


def config(**mapping: Any) -> RunConfig:
    return fake_resolve(parse_config(mapping, "test"))


def cells_of(
    *runs: RunConfig, seeds: tuple[int, ...] = (0,), status: dict[str, Status] | None = None
) -> list[PlannedCell]:
    return plan(runs, seeds, status or {}, fake_resolve)


def test_seeds_vary_slowest_so_that_a_cut_sweep_holds_whole_seeds() -> None:
    cells = cells_of(config(method="finetune"), config(method="aang"), seeds=(0, 1))
    assert [(cell.config.method.name, cell.config.seed) for cell in cells] == [
        ("finetune", 0),
        ("aang", 0),
        ("finetune", 1),
        ("aang", 1),
    ]


def test_runs_that_differ_in_nothing_that_matters_are_one_cell() -> None:
    # n concerns auxiliary objectives alone, so fine-tuning at n = 3 and n = 6 is the same run.
    assert len(cells_of(config(method="finetune", n=3), config(method="finetune", n=6))) == 1
    assert len(cells_of(config(method="static", n=3), config(method="static", n=6))) == 2


def test_cells_of_one_row_are_told_apart() -> None:
    """By the settings that differ; what changes no result, and what the method does not use, is no difference."""
    rates = [config(method={"name": "aang", "aux_lr": rate}, n=6) for rate in (1.0, 0.1)]
    other = config(method={"name": "aang", "aux_lr": 0.1}, n=6, data={"task": "elsewhere/movie"})
    plain = [config(method="finetune", n=3), config(method="finetune", n=6, resources={"threads": 2})]
    assert [cell.title for cell in cells_of(*rates, *plain)] == [
        "movie · aang-td n=6 (method.aux_lr=1.0) · seed 0",
        "movie · aang-td n=6 (method.aux_lr=0.1) · seed 0",
        "movie · finetune · seed 0",
    ]
    assert [cell.title for cell in cells_of(rates[1], other)] == [
        "movie · aang-td n=6 (data.task=movie) · seed 0",
        "movie · aang-td n=6 (data.task=elsewhere/movie) · seed 0",
    ]


def test_each_run_is_resolved_once_whatever_the_seeds() -> None:
    calls: list[RunConfig] = []

    def resolve(run: RunConfig) -> RunConfig:
        calls.append(run)
        return fake_resolve(run)

    assert len(plan([config(method="aang")], range(5), {}, resolve)) == 5
    assert len(calls) == 1


def test_states_come_from_the_store() -> None:
    runs = [config(method=name, seed=seed) for seed in (0, 1) for name in ("finetune", "static")]
    status: dict[str, Status] = {runs[0].cell: "done", runs[1].cell: "failed"}
    cells = [*cells_of(*runs[:2], status=status), *cells_of(*runs[:2], seeds=(1,), status={runs[2].cell: "cut"})]
    assert [cell.state for cell in cells] == ["done", "failed", "cut", "waiting"]
    assert [cell.state for cell in to_run(cells, keep_failed=False)] == ["failed", "cut", "waiting"]
    assert [cell.state for cell in to_run(cells, keep_failed=True)] == ["cut", "waiting"]


def test_work_counts_what_goes_through_the_body() -> None:
    # 60 steps x 32 end-task (+ 48 auxiliary (+ 32 dev)) texts
    work = [cell.work for cell in cells_of(*(config(method=name) for name in ("finetune", "static", "aang")))]
    assert work == [60 * 32, 60 * 80, 60 * 112]


def finished(run: RunConfig, seconds: float, steps: int) -> dict[str, Any]:
    return {"row": run.row_name, "config": run.model_dump(mode="json"), "seconds": seconds, "steps": steps}


def test_time_estimate_prefers_the_same_row() -> None:
    static, aang, other = config(method="static"), config(method="aang"), config(encoder={"layers": 2})
    # static stopped at half of its 60 x 80 texts after 24 s: 0.01 s a text; aang did 60 x 112 texts in 134.4 s: 0.02.
    rows = [finished(static, 24.0, 30), finished(aang, 134.4, 60)]
    assert seconds_per_text(static, rows) == pytest.approx(0.01)
    assert seconds_per_text(aang, rows) == pytest.approx(0.02)
    assert seconds_per_text(config(method="finetune"), rows) == pytest.approx((24 + 134.4) / (2400 + 6720))
    assert seconds_per_text(other, rows) is None


def test_rows_that_this_version_would_refuse_have_no_say_in_the_estimate() -> None:
    static = config(method="static")
    strange = finished(static, 1000.0, 60)
    strange["config"] = {**strange["config"], "a_setting_of_another_version": 1}
    assert seconds_per_text(static, [strange, finished(static, 24.0, 30)]) == pytest.approx(0.01)


def text_of(cells: list[PlannedCell], store: Store, *, keep_failed: bool = False) -> str:
    console = Console(file=io.StringIO(), width=200)
    preview(cells, store, console, keep_failed=keep_failed)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_preview_without_a_measure_says_so(tmp_path: Path) -> None:
    text = text_of(cells_of(config(method="finetune"), config(method="aang")), Store(tmp_path))
    assert "2 cells, 2 to run: 120 steps at most, 8,640 texts through the body" in text
    assert "time: unknown until a first cell with this encoder has finished" in text


def test_preview_measures_by_the_store(tmp_path: Path) -> None:
    runs = [config(method=name) for name in ("finetune", "static", "aang")]
    store = Store(tmp_path)
    store.write(done_record(runs[0], seconds=19.2))  # 60 x 32 texts: 0.01 s a text
    store.write(failed_record(runs[1], "out of memory"))
    cells = cells_of(*runs, status=dict(store.done()))
    text = text_of(cells, store)
    assert all(state in text for state in ("done", "failed", "waiting"))
    assert "3 cells, 2 to run" in text
    assert "time: at most about" in text
    assert "3 cells, 1 to run" in text_of(cells, store, keep_failed=True)


def test_nothing_left_needs_no_time(tmp_path: Path) -> None:
    run = config(method="finetune")
    text = text_of(cells_of(run, status={run.cell: "done"}), Store(tmp_path))
    assert "1 cells, 0 to run" in text
    assert "time" not in text


def need(**resources: Any) -> Need:
    return Need.of(parse_config({"resources": resources}, "test"))


@pytest.mark.parametrize(
    ("resources", "nodes", "trials"),
    [
        ({"cpus": 1}, [{"CPU": 4.0}], 4),
        ({"cpus": 3}, [{"CPU": 4.0}, {"CPU": 4.0}], 2),  # not 8 // 3: the rest of one node is of no use to the other
        ({"cpus": 1, "gpus": 0.1}, [{"CPU": 64.0, "GPU": 1.0}], 10),
        ({"cpus": 1, "gpus": 1}, [{"CPU": 4.0}], 0),
        ({"workers": 2, "cpus_per_worker": 1}, [{"CPU": 2.0}], 1),  # both cores, and room for the trial's own process
        ({"workers": 2, "cpus_per_worker": 3}, [{"CPU": 4.0}, {"CPU": 4.0}], 1),
        ({"workers": 2, "cpus_per_worker": 3}, [{"CPU": 5.0}], 0),
        ({"workers": 3, "gpus_per_worker": 1}, [{"CPU": 4.0, "GPU": 1.0}] * 8, 2),
        ({"workers": 2, "gpus_per_worker": 0.5}, [{"CPU": 4.0, "GPU": 1.0}] * 3, 3),
        ({"cpus": 1}, [], 0),
    ],
)
def test_trials_that_nodes_hold(resources: dict[str, Any], nodes: list[dict[str, float]], trials: int) -> None:
    assert need(**resources).held_by(nodes) == trials


def test_what_is_reserved() -> None:
    alone, nested = need(cpus=2, gpus=0.25), need(workers=2, cpus_per_worker=2, gpus_per_worker=1, cpus=7)
    assert alone.trial == {"cpu": 2.0, "gpu": 0.25}
    assert alone.bundles == [{"CPU": 2.0, "GPU": 0.25}]
    assert nested.trial == {"cpu": OWN_CPUS, "gpu": 0.0}
    assert nested.bundles == [{"CPU": 1.98, "GPU": 1.0}] * 2
    assert (str(alone), str(nested)) == ("2 CPU and 0.25 GPU", "2 workers of 2 CPU and 1 GPU each")


@given(
    workers=st.integers(2, 5),
    cpus=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    nodes=st.lists(st.sampled_from([1.0, 2.0, 4.0, 8.0]), max_size=6),
)
def test_wherever_ray_puts_the_trials_themselves_their_workers_fit(
    workers: int, cpus: float, nodes: list[float]
) -> None:
    # At worst the processes of all trials are on one node, and it has no worker less for that.
    wanted = need(workers=workers, cpus_per_worker=cpus)
    trials = wanted.held_by([{"CPU": node} for node in nodes])
    for node in nodes:
        without = int(node / wanted.worker_cpus + 1e-9)
        assert int((node - trials * OWN_CPUS) / wanted.worker_cpus + 1e-9) == without


def test_trials_at_once_are_at_least_one_and_at_most_all() -> None:
    small, large = need(cpus=1), need(cpus=3)
    assert trials_at_once([large, small, small], [{"CPU": 2.0}]) == 2
    assert trials_at_once([small], [{"CPU": 8.0}]) == 1
    assert trials_at_once([large], [{"CPU": 2.0}]) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
