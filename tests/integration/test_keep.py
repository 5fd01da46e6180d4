"""A sweep as a user starts it: it keeps the best model of each row, and the trackers get every run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from aang_ray import load_classifier
from aang_ray.cli import main
from aang_ray.store import Store
from aang_ray.store.files import open_location
from aang_ray.train.keep import kept_models
from tests.integration.conftest import Start

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]


def test_kept_models_and_trackers(
    tmp_path: Path, tiny: Path, start: Start, environment: dict[str, str], sweep_file: Callable[..., Path]
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    store, events, runs_uri = Store(tmp_path / "store"), tmp_path / "events", f"sqlite:///{tmp_path}/mlflow.db"
    command = [sys.executable, "-m", "aang_ray", "sweep", str(sweep_file(["finetune", "aang"], 2, 10))]
    options = ["--store", store.uri, "--keep-models", "best", "--track", f"tensorboard={events}"]
    sweep = start([*command, *options, "--track", f"mlflow={runs_uri}"], environment)
    assert sweep.wait(500) == 0, sweep.output
    assert "warning: tensorboard" not in sweep.output
    assert "warning: mlflow" not in sweep.output

    rows = store.results().to_pylist()
    assert len(rows) == 4
    # Of each row the seed with the best dev score; of equal ones the lowest seed.
    best = {}
    for row in sorted(rows, key=lambda row: (row["dev_score"], -row["seed"])):
        best[row["method"]] = row["cell"]
    assert kept_models(open_location(store.uri)) == set(best.values())

    texts = [json.loads(line)["text"] for line in (tiny / "task" / "test.jsonl").read_text().splitlines()]
    for method, cell in best.items():
        model = tmp_path / method
        assert main(["export", cell, "--store", store.uri, "-o", str(model)]) == 0
        classifier = load_classifier(model)
        stored = {
            row["position"]: dict(row["probabilities"])
            for row in store.predictions({cell}).to_pylist()
            if row["split"] == "test"
        }
        wanted_EC = [[stored[position][name] for name in ("neg", "pos")] for position in range(len(texts))]
        _, found_EC = classifier.predict(texts)
        assert np.abs(np.asarray(found_EC) - wanted_EC).max() < 1e-5

    client = MlflowClient(tracking_uri=runs_uri)
    tracked = client.search_runs([client.get_experiment_by_name("aang").experiment_id])
    logged = {run.data.params["cell"]: run for run in tracked}
    for row in rows:
        assert logged[row["cell"]].info.status == "FINISHED"
        assert logged[row["cell"]].data.metrics["final/test"] == pytest.approx(row["test_score"])
        (folder,) = events.glob(f"*-{row['cell']}")
        scalars = event_accumulator.EventAccumulator(str(folder))
        scalars.Reload()
        for name in ("dev", "loss/end task"):
            assert [one.step for one in scalars.Scalars(name)] == [5, 10]
        assert scalars.Scalars("final/dev")[0].value == pytest.approx(row["dev_score"])
