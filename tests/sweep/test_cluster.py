"""Whether a trial fits a cluster, what the autoscaler's answer means, and where logs are kept."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from aang_ray.errors import RunFailure, UserError
from aang_ray.sweep import cluster as module
from aang_ray.sweep.cluster import PlacementQuestion, check_fits, describe_nodes, has_autoscaler, keep_logs
from aang_ray.sweep.plan import Need

GROUP = "a219246ec906f048163551e3b4bd01000000"
ONE = Need(1, 1.0, 0.0)


def status(*, version: int = 7, at: int = 20, seen: int = 10, pending: bool = True, never: bool = False) -> object:
    """Ray's report: the cluster is at state `at`, and the autoscaler has seen state `seen`."""
    reply = GetClusterStatusReply()
    reply.autoscaling_state.autoscaler_state_version = version
    reply.autoscaling_state.last_seen_cluster_resource_state_version = seen
    reply.cluster_resource_state.cluster_resource_state_version = at
    other = "b" + GROUP[1:] + ":PACK|PENDING"
    for there, requests in (
        (pending, reply.cluster_resource_state.pending_gang_resource_requests),
        (never, reply.autoscaling_state.infeasible_gang_resource_requests),
    ):
        requests.add().details = other  # another's group says nothing about ours
        if there:
            requests.add().details = f"{GROUP}:PACK|PENDING"
    return reply


def test_the_autoscaler_is_believed_once_it_has_seen_the_group() -> None:
    question = PlacementQuestion(GROUP)
    assert question.verdict(status(version=0)) == "no autoscaler"
    assert question.verdict(status(pending=False)) == "unknown"
    assert question.verdict(status(at=20, seen=10)) == "unknown"
    assert question.verdict(status(at=24, seen=19)) == "unknown"
    assert question.verdict(status(at=25, seen=21)) == "can be added"
    assert PlacementQuestion(GROUP).verdict(status(seen=21, never=True)) == "never"


def test_nodes_in_words() -> None:
    nodes = [{"CPU": 0.0, "memory": 1.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}]
    assert describe_nodes(nodes) == "1 node with 0 CPU, 2 nodes with 4 CPU and 1 GPU"
    assert describe_nodes([]) == "no node"


