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
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyarrow import fs
from ray.tune.search import Repeater, Searcher
from ray.tune.search.optuna import OptunaSearch

from aang_ray.config import RunConfig
from aang_ray.store import Store
from aang_ray.store.files import open_location
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import write_json
from aang_ray.sweep.spec import Range, SearchSpec, Values, changed, space_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


FAILED = -math.inf
"""What Optuna is told of a configuration with a failed seed. (It cannot be told of a failure through `Repeater`.)"""

FOLDER = (".progress", "searches")

Parameters = dict[str, Any]
"""Setting -> value, as Optuna has them."""


class Searches(Searcher):  # type: ignore[misc]  # Ray has no type information
    """One Optuna study for each run of the sweep file. A suggestion is one cell: a configuration with a seed."""

    def __init__(
        self,
        runs: Sequence[RunConfig],
        spec: SearchSpec,
        seeds: int,
        store: Store,
        lay_out: Callable[[RunConfig], list[PlannedCell]],
        planned: Callable[[Sequence[PlannedCell]], None],
        *,
        keep_failed: bool = False,
    ) -> None:
        """Read what was asked for before.

        Args:
            runs: the runs of the sweep file.
            spec: samples, space and the sampler's seed.
            seeds: how many seeds a configuration has.
            store: where scores of done cells are, and the configurations that were asked for.
            lay_out: gives the cells of a configuration, one a seed.
            planned: is called with the cells of each new configuration.
            keep_failed: whether cells that failed before are not run again; they count as failed.
        """
        super().__init__()
        rows = store.results().select(["cell", "status", "dev_score"]).to_pylist()
        self._scores: dict[str, float] = {
            row["cell"]: row["dev_score"] for row in rows if row["status"] == "done" and row["dev_score"] is not None
        }
        if keep_failed:
            self._scores |= {row["cell"]: FAILED for row in rows if row["status"] == "failed"}
        self.trial_of: Callable[[PlannedCell], dict[str, Any]] = lambda cell: {"cell": cell.cell}
        """Makes the parameters of a cell's trial."""
        self._lay_out, self._planned = lay_out, planned
        self.cells: dict[str, PlannedCell] = {}
        """Cells of all configurations so far."""
        self._studies = [_Study(run, spec, seeds, store.uri) for run in runs]
        self._pending: list[PlannedCell] = []
        """Cells of the newest configuration that have no trial yet."""
        self._waiting: dict[str, list[tuple[_Study, str]]] = {}
        """By cell without a score: who is to be told."""
        self._cell_of: dict[str, str] = {}
        """By trial."""
        self.closed = False
        """Whether the sweep is stopping, so that no further configuration may be asked for."""
        self._ask_again()

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps the state of searchers for a restore, which is never made: the store remembers."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """See `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """See `__getstate__`."""

    @property
    def unasked(self) -> int:
        """How many configurations are still to be asked for."""
        return sum(study.left for study in self._studies)

    @property
    def finished(self) -> bool:
        """Whether every configuration was asked for and each of its cells has a trial or a score."""
        return not self._pending and not self.unasked

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The parameters of the next trial; `FINISHED` where none is left."""
        if self.closed:  # `FINISHED` and not None: with None Tune would wait for a trial that never comes
            return str(Searcher.FINISHED)
        while not self._pending and self.unasked:
            self._ask(max(self._studies, key=lambda study: study.left))
        if not self._pending:
            return str(Searcher.FINISHED)
        cell = self._pending.pop(0)
        self._cell_of[trial_id] = cell.cell
        return {"trial": self.trial_of(cell)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell the studies how a cell ended; one that was stopped has not ended."""
        result = result or {}
        if result.get("status") not in ("stopped", "not started"):
            self._tell(self._cell_of[trial_id], result.get("dev", FAILED))

    def _ask_again(self) -> None:
        """Ask for the configurations that were asked for before; Optuna is told the scores that the store has."""
        for study in self._studies:
            for _ in range(len(study.known)):
                self._ask(study)

    def _ask(self, study: _Study) -> None:
        """Ask for one configuration. Cells that have a score, or a trial already, get no trial."""
        numbers, settings = study.ask()
        cells = self._lay_out(changed(study.run, settings))
        new = [cell for cell in cells if cell.cell not in self.cells]
        self.cells |= {cell.cell: cell for cell in new}
        self._planned(new)
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
    """The search for one run of the sweep file."""

    def __init__(self, run: RunConfig, spec: SearchSpec, seeds: int, store: str) -> None:
        self.run = run
        self._space = space_of(spec, run)
        self._samples = spec.samples if self._space else 1  # a method may have none of the settings
        self._file = _AskedFile(store, f"{run.group}\n{spec.model_dump_json()}")
        self.known = self._file.read()[: self._samples]
        """Parameters that were asked for before, in that order."""
        self._asked: list[Parameters] = []
        self._seeds = seeds
        self._repeater = self._make_repeater(spec.seed) if self._space else None

    @property
    def left(self) -> int:
        """Configurations that are still to be asked for."""
        return self._samples - len(self._asked)

    def ask(self) -> tuple[list[str], dict[str, Any]]:
        """The next configuration: names by which `tell` knows its seeds, and its settings."""
        names = [f"{len(self._asked)}-{seed}" for seed in range(self._seeds)]
        parameters: Parameters = {}
        if self._repeater is not None:
            for name in names:  # each gives the same parameters
                parameters = self._repeater.suggest(name)
        self._asked.append(parameters)
        if len(self._asked) > len(self.known):
            self._file.write(self._asked)
        settings = {
            key: value if isinstance(self._space[key], Range) else json.loads(value)
            for key, value in parameters.items()
        }
        return names, settings

    def tell(self, name: str, score: float) -> None:
        """The dev score of one seed; with the last seed Optuna is told the mean."""
        if self._repeater is not None:
            self._repeater.on_trial_complete(name, {"dev": score})

    def _make_repeater(self, seed: int) -> Any:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # A sampler that starts again with its old seed would propose its first random points again.
        text = f"{seed} {len(self.known)}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        search = OptunaSearch(
            distributions(self._space),
            metric="dev",
            mode="max",
            # Configurations that run count as bad, so that those that are asked for at once differ.
            sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=True),
            points_to_evaluate=self.known,
        )
        return Repeater(search, repeat=self._seeds, set_index=False)


class _AskedFile:
    """The configurations that a study has asked for: `{"study": hash, "asked": [parameters, ...]}`."""

    def __init__(self, store: str, key: str) -> None:
        self._study = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._location = open_location(store)
        self._path = self._location.path(*FOLDER, f"{self._study}.json")

    def read(self) -> list[Parameters]:
        """In the order in which they were asked for; none for a new search."""
        if self._location.filesystem.get_file_info(self._path).type != fs.FileType.File:
            return []
        with self._location.filesystem.open_input_file(self._path) as stream:
            asked: list[Parameters] = json.loads(stream.read())["asked"]
        return asked

    def write(self, asked: list[Parameters]) -> None:
        """All that the study has asked for so far."""
        write_json(self._location, self._path, {"study": self._study, "asked": asked})


def distributions(space: Mapping[str, Values]) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms. Values of a list are JSON text, because Optuna admits only plain ones."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    result: dict[str, BaseDistribution] = {}
    for key, values in space.items():
        if not isinstance(values, Range):
            result[key] = CategoricalDistribution([json.dumps(value, sort_keys=True) for value in values])
        elif values.integer is not None:
            low, high = values.bounds
            result[key] = IntDistribution(int(low), int(high))
        else:
            result[key] = FloatDistribution(*values.bounds, log=values.log is not None)
    return result
