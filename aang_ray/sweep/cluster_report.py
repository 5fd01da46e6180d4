"""What Ray reports of a cluster's nodes, in a few lines for a person."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from aang_ray.sweep.capacity import Node, describe_nodes
from aang_ray.sweep.progress import duration


def describe_cluster(reply: Any, now: float) -> Iterator[str]:
    """A `GetClusterStatusReply` in lines: nodes and their use; what is on its way, leaves, failed to start, waits.

    What has to do with the start of nodes is the word of an autoscaler (version 2); others say nothing here.
    """
    from ray.core.generated.autoscaler_pb2 import NodeStatus

    cluster, autoscaler = reply.cluster_resource_state, reply.autoscaling_state
    living = [node for node in cluster.node_states if node.status != NodeStatus.DEAD]
    up = [node for node in living if node.status != NodeStatus.DRAINING]
    leaving = [node.total_resources for node in living if node.status == NodeStatus.DRAINING]
    yield f"{describe_nodes(node.total_resources for node in up)}; {_use(up)}"
    if leaving:
        yield f"drained, going away: {describe_nodes(leaving)}"
    if starting := _starting(autoscaler):
        yield f"being started: {starting}"
    yield from _failed(autoscaler.failed_instance_requests, now)
    pending = ((request.request.resources_bundle, request.count) for request in cluster.pending_resource_requests)
    if waiting := _wanted(pending, cluster.pending_gang_resource_requests):
        yield f"waiting for room: {waiting}"
    refusals = ((request.resources_bundle, 1) for request in autoscaler.infeasible_resource_requests)
    if refused := _wanted(refusals, autoscaler.infeasible_gang_resource_requests):
        yield f"no node is added for {refused}: their number has reached its limit, or no type is large enough"


def _use(nodes: Sequence[Any]) -> str:
    """`7 of 8 CPU and 1.5 of 2 GPU in use`."""
    parts = []
    for name in ("CPU", "GPU"):
        total = sum(node.total_resources.get(name, 0.0) for node in nodes)
        free = sum(node.available_resources.get(name, 0.0) for node in nodes)
        if total or name == "CPU":
            parts.append(f"{round(total - free, 4):g} of {total:g} {name}")
    return " and ".join(parts) + " in use"


def _starting(autoscaler: Any) -> str:
    """`3 gpu-spot, 1 gpu-on-demand`: machines asked for, and those that boot."""
    kinds = Counter(node.ray_node_type_name for node in autoscaler.pending_instances)
    for request in autoscaler.pending_instance_requests:
        kinds[request.ray_node_type_name] += request.count
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _failed(launches: Iterable[Any], now: float) -> Iterator[str]:
    """A line for each kind of node and reason: it is asked for again and again while there is no capacity."""
    counts: Counter[tuple[str, str]] = Counter()
    last: dict[tuple[str, str], int] = {}
    for launch in launches:
        key = (launch.ray_node_type_name, one_line(launch.reason))
        counts[key] += launch.count
        last[key] = max(last.get(key, 0), launch.failed_ts)
    for (kind, reason), count in sorted(counts.items()):
        ago = duration(max(now - last[kind, reason], 0.0))
        yield f"not started: {count} {kind}, {'the last ' if count > 1 else ''}{ago} ago: {reason}"


def _wanted(singles: Iterable[tuple[Node, int]], gangs: Iterable[Any]) -> str:
    """`3 x 1 CPU, 1 x (2 x 0.99 CPU and 1 GPU)`; what is in brackets is placed whole or not at all."""
    counts: Counter[str] = Counter()
    for bundle, count in singles:
        if not any("_group_" in name for name in bundle):  # waits for others of its placement group, not for a node
            counts[_amount(bundle)] += count
    for gang in gangs:
        bundles = Counter(_amount(request.resources_bundle) for request in gang.requests)
        counts[f"({_times(bundles)})" if bundles.total() > 1 else next(iter(bundles))] += 1
    return _times(counts)


def _amount(bundle: Node) -> str:
    """`4 CPU and 1 GPU`, other resources after them."""
    names = sorted(bundle, key=lambda name: (name not in ("CPU", "GPU"), name))
    return " and ".join(f"{bundle[name]:g} {name}" for name in names)


def _times(counts: Counter[str]) -> str:
    return ", ".join(f"{count} x {what}" for what, count in sorted(counts.items()))


def one_line(text: str) -> str:
    """Without line breaks and indentation: reasons come from clouds and from gRPC."""
    return " ".join(text.split())
