"""`ray job submit` against a local head."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from aang_ray.store import Store
from tests.integration.conftest import Start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture
def head(start: Start, environment: dict[str, str], short_folder: Path) -> str:
    """Address of the job server of a head of our own, on this machine alone."""
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    port, dashboard, client, agent = free_ports(4)
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": client,
        "dashboard-agent-listen-port": agent,
        "num-cpus": 2,
        "object-store-memory": 160 * 2**20,
        "temp-dir": short_folder / "head",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    ray = start(["ray", "start", "--head", "--block", "--include-dashboard=true", *flags], environment)

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", dashboard)) == 0

    ray.wait_for(listens, 60)
    ray.look()
    return f"http://127.0.0.1:{dashboard}"


def test_a_sweep_as_a_job(
    start: Start, head: str, sweep_file: Callable[..., Path], environment: dict[str, str], tmp_path: Path
) -> None:
    file, store = sweep_file(["finetune", "static"], 1, steps=10), tmp_path / "store"
    submit = ["ray", "job", "submit", "--address", head, "--working-dir", ".", "--", "python", "jobs/sweep.py"]
    job = start([*submit, str(file), "--store", str(store)], environment)
    assert job.wait(180) == 0, job.output
    rows = Store(store).results().to_pylist()
    assert sorted((row["method"], row["status"]) for row in rows) == [("finetune", "done"), ("static", "done")]
    assert "[2/2] task" in job.output
    assert "| finetune" in job.output

    relative = start([*submit, str(file), "--store", "results"], environment)
    assert relative.wait(120) == 1  # Ray's own exit code for a job that ended with any other than 0
    assert (
        "error: --store results: the folder of a Ray job goes away; give an absolute path or a URI" in relative.output
    )
