"""Training in rounds: every task alone from the same parameters, then what the method makes of it.

A step of a round is one optimiser step of one task, so that the loop, its checkpoints and its counts stay those of
any other method. Between a task's first and last step body and heads hold that task's parameters; at the end of a
round they hold the round's result, and only there dev is scored.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from aang_ray.config.methods import RoundsSection
from aang_ray.errors import UserError
from aang_ray.gradients.engine import StepGradients
from aang_ray.methods.base import Sampled
from aang_ray.methods.rounds import RoundMethod
from aang_ray.train.optim import make_optimizer, rate_factor
from aang_ray.train.parallel.agreement import Agreement
from aang_ray.train.rounds.plan import Slot, fitted, slots
from aang_ray.train.rounds.vector import ParameterVector
from aang_ray.train.setup import Setup
from aang_ray.train.step import Prepared, Stepper


@dataclass(frozen=True)
class RoundPrepared(Prepared):
    """A step's batch, and what this worker trains meanwhile."""

    step: int = 0
    slot: Slot | None = None
    """None where all tasks are trained together."""
    own: Prepared | None = None
    """This worker's own step, at a slot that leads."""

    @property
    def sampled(self) -> Sampled:
        return Sampled(self.step, self.batch.sampled, self.batch.shares, (1.0,) * len(self.batch.sampled))


class RoundStepper(Stepper, ABC):
    """Rounds of the tasks: 0 the end task, then the objectives that step 0 samples, for the whole run.

    A task's batch is `batch.end_task` or, alone, the whole of `batch.auxiliary`. A round is as many of its steps as
    `method` says, and the run as many whole rounds as `schedule.steps` holds. A task's learning rates go through the
    part of the schedule that the round takes, as if all tasks were trained at once: their updates do not depend on
    their order.
    """

    extra_parts: tuple[int, ...] = ()
    """Steps of a round beyond those of the tasks."""

    def __init__(self, setup: Setup, method: RoundMethod, config: RoundsSection) -> None:
        super().__init__(setup)
        if setup.domain.follows_factors:
            raise UserError(f"objectives.allocation: published does not go with {setup.config.method.name}; use equal")
        self.tasks = method
        self.objectives = setup.domain.batch(0, False, None).sampled
        self.total = setup.config.schedule.steps or 0
        wanted = self._task_steps(config)
        lengths = fitted((*wanted, *self._extra_parts(wanted)), self.total)
        self.task_steps = lengths[: len(wanted)]
        self.extra_parts = lengths[len(wanted) :]
        self.round_steps = sum(lengths)
        """Of a round at the least."""
        self.slots = slots(self.task_steps, setup.workers.size)
        self.vector = ParameterVector(setup.encoder, setup.heads)
        self._rate = rate_factor(setup.config.schedule)
        self._start_Q: Tensor | None = None
        """The parameters that the round began with."""
        self._losses_W: Tensor | None = None
        """What the workers' steps at the leading slot cost, by rank."""
        self.round, self.round_began, self.place = 0, 0, 0
        """Number of the round, the step it began at, and slots of it that are done."""
        self.round_over = False

    def evaluates_after(self, step: int) -> bool:
        return self.round_over

    def ends_after(self, step: int) -> bool:
        return self.round_over and step + self.round_steps > self.total

    def prepare(self, step: int) -> RoundPrepared:
        """The batch of a step of a task alone."""
        round_, place = self.position(step)
        slot = self.slots[place]
        mine = next((s for s in self.slots if s.owner == self.setup.workers.rank and _together(s, slot, self)), None)
        own = None if mine is None or not slot.leads else self._prepared(mine, round_)
        plain = own if own is not None and mine == slot else self._prepared(slot, round_, pieces=False)
        shared = {f.name: getattr(plain, f.name) for f in fields(Prepared)}
        return RoundPrepared(**shared, step=step, slot=slot, own=own)

    @abstractmethod
    def position(self, step: int) -> tuple[int, int]:
        """Round and slot of a step."""

    def step(self, prepared: Prepared) -> StepGradients:
        assert isinstance(prepared, RoundPrepared)
        return self._task_step(prepared)
