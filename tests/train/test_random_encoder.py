"""Whole runs of encoders without pretraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from aang_ray.train.export import load_classifier
from aang_ray.train.run import run_cell
from tests.train.running import parameters, stepper, tiny_config


def test_weights_are_drawn_by_the_seed(tiny: dict[str, Any]) -> None:
    config = tiny_config(tiny, "encoder.name=random:2x32", "method=static")
    one, same = (parameters(stepper(config)) for _ in range(2))
    assert torch.equal(one, same)
    other = config.model_copy(update={"seed": 1})
    assert not torch.equal(parameters(stepper(other)), one)
    assert other.group == config.group, "seeds of one configuration are averaged"


def test_a_run_and_its_export(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tiny, "encoder.name=random:1x32", "encoder.pooling=mean", "method=static")
    record = run_cell(config, export=tmp_path / "model")
    assert record.result.status == "done"
    classifier = load_classifier(tmp_path / "model")
    labels, _ = classifier.predict(["a warm film", "a grim plot"])
    assert set(labels) <= {"good", "bad"}
