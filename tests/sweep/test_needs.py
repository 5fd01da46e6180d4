"""What a trial reserves, and how many of them nodes hold."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.config import parse_config
from aang_ray.sweep.needs import OWN_CPUS, Need, trials_at_once


def need(**resources: Any) -> Need:
    return Need.of(parse_config({"resources": resources}, "test"))


@pytest.mark.parametrize(
    ("resources", "nodes", "trials"),
    [
        ({"cpus": 1}, [{"CPU": 4.0}], 4),
        ({"cpus": 3}, [{"CPU": 4.0}, {"CPU": 4.0}], 2),  # not 8 // 3: the rest of one node is of no use to the other
        ({"cpus": 1, "gpus": 0.1}, [{"CPU": 64.0, "GPU": 1.0}], 10),
        ({"cpus": 1, "gpus": 1}, [{"CPU": 4.0}], 0),
        ({"workers": 2, "cpus_per_worker": 1}, [{"CPU": 2.0}], 1),  # both cores, and room for the trial's own process
        ({"workers": 2, "cpus_per_worker": 3}, [{"CPU": 4.0}, {"CPU": 4.0}], 1),
        ({"workers": 2, "cpus_per_worker": 3}, [{"CPU": 5.0}], 0),
        ({"workers": 3, "gpus_per_worker": 1}, [{"CPU": 4.0, "GPU": 1.0}] * 8, 2),
        ({"workers": 2, "gpus_per_worker": 0.5}, [{"CPU": 4.0, "GPU": 1.0}] * 3, 3),
        ({"cpus": 1}, [], 0),
    ],
)
def test_trials_that_nodes_hold(resources: dict[str, Any], nodes: list[dict[str, float]], trials: int) -> None:
    assert need(**resources).held_by(nodes) == trials


def test_what_is_reserved() -> None:
    alone, nested = need(cpus=2, gpus=0.25), need(workers=2, cpus_per_worker=2, gpus_per_worker=1, cpus=7)
    assert alone.trial == {"cpu": 2.0, "gpu": 0.25}
    assert alone.bundles == [{"CPU": 2.0, "GPU": 0.25}]
    assert nested.trial == {"cpu": OWN_CPUS, "gpu": 0.0}
    assert nested.bundles == [{"CPU": 1.98, "GPU": 1.0}] * 2
    assert (str(alone), str(nested)) == ("2 CPU and 0.25 GPU", "2 workers of 2 CPU and 1 GPU each")


@given(
    workers=st.integers(2, 5),
    cpus=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    nodes=st.lists(st.sampled_from([1.0, 2.0, 4.0, 8.0]), max_size=6),
)
def test_wherever_ray_puts_the_trials_themselves_their_workers_fit(
    workers: int, cpus: float, nodes: list[float]
) -> None:
    # At worst the processes of all trials are on one node, and it has no worker less for that.
    wanted = need(workers=workers, cpus_per_worker=cpus)
    trials = wanted.held_by([{"CPU": node} for node in nodes])
    for node in nodes:
        without = int(node / wanted.worker_cpus + 1e-9)
        assert int((node - trials * OWN_CPUS) / wanted.worker_cpus + 1e-9) == without


def test_trials_at_once_are_at_least_one_and_at_most_all() -> None:
    small, large = need(cpus=1), need(cpus=3)
    assert trials_at_once([large, small, small], [{"CPU": 2.0}]) == 2
    assert trials_at_once([small], [{"CPU": 8.0}]) == 1
    assert trials_at_once([large], [{"CPU": 2.0}]) == 1
