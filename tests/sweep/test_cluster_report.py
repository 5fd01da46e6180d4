"""A cluster in words, from what Ray reports."""

from __future__ import annotations

from typing import Any

from ray.core.generated import autoscaler_pb2 as messages

from aang_ray.sweep.cluster_report import describe_cluster

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
    """A head alone, without an autoscaler."""
    reply = messages.GetClusterStatusReply()
    add_node(reply, "IDLE", {"node:__internal_head__": 1.0})
    return reply


def busy() -> Any:
    """A cluster in the middle of a night on spot machines."""
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
