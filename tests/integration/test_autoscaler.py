"""A cluster that grows with a sweep and shrinks after it: Ray's autoscaler on nodes that are processes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aang_ray.store import Store
from aang_ray.sweep.cluster import cluster_lines
from tests.integration.conftest import Head, Start, Started, free_ports, start_head

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"
"""The name that the provider of such nodes has for it."""
IDLE_SECONDS = 6
KINDS_OF_COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


def configuration(gcs: str) -> dict[str, object]:
    """A cluster with a head that runs no trial, and up to two nodes of one CPU."""
    kinds = {
        HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    }
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": gcs,
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
    }
    return {
        "cluster_name": "growing",
        "max_workers": 2,
        "idle_timeout_minutes": IDLE_SECONDS / 60,
        "upscaling_speed": 1.0,
        "provider": provider,
        "available_node_types": kinds,
        "head_node_type": HEAD_TYPE,
        "auth": {"ssh_user": "nobody"},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        **{f"{kind}_commands": [] for kind in KINDS_OF_COMMANDS},
    }


@pytest.fixture
def growing(start: Start, environment: dict[str, str], short_folder: Path) -> Head:
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    fake = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    (port,) = free_ports(1)
    path = short_folder / "autoscaler.json"
    path.write_text(json.dumps(configuration(f"127.0.0.1:{port}")), encoding="utf-8")
    head = start_head(start, environment | fake, short_folder, cpus=0, **{"port": port, "autoscaling-config": path})
    environment["RAY_ADDRESS"] = head.address
    return head


def nodes(head: Head) -> int:
    """Nodes that are alive: each is a raylet process on this machine."""
    return len(head.process.named("--raylet_socket_name"))


def test_from_one_node_to_three_and_back(
    start: Start,
    growing: Head,
    sweep_file: Callable[..., Path],
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, environment[name])

    def sweep(store: str, *options: str) -> Started:
        file = sweep_file(["finetune", "static"], 2, steps=20)
        command = [sys.executable, "jobs/sweep.py", str(file), "--store", str(tmp_path / store), *options]
        return start(command, environment)

    growing.process.wait_for(lambda: nodes(growing) == 1, 30)
    oversized = sweep("none", "--set", "resources.cpus=5")
    assert oversized.wait(150) == 2, oversized.output
    assert (
        "error: resources: a trial needs 5 CPU, the cluster has 1 node with 0 CPU, and its autoscaler can add none "
        "that holds it"
    ) in oversized.output

    # Four cells, and never room for more than two of them.
    running = sweep("store")
    said: set[str] = set()

    def grown() -> bool:
        said.update(cluster_lines())
        return nodes(growing) == 3 and any(": 1 node with 0 CPU, 2 nodes with 1 CPU; " in line for line in said)

    running.wait_for(grown, 200)
    assert any("  waiting for room: " in line for line in said)
    assert any("  being started: " in line for line in said)
    status = [str(Path(sys.executable).with_name("aang")), "status", "--store", str(tmp_path / "store")]
    look = start(status, environment)
    assert look.wait(60) == 0, look.output
    assert f"cluster at {growing.address}: 1 node with 0 CPU, " in look.output
    assert "sweep: 4 cells: " in look.output
    assert running.wait(400) == 0, running.output
    rows = Store(tmp_path / "store").results().to_pylist()
    assert [row["status"] for row in rows] == ["done"] * 4
    growing.process.wait_for(lambda: nodes(growing) == 1, 120)
