"""Experiment trackers: TensorBoard, MLflow, Weights & Biases and Trackio get every evaluation as it comes.

The process that drives a sweep logs all of its runs, by the tracker's own package, so that a run on a cluster needs
neither the package nor its credentials. Ray's callbacks for MLflow and W&B are not used: they know Tune's trials alone
(`aang train` has none), and there are none for TensorBoard outside Tune's temporary folder and none for Trackio.
"""

from __future__ import annotations

import contextvars
import io
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any, Protocol

from aang_ray.errors import UserError
from aang_ray.report.logged import readable
from aang_ray.sweep.plan import PlannedCell
from aang_ray.sweep.progress import Evaluation

PROJECT = "aang"
"""The project (MLflow: the experiment) where none is named."""


class TrackedRun(Protocol):
    """One run in a tracker."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add the numbers of a step."""

    def end(self, *, failed: bool) -> None:
        """Close the run."""


Begin = Callable[[str, Mapping[str, Any]], TrackedRun]
"""From a name and settings to a new run."""


class Tracking:
    """The trackers of a sweep or a run. An error of a tracker is told once, and then this tracker gets nothing more.

    Args:
        wanted: `NAME` or `NAME=WHERE` of each tracker. WHERE is a folder (tensorboard: `runs`), a tracking URI
            (mlflow: `MLFLOW_TRACKING_URI`, or `mlflow.db` here), or a project (wandb, trackio: `aang`).
        line: Prints a line.

    Raises:
        UserError: An unknown tracker, one whose package is not installed, or one that cannot use WHERE.
    """

    def __init__(self, wanted: Sequence[str], line: Callable[[str], None]) -> None:
        self._line = line
        self._begin: dict[str, Begin] = {}
        for one in wanted:
            name, _, where = one.partition("=")
            if name not in TRACKERS:
                raise UserError(f"--track {name}: there is no such tracker; choose one of {', '.join(TRACKERS)}")
            package, make = TRACKERS[name]
            if find_spec(package) is None:
                raise UserError(f"--track {name} needs a further package: pip install 'aang-ray[{name}]'")
            try:
                self._begin[name] = make(where)
            except Exception as error:
                raise UserError(f"--track {one}: {str(error).partition(chr(10))[0]}") from error
        self._runs: dict[tuple[str, str], TrackedRun] = {}

    def evaluated(self, cell: PlannedCell, evaluation: Evaluation) -> None:
        """Log an evaluation of a cell."""
        for name in list(self._begin):
            self._try(name, lambda name=name: self._run(name, cell).log(numbers(evaluation), evaluation.step))  # type: ignore[misc]

    def ended(self, cell: PlannedCell, result: Mapping[str, Any]) -> None:
        """Log how a cell ended: `status`, and of a finished one the `step` and the scores `dev` and `test`."""
        final = {
            f"final/{name}": float(result[name]) for name in ("dev", "test", "seconds") if result.get(name) is not None
        }

        def end(name: str) -> None:
            run = self._runs.pop((name, cell.cell), None)
            if run is None and result["status"] != "done":
                return
            run = run or self._begin[name](cell.title, settings_of(cell))
            if final:
                run.log(final, int(result.get("step") or 0))
            run.end(failed=result["status"] == "failed")

        for name in list(self._begin):
            self._try(name, lambda name=name: end(name))  # type: ignore[misc]

    def close(self) -> None:
        """Close the runs that have not ended: their sweep stops, and a later one goes on with new runs."""
        for (name, _), run in list(self._runs.items()):
            self._try(name, lambda run=run: run.end(failed=False))  # type: ignore[misc]
        self._runs.clear()

    def _run(self, name: str, cell: PlannedCell) -> TrackedRun:
        key = (name, cell.cell)
        if key not in self._runs:
            self._runs[key] = self._begin[name](cell.title, settings_of(cell))
        return self._runs[key]

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 (whatever a tracker raises, hours of training must not end for it)
            self._line(f"warning: {name} gets nothing more: {type(error).__name__}: {error}")
            self._begin.pop(name, None)


