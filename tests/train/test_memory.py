"""Trials share processes, so no part of a run's model may stay in memory after the run, for any method."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from torch import nn

from aang_ray.train.device import choose_compute
from aang_ray.train.loop import Trainer
from aang_ray.train.setup import build
from tests.methods.cases import NAMES
from tests.train.running import tiny_config

SETTINGS = ("schedule.steps=8", "schedule.eval_every=4", "batch.micro=auto")


def left_of(tiny: dict[str, Any], *settings: str) -> int:
    """Parameters that are still in memory after a run."""
    config = tiny_config(tiny, *SETTINGS, *settings)
    trainer = Trainer(build(config, choose_compute(config)))
    modules: list[nn.Module] = [trainer.setup.encoder, trainer.setup.heads]
    seen = [weakref.ref(parameter) for module in modules for parameter in module.parameters()]
    trainer.run()
    del trainer, modules
    gc.collect()
    return sum(ref() is not None for ref in seen)


@pytest.mark.parametrize("method", [name for name in NAMES if name not in ("tapt", "dapt", "tapt_dapt", "pooled")])
def test_nothing_is_left_of_a_run(tiny: dict[str, Any], method: str) -> None:
    assert left_of(tiny, f"method={method}") == 0


def test_nothing_is_left_of_a_run_in_stages(tiny: dict[str, Any]) -> None:
    assert left_of(tiny, "method={name: tapt, tapt_steps: 1}", "final_finetune.steps=1") == 0


@pytest.mark.parametrize("setting", ["gradients.engine=loop", "gradients.checkpointing=true", "precision=bf16"])
def test_nothing_is_left_of_other_ways_to_compute(tiny: dict[str, Any], setting: str) -> None:
    assert left_of(tiny, "method=aang", setting) == 0
