"""Search by Optuna: configurations that depend on how earlier ones did, each judged by the mean over its seeds."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from aang_ray.config import RunConfig
from aang_ray.sweep.jobs import End, Job
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.search_memory import Parameters, SearchMemory
from aang_ray.sweep.search_space import SearchSpec, Values, changed, decode, distributions, space_of

if TYPE_CHECKING:
    from optuna import Study, Trial


@dataclass
class _Asked:
    """One configuration."""

    trial: Trial
    cells: Sequence[PlannedCell]


@dataclass
class _Study:
    """The search for one run of the sweep file."""

    run: RunConfig
    name: str
    space: Mapping[str, Values]
    """Those of the settings that its method has."""
    samples: int
    optuna: Study
    asked: list[Parameters] = field(default_factory=list)
    waiting: list[_Asked] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.samples - len(self.asked)


class Search:
    """A strategy: asks Optuna for a configuration when there is room, tells it the mean dev score over the seeds.

    A study a run of the sweep file. Its sampler (TPE; those that run count as bad, so that trials side by side differ)
    is seeded by `seed` and the number of the configuration. A configuration with a failed seed counts as failed.
    """

    def __init__(
        self,
        runs: Sequence[RunConfig],
        spec: SearchSpec,
        lay_out: Callable[[RunConfig], list[PlannedCell]],
        scores: Mapping[str, float],
        memory: SearchMemory,
        planned: Callable[[Sequence[PlannedCell]], None],
    ) -> None:
        """`lay_out` gives a run's cells, `scores` are dev scores of done cells, `planned` hears of new cells."""
        self._spec = spec
        self._lay_out = lay_out
        self._scores: dict[str, float | None] = dict(scores)
        """None for a failed cell."""
        self._memory = memory
        self._planned = planned
        self._ready: deque[Job] = deque()
        self._running: set[str] = set()
        self._cells: dict[str, PlannedCell] = {}
        self._studies = [self._study(run) for run in runs]

    @property
    def cells(self) -> list[PlannedCell]:
        """Of all configurations so far."""
        return list(self._cells.values())

    @property
    def unasked(self) -> int:
        """Configurations to come."""
        return sum(study.left for study in self._studies)

    def next(self) -> Job | None:
        """A cell of the newest configuration; None where all were asked for."""
        while not self._ready and self.unasked:
            self._ask(max(self._studies, key=lambda study: study.left))
        if not self._ready:
            return None
        job = self._ready.popleft()
        self._running.add(job.cell.cell)
        return job

    def ended(self, job: Job, end: End) -> None:
        """A cell has ended; with the last seed of its configuration Optuna hears the mean."""
        self._running.discard(job.cell.cell)
        self._scores[job.cell.cell] = end.dev
        for study in self._studies:
            self._tell(study)

    @property
    def finished(self) -> bool:
        """Whether every configuration was asked for and handed out."""
        return not self._ready and not self.unasked

    def _study(self, run: RunConfig) -> _Study:
        """With what was asked for before, told or taken up again."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        space = space_of(self._spec, run)
        digest = hashlib.sha256(f"{run.group}\n{self._spec.model_dump_json()}".encode()).hexdigest()[:16]
        samples = self._spec.samples if space else 1
        study = _Study(run, digest, space, samples, optuna.create_study(direction="maximize"))
        for parameters in self._memory.read(digest)[:samples]:
            study.optuna.enqueue_trial(parameters)
            self._ask(study)
        return study

    def _ask(self, study: _Study) -> None:
        import optuna

        number = len(study.asked)
        seed = int.from_bytes(hashlib.sha256(f"{self._spec.seed} {number}".encode()).digest()[:4], "big")
        study.optuna.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
        trial = study.optuna.ask(distributions(study.space))
        study.asked.append(trial.params)
        self._memory.write(study.name, study.asked)
        cells = self._lay_out(changed(study.run, decode(study.space, trial.params)))
        new = [cell for cell in cells if cell.cell not in self._cells]
        self._cells |= {cell.cell: cell for cell in new}
        self._planned(new)
        self._ready.extend(Job(cell) for cell in new if cell.cell not in self._scores)
        study.waiting.append(_Asked(trial, cells))
        self._tell(study)

    def _tell(self, study: _Study) -> None:
        """Tell Optuna of the configurations whose seeds have all ended."""
        from optuna.trial import TrialState

        left = []
        for asked in study.waiting:
            cells = [cell.cell for cell in asked.cells]
            if not all(cell in self._scores for cell in cells):
                left.append(asked)
                continue
            scores = [score for cell in cells if (score := self._scores[cell]) is not None]
            if len(scores) == len(cells):
                study.optuna.tell(asked.trial, fmean(scores))
            else:
                study.optuna.tell(asked.trial, state=TrialState.FAIL)
        study.waiting = left
