"""What `aang status` prints about a cluster, and heads that answer or do not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from ray.core.generated import autoscaler_pb2 as messages
from ray.core.generated.autoscaler_pb2_grpc import (
    AutoscalerStateServiceServicer,
    add_AutoscalerStateServiceServicer_to_server,
)
from rich.console import Console

from aang_ray.config import parse_config
from aang_ray.errors import RunFailure
from aang_ray.sweep import cluster as module
from aang_ray.sweep.cluster import ask, cluster_lines, describe_cluster
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import SweepProgress
from tests.integration.conftest import free_ports
from tests.sweep.conftest import fake_resolve

NOW = 1_700_000_000.0


def add_node(reply: Any, status: str, total: dict[str, float], free: dict[str, float] | None = None) -> None:
    node = reply.cluster_resource_state.node_states.add(status=messages.NodeStatus.Value(status))
    node.total_resources.update(total)
    node.available_resources.update(total if free is None else free)


def add_gang(requests: Any, *bundles: dict[str, float]) -> None:
    gang = requests.add(details="a2:PACK|PENDING")
    for bundle in bundles:
        gang.requests.add().resources_bundle.update(bundle)


def idle() -> Any:
    """Ray's report of a head alone, without an autoscaler."""
    reply = messages.GetClusterStatusReply()
    add_node(reply, "IDLE", {"node:__internal_head__": 1.0})
    return reply


def busy() -> Any:
    """Ray's report of a busy cluster with spot machines."""
    reply = idle()
    add_node(reply, "RUNNING", {"CPU": 4, "GPU": 1, "memory": 1e9}, {"CPU": 1, "GPU": 0.5})
    add_node(reply, "RUNNING", {"CPU": 4, "GPU": 1}, {"memory": 1e9})  # Ray leaves out what is used up
    add_node(reply, "DRAINING", {"CPU": 4, "GPU": 1})
    add_node(reply, "DEAD", {"CPU": 64})
    autoscaler = reply.autoscaling_state
    autoscaler.pending_instance_requests.add(ray_node_type_name="gpu-spot", count=2)
    autoscaler.pending_instances.add(ray_node_type_name="gpu-spot")
    autoscaler.pending_instances.add(ray_node_type_name="gpu-on-demand")
    for before, reason in ((900, "no spot\ncapacity"), (65, "no spot\ncapacity"), (5, "quota")):
        launch = autoscaler.failed_instance_requests.add(ray_node_type_name="gpu-spot", count=1, reason=reason)
        launch.failed_ts = int(NOW) - before
    cluster = reply.cluster_resource_state
    cluster.pending_resource_requests.add(count=2).request.resources_bundle.update({"CPU": 1})
    cluster.pending_resource_requests.add(count=9).request.resources_bundle.update({"CPU_group_0_a2": 1})
    add_gang(cluster.pending_gang_resource_requests, {"GPU": 0.25, "CPU": 1})
    add_gang(cluster.pending_gang_resource_requests, {"CPU": 1})
    add_gang(cluster.pending_gang_resource_requests, {"CPU": 0.99}, {"CPU": 0.99})
    autoscaler.infeasible_resource_requests.add().resources_bundle.update({"CPU": 1})
    add_gang(autoscaler.infeasible_gang_resource_requests, {"CPU": 0.99}, {"CPU": 0.99})
    return reply


def test_a_night_on_spot_machines() -> None:
    assert list(describe_cluster(busy(), NOW)) == [
        "1 node with 0 CPU, 2 nodes with 4 CPU and 1 GPU; 7 of 8 CPU and 1.5 of 2 GPU in use",
        "drained, going away: 1 node with 4 CPU and 1 GPU",
        "being started: 1 gpu-on-demand, 3 gpu-spot",
        "not started: 2 gpu-spot, the last 1 min 05 s ago: no spot capacity",
        "not started: 1 gpu-spot, 5 s ago: quota",
        "waiting for room: 1 x (2 x 0.99 CPU), 3 x 1 CPU, 1 x 1 CPU and 0.25 GPU",
        "no node is added for 1 x (2 x 0.99 CPU), 1 x 1 CPU: their number has reached its limit, "
        "or no type is large enough",
    ]


