"""What the autoscaler's word means, and how room follows the nodes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

from aang_ray.errors import RunFailure, UserError
from aang_ray.sweep import capacity as module
from aang_ray.sweep.capacity import AHEAD, Capacity, Question, check_placeable, describe_nodes
from aang_ray.sweep.needs import Need

GROUP = "a219246ec906f048163551e3b4bd01000000"
ONE = Need(1, 1.0, 0.0)


def status(*, version: int = 7, at: int = 20, seen: int = 10, pending: bool = True, never: bool = False) -> object:
    """What Ray reports: the cluster is at state `at`, the autoscaler has looked at state `seen`."""
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
    question = Question(GROUP)
    assert question.verdict(status(version=0)) == "nobody"
    assert question.verdict(status(pending=False)) == "unknown"
    assert question.verdict(status(at=20, seen=10)) == "unknown"
    assert question.verdict(status(at=24, seen=19)) == "unknown"
    assert question.verdict(status(at=25, seen=21)) == "can be added"
    assert Question(GROUP).verdict(status(seen=21, never=True)) == "never"


def test_nodes_in_words() -> None:
    nodes = [{"CPU": 0.0, "memory": 1.0}, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}]
    assert describe_nodes(nodes) == "1 node with 0 CPU, 2 nodes with 4 CPU and 1 GPU"
    assert describe_nodes([]) == "no node"


class Cluster:
    """A cluster whose nodes and autoscaler a test sets, and whose clock goes on with every look."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, float]] = []
        self.word: Callable[[float], object] = lambda now: status(version=0)
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Asked:
    """A placement group's id without Ray."""

    def __init__(self, need: Need) -> None:
        self.need = need

    def __enter__(self) -> Question:
        return Question(GROUP)

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(module, "time", cluster)
    monkeypatch.setattr(module, "living_nodes", lambda: cluster.nodes)
    monkeypatch.setattr(module, "_status", lambda: cluster.word(cluster.now))
    monkeypatch.setattr(module, "_wanted", Asked)
    return cluster


def test_what_fits_a_node_is_not_asked(cluster: Cluster) -> None:
    cluster.nodes = [{"CPU": 2.0}]
    check_placeable([ONE, ONE])
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
        cluster.now, cluster.word = 0.0, word
        with pytest.raises(UserError, match=line):
            check_placeable([ONE])
        assert cluster.now < 60
    cluster.now, cluster.word = 0.0, lambda now: status(seen=1)
    with pytest.raises(RunFailure, match="has not said within 45 s"):
        check_placeable([ONE])
    assert cluster.now < 60


def test_a_node_that_comes_is_an_answer_and_so_is_the_autoscalers_silence(cluster: Cluster) -> None:
    def starts_a_node(now: float) -> object:
        cluster.nodes = [{"CPU": 1.0}]
        return status(seen=1)

    cluster.word = starts_a_node
    check_placeable([ONE])
    cluster.nodes = []
    cluster.word = lambda now: status(version=0) if now < 10 else status(at=20, seen=20)  # it has just started
    check_placeable([ONE])


def test_room_follows_the_nodes(cluster: Cluster) -> None:
    cluster.nodes = [{"CPU": 2.0}]
    cluster.word = lambda now: status()
    capacity = Capacity()
    assert capacity.room(ONE) == 2 + AHEAD
    cluster.nodes = [{"CPU": 2.0}] * 3
    cluster.now += 5
    assert capacity.room(ONE) == 6 + AHEAD
    assert capacity.room(Need(4, 1.0, 0.0)) == 1 + AHEAD


def test_a_cluster_that_does_not_grow_has_room_for_what_it_holds(cluster: Cluster) -> None:
    cluster.nodes = [{"CPU": 2.0}]
    assert Capacity().room(ONE) == 2
