"""Asking a running cluster, and one that does not answer."""

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
from ray.core.generated.autoscaler_pb2_grpc import (
    AutoscalerStateServiceServicer,
    add_AutoscalerStateServiceServicer_to_server,
)

from aang_ray.config import parse_config
from aang_ray.sweep import live as module
from aang_ray.sweep.agenda import write_agenda
from aang_ray.sweep.live import NoAnswer, ask, cluster_lines
from aang_ray.sweep.plan import PlannedCell
from tests.integration.conftest import free_ports
from tests.sweep.conftest import fake_resolve
from tests.sweep.test_cluster_report import busy, idle

TOKEN = "0123456789abcdef" * 4


class Service(AutoscalerStateServiceServicer):  # type: ignore[misc]
    """The part of a head that is asked."""

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
    """Answers at RAY_ADDRESS."""
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
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    service.silent = True
    with pytest.raises(NoAnswer, match=r"nothing came within 0\.2 s"):
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
    """The token in a process of its own: Ray reads its mode once."""
    run = fake_resolve(parse_config({"method": "finetune"}, "test"))
    write_agenda(str(tmp_path / "store"), Path("jobs/nightly.yaml"), [PlannedCell(run, run.cell, "waiting")])
    service.token = TOKEN
    plain = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
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
