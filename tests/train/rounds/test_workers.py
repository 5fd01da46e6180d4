"""Two workers take the steps of one: every task on one of them, DIW's tries and ATTITTUD's steps on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.gradients import engine as memory
from aang_ray.gradients.statistics import ExampleJacobian
from aang_ray.train.control import RunControl
from aang_ray.train.device import choose_compute
from aang_ray.train.rounds import RoundStepper, make_stepper
from aang_ray.train.run import run_cell
from aang_ray.train.setup import build
from aang_ray.train.workers.group import Workers
from tests.train.parallel.processes import together
from tests.train.rounds.running import PLAIN, config_of
from tests.train.running import parameters
from tests.train.test_checkpoint import numbers

METHODS = {
    "alphavil": ("alphavil, round_steps: 2, alpha_lr: 2.0", 12),
    "diw": ("diw, round_steps: 2, tries: 2", 16),
    "attittud": ("attittud, rank: 3, refresh_every: 2, subspace_examples: 12, primary_examples: 8", 4),
}


def ends(workers: Workers, tiny: dict[str, Any]) -> dict[str, Tensor]:
    """Parameters after some steps, in float64 and without dropout."""
    found = {}
    for name, (method, steps) in METHODS.items():
        config = config_of(tiny, method, *PLAIN, f"schedule.steps={steps}")
        setup = build(config, choose_compute(config), workers)
        setup.encoder.double()
        setup.heads.double()
        made = make_stepper(setup)
        for step in range(steps):
            made.step(made.prepare(step))
        found[name] = parameters(made)
    return found


def stopped(tiny: dict[str, Any]) -> RunConfig:
    return config_of(tiny, METHODS["alphavil"][0], *PLAIN, "schedule.steps=12")


def work(workers: Workers, tiny: dict[str, Any], folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Also a whole run that continues from a checkpoint that one worker wrote within a round."""
    return ends(workers, tiny), numbers(run_cell(stopped(tiny), checkpoints=folder, workers=workers))


def test_two_workers_are_as_good_as_one(tiny: dict[str, Any], tmp_path: Path) -> None:
    alone = ends(Workers(), tiny)
    plain = numbers(run_cell(stopped(tiny)))
    cut = run_cell(stopped(tiny), checkpoints=tmp_path / "checkpoints", control=RunControl(until=3))
    assert (cut.result.status, cut.result.steps) == ("cut", 3)
    for found in together(2, tmp_path, work, tiny, tmp_path / "checkpoints"):
        assert not isinstance(found, Exception), found
        for name, expected in alone.items():
            assert float((found[0][name] - expected).norm() / expected.norm()) < 1e-6, name
        assert found[1]["result"]["error"] is None
        for row, expected_row in zip(found[1]["history"], plain["history"], strict=True):
            assert row["losses"] == pytest.approx(expected_row["losses"], rel=1e-4)
            assert row["examples"] == expected_row["examples"]
            assert row["tokens"] == expected_row["tokens"]


def short_of_memory(workers: Workers, tiny: dict[str, Any], method: str) -> None:
    """One worker finds that its vectors do not fit."""
    if workers.rank == 1:
        memory.free_memory = lambda _: 10
    config = config_of(tiny, METHODS[method][0])
    made = make_stepper(build(config, choose_compute(config), workers))
    for step in range(6):
        made.step(made.prepare(step))


@pytest.mark.parametrize("method", ["alphavil", "attittud"])
def test_memory_that_one_worker_lacks_is_one_line_from_all(tiny: dict[str, Any], tmp_path: Path, method: str) -> None:
    for found in together(2, tmp_path, short_of_memory, tiny, method):
        assert isinstance(found, UserError), found
        assert "10 are free" in str(found)


def rounded(workers: Workers, tiny: dict[str, Any]) -> dict[str, Tensor]:
    """Change the last digits of what all workers compute, as if their kernels summed in different orders."""
    scale = 1 + 1e-9 * workers.rank
    gradient, left, mixing = ExampleJacobian.mean_gradient, ExampleJacobian.left, RoundStepper.dev_gradient
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExampleJacobian, "mean_gradient", lambda self: scale * gradient(self))
        patch.setattr(ExampleJacobian, "left", lambda self, omega_KM: left(self, omega_KM) + scale)
        patch.setattr(RoundStepper, "dev_gradient", lambda self, point_Q: scale * mixing(self, point_Q))
        patch.setattr(RoundStepper, "_score", lambda self: 0.5 * scale)
        return ends(workers, tiny)


def test_rounding_does_not_part_the_workers(tiny: dict[str, Any], tmp_path: Path) -> None:
    one, other = together(2, tmp_path, rounded, tiny)
    assert not isinstance(one, Exception), one
    assert not isinstance(other, Exception), other
    for name in METHODS:
        assert torch.equal(one[name], other[name]), name