class Cluster:
    """A cluster whose nodes and autoscaler a test sets; its clock advances at every query."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, float]] = []
        self.answer: Callable[[float], object] = lambda now: status(version=0)
        self.now = 0.0
        self.groups: list[object] = []
        """Placement groups that are there."""

    def place(self, bundles: list[dict[str, float]]) -> object:
        self.groups.append(SimpleNamespace(id=SimpleNamespace(hex=lambda: GROUP)))
        return self.groups[-1]

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(module, "time", cluster)
    monkeypatch.setattr(module, "living_nodes", lambda: cluster.nodes)
    monkeypatch.setattr(module, "_status", lambda: cluster.answer(cluster.now))
    monkeypatch.setattr("ray.util.placement_group", cluster.place)
    monkeypatch.setattr("ray.util.remove_placement_group", cluster.groups.remove)
    return cluster


def test_what_fits_a_node_is_not_asked(cluster: Cluster) -> None:
    cluster.nodes = [{"CPU": 2.0}]
    check_fits([ONE, ONE])
    assert cluster.now == 0.0


def test_a_trial_that_no_node_can_hold_is_refused_within_a_minute(cluster: Cluster) -> None:
    cluster.nodes = [{"CPU": 0.0}]
    lines = {
        "resources: a trial needs 1 CPU, the cluster has 1 node with 0 CPU, and its autoscaler can add none": (
            lambda now: status(seen=30, never=True) if now > 5 else status(seen=1)
        ),
        "the cluster has 1 node with 0 CPU, and no autoscaler .version 2. that could": lambda now: status(version=0),
    }
    for line, word in lines.items():
        cluster.now, cluster.answer = 0.0, word
        with pytest.raises(UserError, match=line):
            check_fits([ONE])
        assert cluster.now < 60
    cluster.now, cluster.answer = 0.0, lambda now: status(seen=1)
    with pytest.raises(RunFailure, match="has not said within 45 s"):
        check_fits([ONE])
    assert cluster.now < 60
    assert cluster.groups == []


def test_a_node_that_comes_is_an_answer_and_so_is_the_autoscalers_silence(cluster: Cluster) -> None:
    def starts_a_node(now: float) -> object:
        cluster.nodes = [{"CPU": 1.0}]
        return status(seen=1)

    cluster.answer = starts_a_node
    check_fits([ONE])
    cluster.nodes = []
    cluster.answer = lambda now: status(version=0) if now < 10 else status(at=20, seen=20)  # it has just started
    check_fits([ONE])


def test_this_machine_does_not_grow(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    cluster.nodes = [{"CPU": 2.0}]
    check_fits([Need(1, 2.0, 0.0)])
    with pytest.raises(UserError, match="a trial needs 3 CPU, this machine has 1 node with 2 CPU"):
        check_fits([Need(1, 3.0, 0.0)])
    assert cluster.now == 0.0


def test_an_autoscaler_shows_by_having_looked(cluster: Cluster) -> None:
    assert not has_autoscaler()
    cluster.answer = lambda now: status()
    assert has_autoscaler()


def test_logs_are_kept_in_the_store_or_beside_a_remote_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logs = tmp_path / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker.err").write_text("the reason")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for store, parent in ((str(tmp_path / "store"), tmp_path / "store" / ".logs"), ("s3://bucket/store", tmp_path)):
        folder = keep_logs(tmp_path / "ray", store)
        assert folder.parent == parent
        assert (folder / "worker.err").read_text() == "the reason"


@pytest.mark.parametrize(
    ("address", "message", "line"),
    [
        (
            "",
            "\nThe last 20 lines of /tmp/ray/session/logs/dashboard.log (it contains the error message):\nINFO loading",
            "Ray could not be started: its dashboard ended while it started; the same command tries again",
        ),
        (
            "10.0.0.1:6379",
            "Failed to connect to GCS.\nmore",
            "Ray could not be reached at 10.0.0.1:6379: Failed to connect to GCS; the same command tries again",
        ),
    ],
)
def test_ray_that_does_not_start_is_one_line(
    address: str, message: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray raises a bare `Exception` with lines of a log when one of its processes is killed during the start."""

    def init(**options: object) -> None:
        raise Exception(message)

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", init)
    monkeypatch.setattr(module, "set_environment", lambda: None)  # it would stay for the tests that follow
    with pytest.raises(RunFailure) as caught, module.ray_cluster():
        pass
    assert str(caught.value) == line


SCRIPT = """
import subprocess, sys, time
from pathlib import Path
from aang_ray.sweep.cluster import _ending_with

scratch = Path(sys.argv[1])
started = [subprocess.Popen([scratch / name, "600"]) for name in ("gcs_server", "raylet", "dashboard")]
other = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
with _ending_with(scratch):
    print(*[process.pid for process in started], other.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_the_process_ends_soon_after_its_ray(victim: int, tmp_path: Path) -> None:
    """SIGTERM to the process group ends Ray first. One line; nothing of Ray's is left, what others started stays."""
    scratch = tmp_path / "aang-x"
    scratch.mkdir()
    for name in ("gcs_server", "raylet", "dashboard"):
        shutil.copy(shutil.which("sleep") or "sleep", scratch / name)
    command = [sys.executable, "-c", SCRIPT, str(scratch)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        try:
            os.kill(pids[victim], signal.SIGKILL)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
            alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
    assert (process.returncode, errors) == (1, f"error: {module.RAY_ENDED}\n")
    assert alive == pids[-1:]
    assert not scratch.exists()
