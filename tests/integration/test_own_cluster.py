"""The cluster that a sweep starts on its own machine refuses requests without a token on every port."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.client import BadStatusLine
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import grpc
import psutil
import pytest

from tests.integration.conftest import Start, Started

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SCRIPT = """
import json, os, threading
from aang_ray.sweep.cluster import ray_cluster

with ray_cluster():
    from ray._private.worker import global_worker
    print("cluster", json.dumps([global_worker.node.webui_url, os.environ["RAY_AUTH_TOKEN"]]), flush=True)
    threading.Event().wait()
"""

METHODS = (
    "autoscaler.AutoscalerStateService/GetClusterStatus",  # the control service
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "CoreWorkerService/PushTask",  # runs code: drivers and trials
    "ReporterService/HealthCheck",  # the agent of a node
)
"""One of each service that answers somewhere; all in `ray.rpc`."""

Address = tuple[str, int]


@pytest.fixture
def cluster(start: Start, environment: dict[str, str]) -> tuple[Started, str, str]:
    """A process with its cluster, the dashboard's address and the token."""
    process = start([sys.executable, "-c", SCRIPT], environment)
    process.wait_for(lambda: "cluster [" in process.output and process.output.endswith("\n"), 120)
    line = next(line for line in process.output.splitlines() if line.startswith("cluster ["))
    dashboard, token = json.loads(line.removeprefix("cluster "))
    return process, dashboard, token


def get(url: str, token: str | None = None, data: bytes | None = None) -> tuple[int, bytes]:
    """Return the status and the start of the answer, without a proxy; with data the request is a POST."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with build_opener(ProxyHandler({})).open(Request(url, data=data, headers=headers), timeout=20) as answer:
            return answer.status, answer.read(100)
    except HTTPError as error:
        return error.code, error.read(100)


def listening(process: Started) -> Iterator[Address]:
    """Addresses on which the process and its descendants listen."""
    for member in process.look():
        with suppress(psutil.NoSuchProcess):
            for connection in member.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    yield connection.laddr.ip, connection.laddr.port


def called(host: str, port: int) -> set[str]:
    """Status codes with which a gRPC port answers calls of Ray's methods."""
    codes = set()
    with grpc.insecure_channel(f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        for method in METHODS:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=20)
                codes.add("OK")
            except grpc.RpcError as error:
                codes.add(error.code().name)
    return codes - {"UNIMPLEMENTED"}


def behaviour(host: str, port: int) -> str:
    """How an address answers requests without a token."""
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    with socket.socket() as probe:
        if probe.connect_ex((host, port)) != 0:
            return "gone"  # an idle worker that has ended
    try:
        status, text = get(f"http://{host}:{port}/api/jobs/")
    except (BadStatusLine, ConnectionError):
        codes = called(host, port)
        return "refused" if codes == {"UNAUTHENTICATED"} else f"{host}:{port} is open: {codes}"
    if status in (401, 403):
        return "refused"
    # Prometheus' text for any path: counters to read, nothing to do.
    return "metrics" if text.startswith(b"# HELP") else f"{host}:{port} is open: {status} {text!r}"


def test_nobody_without_the_token_is_served(cluster: tuple[Started, str, str]) -> None:
    process, dashboard, token = cluster
    jobs = f"http://{dashboard}/api/jobs/"
    job = json.dumps({"entrypoint": "true"}).encode()
    assert [get(jobs)[0], get(jobs, "f" * 64)[0], get(jobs, token)[0]] == [401, 403, 200]
    assert [get(jobs, None, job)[0], get(jobs, "f" * 64, job)[0]] == [401, 403]

    ports = sorted(set(listening(process)))
    assert {host for host, port in ports if dashboard.endswith(f":{port}")} == {"127.0.0.1"}
    found = [behaviour(host, port) for host, port in ports]
    assert set(found) <= {"refused", "metrics", "gone"}
    assert found.count("refused") >= 5, "dashboard, control service, two ports of the node, driver"
