"""Machines that stop during a run, with and without notice: the run continues on another machine."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aang_ray.config import RunConfig, parse_config
from aang_ray.store import CellRecord, Store
from aang_ray.sweep.cluster import ask, cluster_lines
from aang_ray.train.checkpoint import CheckpointFiles, checkpoint_folder
from aang_ray.train.plan import resolve
from aang_ray.train.run import run_cell
from aang_ray.train.workers.group import Workers
from tests.integration.conftest import Start, Started, free_ports, progress_of
from tests.train.parallel.processes import together

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

STEPS = 100

ENDLESS = 10_000_000
"""Steps of a run that is not over before its test is, however fast the machine."""

AANG = str(Path(sys.executable).with_name("aang"))


class Machines:
    """A head without CPUs and nodes of one CPU each, all on this machine."""

    def __init__(self, start: Start, environment: dict[str, str], folder: Path) -> None:
        self._start, self._folder = start, folder
        self._environment = environment | {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            # A machine that died is seen as dead after five seconds instead of some thirty.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000",
        }
        port, dashboard, client = free_ports(3)
        self.address = f"127.0.0.1:{port}"
        head = self._join(
            "head",
            0,
            "--head",
            f"--port={port}",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
        )
        head.wait_for(lambda: "Ray runtime started" in head.output, 90)

    def add(self, name: str) -> Started:
        """Add a node to the cluster; it joins a little later."""
        return self._join(name, 1, f"--address={self.address}")

    def _join(self, name: str, cpus: int, *flags: str) -> Started:
        (agent,) = free_ports(1)
        common = ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", f"--num-cpus={cpus}"]
        memory = f"--object-store-memory={100 * 2**20}"
        place = f"--temp-dir={self._folder / name}"
        return self._start(["ray", "start", "--block", *common, memory, place, *flags], self._environment)


@pytest.fixture
def machines(start: Start, environment: dict[str, str], short_folder: Path) -> Machines:
    return Machines(start, environment, short_folder)


def run_file(tiny: Path) -> dict[str, Any]:
    """A run of AANG with dropout on two workers, with a checkpoint after every step."""
    return {
        "data": {"task": str(tiny / "task")},
        "encoder": {"name": str(tiny / "encoder")},
        "method": {"name": "aang"},
        "n": 3,
        "batch": {"end_task": 8, "auxiliary": 6, "dev": 8, "dev_head": 8},
        "schedule": {"steps": STEPS, "eval_every": 10},
        "precision": "fp32",
        "resources": {"device": "cpu", "threads": 1, "workers": 2, "cpus_per_worker": 1.0, "checkpoint_minutes": 0},
    }


def numbers(record: CellRecord) -> dict[str, Any]:
    """A record without its times."""
    result = {key: value for key, value in vars(record.result).items() if key not in ("seconds", "finished_at")}
    history = [{**vars(row), "seconds": 0.0} for row in record.history]
    return {"result": result, "history": history, "weights": record.weights}


def undisturbed(workers: Workers, config: RunConfig) -> CellRecord:
    """The result of two worker processes that are not killed, started without Ray."""
    return run_cell(config, workers=workers)


def test_a_machine_dies_and_another_takes_over(
    machines: Machines,
    start: Start,
    environment: dict[str, str],
    tmp_path: Path,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AANG_CACHE", environment["AANG_CACHE"])
    value = run_file(tiny)
    config = resolve(parse_config(value, "test"))
    cell, store = config.cell, tmp_path / "store"
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(value), encoding="utf-8")
    machines.add("first")
    doomed = machines.add("second")
    train = [AANG, "train", str(file), "--store", str(store)]
    disturbed = start(train, environment | {"RAY_ADDRESS": machines.address, "RAY_AUTH_MODE": "disabled"})
    files = CheckpointFiles(checkpoint_folder(store), cell)
    disturbed.wait_for(lambda: files.newest_step() >= 3, 240, pause=0.01)
    doomed.kill()
    assert not Store(store).done(), "the run was over before the machine died"
    machines.add("third")
    assert disturbed.wait(400) == 0, disturbed.output
    assert f"cell {cell} lost workers" in disturbed.output
    first, _ = together(2, tmp_path / "together", undisturbed, config)
    assert numbers(Store(store).record(cell)) == numbers(first)


def test_a_machine_that_got_its_notice_leaves_a_fresh_checkpoint(
    machines: Machines,
    start: Start,
    sweep_file: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = {"RAY_ADDRESS": machines.address, "RAY_AUTH_MODE": "disabled"}
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    store = str(tmp_path / "store")
    doomed = machines.add("first")
    rare = [f"--set={setting}" for setting in ("resources.checkpoint_minutes=10000", "schedule.eval_every=100")]
    sweep = start(
        [AANG, "sweep", str(sweep_file(["finetune"], 1, ENDLESS)), "--store", store, *rare], environment | cluster
    )
    sweep.wait_for(lambda: any(one["step"] for one in progress_of(store).values()), 240)
    (cell,) = progress_of(store)
    files = CheckpointFiles(checkpoint_folder(store), cell)
    assert files.newest_step() == 0, "it would have a checkpoint without the notice, too"

    state = ask(machines.address).cluster_resource_state
    (node,) = (node.node_id.hex() for node in state.node_states if "CPU" in node.total_resources)
    drain = ["ray", "drain-node", f"--address={machines.address}", f"--node-id={node}", "--reason-message=spot"]
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--deadline-remaining-seconds=600"]
    notice = start([*drain, *reason], environment | cluster)
    assert notice.wait(60) == 0, notice.output
    sweep.wait_for(lambda: files.newest_step() >= 1, 60)
    written = files.newest_step()
    sweep.wait_for(
        lambda: progress_of(store)[cell]["step"] > written, 120
    )  # it was no signal to end: the run trains on
    # A busy head may not answer in time, in a line that says so.
    sweep.wait_for(lambda: len(cluster_lines()) == 2, 60)
    first, second = cluster_lines()
    assert first.startswith(f"cluster at {machines.address}: 1 node with 0 CPU; ")
    assert second == "  drained, going away: 1 node with 1 CPU"
    doomed.kill()
    machines.add("second")
    sweep.wait_for(lambda: "continues from step" in sweep.output, 240)
    (went_on,) = re.findall(r"continues from step (\d+)\n", sweep.output)
    assert int(went_on) >= written
    sweep.wait_for(lambda: progress_of(store)[cell]["step"] > int(went_on), 120)
    sweep.terminate()
    assert sweep.wait(150) == 143, sweep.output