def numbers(evaluation: Evaluation) -> dict[str, float]:
    """Return the numbers of an evaluation under readable names: `dev`, `end task weight`, `loss/…` and `weight/…`."""
    found = {"seconds": evaluation.seconds}
    if evaluation.score is not None:
        found["dev"] = evaluation.score
    if evaluation.end_task_weight is not None:
        found["end task weight"] = evaluation.end_task_weight
    found |= {f"loss/{name_of(name)}": loss for name, loss in evaluation.losses.items()}
    return found | {f"weight/{name_of(name)}": weight for name, weight in evaluation.weights.items()}


def name_of(objective: str) -> str:
    """Return a readable name of an objective that every tracker takes: `mask - bidirectional - denoise`."""
    name = "end task" if objective == "end-task" else readable(objective).replace("·", "-")
    return re.sub(r"[^\w\-. :]", "_", name)


def settings_of(cell: PlannedCell) -> dict[str, Any]:
    """Return the settings of a run with dotted names, and what it is called in the store."""
    config = cell.config
    named = {"cell": cell.cell, "task": config.task_name, "row": config.row_name}
    return named | dict(_flat(config.model_dump(mode="json", exclude={"fingerprints", "resources"})))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _tensorboard(where: str) -> Begin:
    from torch.utils.tensorboard import SummaryWriter

    class Run:
        def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
            folder = re.sub(r"[^\w\-.=]+", "_", name)
            self._writer: Any = SummaryWriter(f"{where or 'runs'}/{folder}-{settings['cell']}")
            lines = "\n".join(f"    {key}: {value}" for key, value in settings.items())
            self._writer.add_text("settings", lines)

        def log(self, values: Mapping[str, float], step: int) -> None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
            self._writer.flush()

        def end(self, *, failed: bool) -> None:
            self._writer.close()

    return Run


def _mlflow(where: str) -> Begin:
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=where or None)
    found = client.get_experiment_by_name(PROJECT)
    experiment = found.experiment_id if found is not None else client.create_experiment(PROJECT)

    class Run:
        def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
            self._id = client.create_run(experiment, run_name=name).info.run_id
            params = [Param(key, str(value)) for key, value in settings.items()]
            for at in range(0, len(params), 100):  # as many as MLflow takes at once
                client.log_batch(self._id, params=params[at : at + 100])

        def log(self, values: Mapping[str, float], step: int) -> None:
            now = int(1000 * time.time())
            client.log_batch(self._id, metrics=[Metric(key, value, now, step) for key, value in values.items()])

        def end(self, *, failed: bool) -> None:
            client.set_terminated(self._id, "FAILED" if failed else "FINISHED")

    return Run


def _wandb(where: str) -> Begin:
    import wandb

    class Run:
        def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
            # Several runs of one process are open at the same time.
            self._run = wandb.init(
                project=where or PROJECT,
                name=name,
                config=dict(settings),
                reinit="create_new",
                settings=wandb.Settings(silent=True, console="off"),
            )

        def log(self, values: Mapping[str, float], step: int) -> None:
            self._run.log(dict(values), step=step)

        def end(self, *, failed: bool) -> None:
            self._run.finish(exit_code=int(failed))

    return Run


def _trackio(where: str) -> Begin:
    import trackio

    class Run:
        def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
            # `init` ends the run that its context knows; in a context of its own, several are open at the same time.
            make: dict[str, Any] = {"project": where or PROJECT, "name": name, "config": dict(settings), "embed": False}
            with redirect_stdout(io.StringIO()):
                self._run = contextvars.Context().run(trackio.init, **make, auto_log_gpu=False, auto_log_cpu=False)

        def log(self, values: Mapping[str, float], step: int) -> None:
            self._run.log(dict(values), step=step)

        def end(self, *, failed: bool) -> None:
            with redirect_stdout(io.StringIO()):
                self._run.finish()

    return Run


TRACKERS: Mapping[str, tuple[str, Callable[[str], Begin]]] = {
    "tensorboard": ("tensorboard", _tensorboard),
    "mlflow": ("mlflow", _mlflow),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}
"""Package and maker of each tracker. The extras of the same names install them."""
