"""What a Ray cluster has and can still get: its living nodes, and what its autoscaler says of a trial."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from aang_ray.errors import RunFailure, UserError
from aang_ray.sweep.needs import Need

AHEAD = 8
"""Trials that may wait for nodes beyond those that the nodes hold: what they reserve makes the autoscaler add some."""

AUTOSCALER_STARTS_SECONDS = 20.0
"""After the head; one that has said nothing by then is none."""

VERDICT_SECONDS = 45.0
"""An autoscaler looks at what is wanted every five seconds."""

FRESH_SECONDS = 2.0
"""For how long a list of nodes is taken for true."""

Node = Mapping[str, float]
Verdict = Literal["nobody", "unknown", "can be added", "never"]
"""`nobody`: there is no autoscaler that answers, or not yet."""


class Capacity:
    """How many trials a cluster has room for, from one moment to the next."""

    def __init__(self) -> None:
        self._look()

    @property
    def nodes(self) -> Sequence[Node]:
        """Of a moment ago."""
        if time.monotonic() - self._looked > FRESH_SECONDS:
            self._look()
        return self._nodes

    def room(self, need: Need) -> int:
        """Trials at once: what the nodes hold, and where there is an autoscaler those that make it add nodes.

        Waiting for nodes cannot become waiting for ever: the groups of a need are placed whole or not at all, one that
        waits holds nothing, and `check_placeable` has seen that one fits.
        """
        return need.held_by(self.nodes) + (AHEAD if self._grows else 0)

    def _look(self) -> None:
        self._nodes, self._grows = living_nodes(), has_autoscaler()
        self._looked = time.monotonic()


def check_placeable(needs: Iterable[Need]) -> None:
    """Refuse a trial that fits neither the nodes there are nor any that the autoscaler can add, within a minute.

    Raises:
        UserError: naming what the trial needs and what the cluster has.
        RunFailure: where the autoscaler does not answer.
    """
    for need in sorted(set(needs)):
        if not need.held_by(living_nodes()):
            _ask_autoscaler(need)


def living_nodes() -> list[Node]:
    """CPUs and GPUs of each node that is alive."""
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def has_autoscaler() -> bool:
    """Whether an autoscaler has looked at the cluster."""
    return bool(_status().autoscaling_state.autoscaler_state_version)


def describe_nodes(nodes: Iterable[Node]) -> str:
    """`1 node with 0 CPU, 2 nodes with 4 CPU and 1 GPU`."""
    kinds = Counter((node.get("CPU", 0.0), node.get("GPU", 0.0)) for node in nodes)
    parts = []
    for (cpus, gpus), count in sorted(kinds.items()):
        parts.append(
            f"{count} node{'s' if count > 1 else ''} with {cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        )
    return ", ".join(parts) or "no node"


def _ask_autoscaler(need: Need) -> None:
    """Want the trial's resources for a moment, and wait for a node that fits or for the autoscaler's word."""
    began = time.monotonic()
    with _wanted(need) as question:
        while (waited := time.monotonic() - began) < VERDICT_SECONDS:
            if need.held_by(living_nodes()):
                return
            match question.verdict(_status()):
                case "can be added":
                    return
                case "never":
                    raise UserError(f"{_shortage(need)}, and its autoscaler can add none that holds it")
                case "nobody" if waited > AUTOSCALER_STARTS_SECONDS:
                    raise UserError(f"{_shortage(need)}, and no autoscaler (version 2) that could add nodes")
            time.sleep(0.5)
    raise RunFailure(
        f"{_shortage(need)}, and its autoscaler has not said within {VERDICT_SECONDS:g} s whether it can add nodes; "
        "look into its log, monitor.log on the head"
    )


def _shortage(need: Need) -> str:
    return f"resources: a trial needs {need}, the cluster has {describe_nodes(living_nodes())}"


@contextmanager
def _wanted(need: Need) -> Iterator[Question]:
    """A placement group of the trial's bundles, which the autoscaler sees."""
    from ray.util import placement_group, remove_placement_group

    group = placement_group(need.bundles)
    try:
        yield Question(group.id.hex())
    finally:
        remove_placement_group(group)


class Question:
    """What the autoscaler says of a placement group that waits.

    It looks every few seconds at a numbered state of the cluster, and names the groups in it for which it can add no
    nodes. So its silence about a group that was in a state that it has seen is a yes.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._asked: int | None = None
        """Number of a state of the cluster that holds the group."""

    def verdict(self, status: Any) -> Verdict:
        """From a `GetClusterStatusReply`."""
        cluster, word = status.cluster_resource_state, status.autoscaling_state
        if not word.autoscaler_state_version:
            return "nobody"
        if any(self._is_it(request) for request in word.infeasible_gang_resource_requests):
            return "never"
        if self._asked is None and any(self._is_it(request) for request in cluster.pending_gang_resource_requests):
            self._asked = cluster.cluster_resource_state_version
        seen = self._asked is not None and word.last_seen_cluster_resource_state_version >= self._asked
        return "can be added" if seen else "unknown"

    def _is_it(self, request: Any) -> bool:
        return str(request.details).startswith(self._group)


def _status() -> Any:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.experimental.internal_kv import internal_kv_get_gcs_client

    reply = GetClusterStatusReply()
    reply.ParseFromString(internal_kv_get_gcs_client().get_cluster_status(timeout_s=10))
    return reply