def test_nothing_is_said_of_what_is_not_there() -> None:
    assert list(describe_cluster(idle(), NOW)) == ["1 node with 0 CPU; 0 of 0 CPU in use"]


TOKEN = "0123456789abcdef" * 4


class Service(AutoscalerStateServiceServicer):  # type: ignore[misc]
    """The service of a head that `aang status` asks."""

    def __init__(self) -> None:
        self.over = threading.Event()
        self.silent = False
        self.token: str | None = None
        self.reply = idle()

    def GetClusterStatus(self, request: Any, context: Any) -> Any:
        if self.silent:
            self.over.wait()
        shown = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and shown != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: Authentication token is\nincorrect")
        return self.reply


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service that answers at RAY_ADDRESS."""
    service = Service()
    server = grpc.server(ThreadPoolExecutor(2))
    add_AutoscalerStateServiceServicer_to_server(service, server)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    server.start()
    yield service
    service.over.set()
    server.stop(None).wait()


def test_a_head_answers(service: Service) -> None:
    address = os.environ["RAY_ADDRESS"]
    service.reply = busy()
    first, second, *_ = cluster_lines()
    assert first.startswith(f"cluster at {address}: 1 node with 0 CPU, 2 nodes with")
    assert second == "  drained, going away: 1 node with 4 CPU and 1 GPU"


def test_a_head_that_hangs_is_not_waited_for(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ASK_SECONDS", 0.2)
    service.silent = True
    with pytest.raises(RunFailure, match=r"nothing came within 0\.2 s"):
        ask(os.environ["RAY_ADDRESS"])


def test_a_head_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (line,) = cluster_lines()
    assert line.startswith(f"the cluster at 127.0.0.1:{port} does not answer: ")
    assert "Connection refused" in line
    assert "\n" not in line


@pytest.mark.parametrize("address", ["ray://head:10001", "http://127.0.0.1:8265"])
def test_other_kinds_of_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    (line,) = cluster_lines()
    assert line == f"the cluster at {address} is not asked: RAY_ADDRESS must be HOST:PORT of its head, or auto there"


@pytest.mark.parametrize("address", [None, "", "local"])
def test_a_sweep_of_this_machine_alone_has_no_cluster_to_ask(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster_lines() == []


def test_the_store_is_read_whatever_the_cluster_says(service: Service, tmp_path: Path) -> None:
    """The token is set in a separate process, because Ray reads its mode only once."""
    run = fake_resolve(parse_config({"method": "finetune"}, "test"))
    with SweepProgress(str(tmp_path / "store"), "nightly", "key", Console(quiet=True)) as progress:
        progress.add([PlannedCell(run, run.cell, "waiting")])
    service.token = TOKEN
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH_")}
    address = os.environ["RAY_ADDRESS"]
    refused = f"the cluster at {address} does not answer: InvalidAuthToken: Authentication token is incorrect; "
    answered = f"cluster at {address}: 1 node with 0 CPU"
    for more, beginning in (
        ({"RAY_AUTH_TOKEN": TOKEN}, answered),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}, refused),
        ({"RAY_AUTH_MODE": "token"}, f"the cluster at {address} does not answer: no token was found; "),
    ):
        done = subprocess.run(
            [str(Path(sys.executable).with_name("aang")), "status", "--store", str(tmp_path / "store")],
            env=plain | {"HOME": str(tmp_path)} | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert [done.returncode, done.stderr] == [0, ""]
        first, second, *_ = done.stdout.splitlines()
        assert first.startswith(beginning)
        assert second.startswith("nightly: 1 cells: 1 waiting")
