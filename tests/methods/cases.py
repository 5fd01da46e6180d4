"""Every method that a configuration can name, and which of the laws that all methods share it obeys.

A method that appears in the configuration falls under all of them; one that cannot obey a law says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from aang_ray.config.methods import MethodConfig

UNIONS = get_args(MethodConfig)[0]
NAMES: tuple[str, ...] = tuple(str(section.model_fields["name"].default) for section in get_args(UNIONS))
"""In the order of the configuration."""


@dataclass(frozen=True)
class Case:
    """What is special about a method. A reason stands where a law does not hold; None: it holds."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the method, so that it does something within a few steps."""
    objectives: tuple[int, ...] = (0, 1, 3)
    """What is sampled in the laws' examples."""
    degree: int = 1
    """Gradients times c give an update times c to this power."""
    not_driven: str | None = None
    """Why no law of one step applies."""
    not_permutable: str | None = None
    not_reducible: str | None = None
    """Why objectives without labels do not leave the end task's gradient."""
    runs_elsewhere: str | None = None
    """Where its whole runs are tested, if not with all others."""


STAGES = Case(
    objectives=(0,), not_reducible="the end task has no part in the masked-LM stage", runs_elsewhere="test_stages"
)
ROUNDS = Case(
    not_driven="trains task by task in rounds: no step has the gradients of several; the laws of a round are in "
    "test_rounds of the methods and of the loop",
    runs_elsewhere="test_rounds",
)
CASES: Mapping[str, Case] = {
    "finetune": Case(objectives=()),
    "tapt": STAGES,
    "dapt": STAGES,
    "tapt_dapt": STAGES,
    "pooled": STAGES,
    "aang": Case({"meta_every": 2, "aux_lr": 1.0}),
    "pcgrad": Case(not_permutable="conflicts are removed in a random order, drawn by position"),
    "nash_mtl": Case(degree=0),
    "fairgrad": Case(degree=0),
    "gradvac": Case(not_permutable="gradients are compared in a random order, drawn by position"),
    "cr_mogm": Case({"alpha": 0.5}),
    "pcd": Case({"beta": 0.9}),
    "excess_mtl": Case({"warmup_steps": 1}),
    "random": Case(not_permutable="weights are drawn by position"),
    "uncertainty": Case({"lr": 0.2}),
    "imtl_l": Case({"lr": 0.2}),
    "famo": Case({"lr": 0.5}),
    "dwa": Case({"epoch_steps": 1}),
    "gradnorm": Case({"lr": 0.1}),
    "attittud": Case({"rank": 2, "refresh_every": 2}, runs_elsewhere="test_attittud"),
    "halving": Case(runs_elsewhere="test_halving"),
    "alphavil": ROUNDS,
    "diw": ROUNDS,
}


def case(name: str) -> Case:
    """A method's case; all laws hold where none is written down."""
    return CASES.get(name, Case())


DRIVEN = tuple(name for name in NAMES if case(name).not_driven is None)
