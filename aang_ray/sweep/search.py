"""The `search` of a sweep file: Optuna chooses configurations, each judged by the mean dev score over its seeds.

Ray's `OptunaSearch` asks Optuna and tells it results, Ray's `Repeater` repeats a configuration over the seeds and
averages their scores. `Searches` adds what they do not know: a sweep file makes several runs, each with a search of
its own; cells that are done in the store are answered at once; and the configurations that were asked for are kept in
`<store>/.progress/searches/`, so that the same search started again continues with them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pyarrow import fs
from ray.tune.search import Repeater, Searcher
from ray.tune.search.optuna import OptunaSearch

from aang_ray.config import RunConfig
from aang_ray.store import Store
from aang_ray.store.files import Location, open_location, publish
from aang_ray.sweep.plan import PlannedCell, plan
from aang_ray.sweep.progress import SweepProgress
from aang_ray.sweep.spec import Range, SearchSpec, Values, changed, space_of
from aang_ray.train.plan import resolve

FAILED = -math.inf
"""What Optuna is told of a configuration with a failed seed. (It cannot be told of a failure through `Repeater`.)"""

FOLDER = (".progress", "searches")


class Searches(Searcher):  # type: ignore[misc]  # Ray has no type information
    """One Optuna study for each run of the sweep file. A suggestion is one cell: a configuration with a seed."""

    def __init__(
        self,
        runs: Sequence[RunConfig],
        spec: SearchSpec,
        seeds: Sequence[int],
        store: Store,
        progress: SweepProgress,
        *,
        keep_failed: bool = False,
    ) -> None:
        """Ask for the configurations that were asked for before; Optuna is told the scores that the store has.

        Args:
            runs: The runs of the sweep file.
            spec: Samples, space and the sampler's seed.
            seeds: The seeds of each configuration.
            store: Where scores of done cells are, and the configurations that were asked for.
            progress: Where the cells of each new configuration are shown.
            keep_failed: Whether cells that failed before are not run again; they count as failed.
        """
        super().__init__()
        rows = store.results(["cell", "status", "dev_score"]).to_pylist()
        self._status = {row["cell"]: row["status"] for row in rows}
        self._scores: dict[str, float] = {
            row["cell"]: row["dev_score"] for row in rows if row["status"] == "done" and row["dev_score"] is not None
        }
        if keep_failed:
            self._scores |= {cell: FAILED for cell, status in self._status.items() if status == "failed"}
        self._seeds, self._progress, self._keep_failed = tuple(dict.fromkeys(seeds)), progress, keep_failed
        self.trial_of: Callable[[PlannedCell], dict[str, Any]] = lambda cell: {"cell": cell.cell}
        """Makes the parameters of a cell's trial."""
        self.cells: dict[str, PlannedCell] = {}
        """Cells of all configurations so far."""
        self._pending: list[PlannedCell] = []
        """Cells of the newest configuration that have no trial yet."""
        self._waiting: dict[str, list[tuple[_Study, str]]] = {}
        """By cell without a score: who is to be told."""
        self._cell_of: dict[str, str] = {}
        """By trial."""
        self.closed = False
        """Whether the sweep is stopping, so that no further configuration may be asked for."""
        location = open_location(store.uri)
        self._studies = [_Study(run, spec, len(self._seeds), location) for run in runs]
        progress.to_come = self.to_come
        for study in self._studies:
            for _ in study.known:
                self._ask(study)

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps the state of searchers for a restore, which is never made: the store remembers."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """See `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """See `__getstate__`."""

    @property
    def to_come(self) -> int:
        """How many cells the configurations have that are still to be asked for."""
        return sum(study.left for study in self._studies) * len(self._seeds)

    @property
    def finished(self) -> bool:
        """Whether every configuration was asked for and each of its cells has a trial or a score."""
        return not self._pending and not self.to_come

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The parameters of the next trial; `FINISHED` where none is left."""
        while not self.closed and not self._pending and self.to_come:
            self._ask(max(self._studies, key=lambda study: study.left))
        if self.closed or not self._pending:  # not None, with which Tune would wait for a trial that never comes
            return str(Searcher.FINISHED)
        cell = self._pending.pop(0)
        self._cell_of[trial_id] = cell.cell
        return {"trial": self.trial_of(cell)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the studies how a cell ended. One that was stopped, or whose process died, has not ended: see `fail`."""
        if result is not None and result.get("status") not in ("stopped", "not started"):
            self._tell(self._cell_of[trial_id], result.get("dev", FAILED))

    def fail(self, cell: str) -> None:
        """Tell the studies that a cell has failed because its process died too often."""
        self._tell(cell, FAILED)

    def _ask(self, study: _Study) -> None:
        """Ask for one configuration. Cells that have a score, or a trial already, get no trial."""
        numbers, settings = study.ask()
        variant = ", ".join(
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
        )
        cells = plan([changed(study.run, settings)], self._seeds, self._status, resolve, variant)
        new = [cell for cell in cells if cell.cell not in self.cells]
        self.cells |= {cell.cell: cell for cell in new}
        self._progress.to_come = self.to_come
        self._progress.add(new, keep_failed=self._keep_failed)
        self._pending.extend(cell for cell in new if cell.cell not in self._scores)
        for number, cell in zip(numbers, cells, strict=True):
            if cell.cell in self._scores:
                study.tell(number, self._scores[cell.cell])
            else:
                self._waiting.setdefault(cell.cell, []).append((study, number))

    def _tell(self, cell: str, score: float) -> None:
        self._scores[cell] = score
        for study, number in self._waiting.pop(cell, []):
            study.tell(number, score)


class _Study:
    """The search for one run of the sweep file.

    What it has asked for is in a file of the store: `{"study": hash, "asked": [{setting: value, ...}, ...]}`.
    """

    def __init__(self, run: RunConfig, spec: SearchSpec, seeds: int, location: Location) -> None:
        self.run = run
        self._space = space_of(spec, run)
        self._samples = spec.samples if self._space else 1  # a method may have none of the settings
        self._name = hashlib.sha256(f"{run.group}\n{spec.model_dump_json()}".encode()).hexdigest()[:16]
        self._location, self._path = location, location.path(*FOLDER, f"{self._name}.json")
        self.known: list[dict[str, Any]] = []
        """What was asked for before, in that order."""
        if location.filesystem.get_file_info(self._path).type == fs.FileType.File:
            with location.filesystem.open_input_file(self._path) as stream:
                self.known = json.loads(stream.read())["asked"][: self._samples]
        self._asked: list[dict[str, Any]] = []
        self._seeds = seeds
        self._repeater = self._make_repeater(spec.seed) if self._space else None

    @property
    def left(self) -> int:
        """Configurations that are still to be asked for."""
        return self._samples - len(self._asked)

    def ask(self) -> tuple[list[str], dict[str, Any]]:
        """The next configuration: names by which `tell` knows its seeds, and its settings."""
        names = [f"{len(self._asked)}-{seed}" for seed in range(self._seeds)]
        parameters: dict[str, Any] = {}
        if self._repeater is not None:
            for name in names:  # each gives the same parameters
                parameters = self._repeater.suggest(name)
        self._asked.append(parameters)
        if len(self._asked) > len(self.known):
            content = json.dumps({"study": self._name, "asked": self._asked}, ensure_ascii=False)
            publish(self._location, self._path, content.encode())
        return names, {
            key: value if isinstance(self._space[key], Range) else json.loads(value)
            for key, value in parameters.items()
        }

    def tell(self, name: str, score: float) -> None:
        """The dev score of one seed; with the last seed Optuna is told the mean."""
        if self._repeater is not None:
            self._repeater.on_trial_complete(name, {"dev": score})

    def _make_repeater(self, seed: int) -> Any:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # A sampler that starts again with its old seed would propose its first random points again.
        seed = int.from_bytes(hashlib.sha256(f"{seed} {len(self.known)}".encode()).digest()[:4], "big")
        search = OptunaSearch(
            {key: _distribution(values) for key, values in self._space.items()},
            metric="dev",
            mode="max",
            # Configurations that run count as bad, so that those that are asked for at once differ.
            sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
            points_to_evaluate=self.known,
        )
        return Repeater(search, repeat=self._seeds, set_index=False)


def _distribution(values: Values) -> BaseDistribution:
    """Values in Optuna's terms; those of a list are JSON text, because Optuna admits only plain ones."""
    if not isinstance(values, Range):
        return CategoricalDistribution([json.dumps(value, sort_keys=True) for value in values])
    low, high = values.bounds
    if values.integer is not None:
        return IntDistribution(int(low), int(high))
    return FloatDistribution(low, high, log=values.log is not None)
