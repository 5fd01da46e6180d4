"""What a trial reserves on a cluster, and how many such trials a set of nodes holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from aang_ray.config import RunConfig

OWN_CPUS = 0.0001
"""What the process of a trial with several workers reserves: it only waits for them. The least that Ray counts."""

WORKERS_SHARE = 0.99
"""Of `cpus_per_worker` that is reserved: without the rest, workers that fill a node would leave its trials no room.

A node full of workers keeps at least 1 % of their CPUs free, which is room for 100 trials a CPU."""


@dataclass(frozen=True, order=True)
class Need:
    """The resources of one trial."""

    workers: int
    cpus: float
    """Of each worker, as it was asked for."""
    gpus: float
    """Of each worker."""

    @classmethod
    def of(cls, config: RunConfig) -> Need:
        """What a run asks for: one process with `cpus` and `gpus`, or several with their own."""
        resources = config.resources
        if resources.workers == 1:
            return cls(1, resources.cpus, resources.gpus)
        return cls(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker)

    @property
    def nested(self) -> bool:
        """Whether the workers are processes beside the trial's own."""
        return self.workers > 1

    @property
    def worker_cpus(self) -> float:
        """What Ray reserves of each worker's CPUs."""
        return round(WORKERS_SHARE * self.cpus, 4) if self.nested else self.cpus

    @property
    def trial(self) -> dict[str, float]:
        """What Tune reserves for the trial's own process."""
        return {"cpu": OWN_CPUS, "gpu": 0.0} if self.nested else {"cpu": self.cpus, "gpu": self.gpus}

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What must be free at once, each bundle on one node."""
        worker = {"CPU": self.worker_cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return [worker] * self.workers

    def held_by(self, nodes: Iterable[Mapping[str, float]]) -> int:
        """Trials that the nodes hold at once: whole workers a node, `workers` of them a trial.

        Workers of one kind never leave gaps that another of them does not fit, and Ray places those of a trial all or
        none. So where all trials that run have the same need, this many never wait for each other.
        """
        return sum(self._workers_on(node) for node in nodes) // self.workers

    def _workers_on(self, node: Mapping[str, float]) -> int:
        wanted = {"CPU": self.worker_cpus, "GPU": self.gpus}
        return min(int(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items() if amount)

    def __str__(self) -> str:
        each = f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        return f"{self.workers} workers of {each} each" if self.nested else each


def trials_at_once(needs: Sequence[Need], nodes: Sequence[Mapping[str, float]]) -> int:
    """Trials that run side by side: as many as the nodes hold of the smallest, at most all; at least 1."""
    return max(1, min(len(needs), max(need.held_by(nodes) for need in set(needs))))
