"""Training in rounds: every task alone from the same parameters, then what the method makes of it.

A step is one optimiser step of one task, so that the loop, its checkpoints and its counts stay those of any other
method. Within a round body and heads hold the parameters of a task in training; at its end they hold the round's
result, and only there dev is scored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from aang_ray.config.methods import RoundsSection
from aang_ray.errors import UserError
from aang_ray.gradients.engine import StepGradients
from aang_ray.train.domain import DomainBatch
from aang_ray.train.optim import make_optimizer, rate_factor
from aang_ray.train.parallel.agreement import Agreement, check_same
from aang_ray.train.rounds.plan import Slot, TaskPlan, fitted
from aang_ray.train.rounds.tasks import RoundPrepared, Tasks
from aang_ray.train.rounds.vector import ParameterVector
from aang_ray.train.setup import Setup
from aang_ray.train.step import Prepared, Stepper


class RoundStepper(Stepper, ABC):
    """Rounds of the tasks: every one alone, and what else the method has in them.

    A run has as many whole rounds as `schedule.steps` holds; one that is shorter than a round shortens it. The
    learning rates of every task go through the part of the schedule that the whole round takes, as if all were trained
    at once: a task's update does not depend on the order.

    On W workers task i is trained by worker i mod W alone, and of its steps nothing is sent but the losses. A run that
    goes on after a stop trains the tasks at hand again from their start.
    """

    def __init__(self, setup: Setup, config: RoundsSection) -> None:
        super().__init__(setup)
        name = setup.config.method.name
        if setup.domain.follows_factors:
            raise UserError(f"objectives.allocation: published does not go with {name}; use equal")
        if setup.config.resources.optimizer_state == "sharded":
            raise UserError(f"resources.optimizer_state: sharded does not go with {name}; use replicated")
        self.tasks = Tasks(setup)
        self._total = setup.config.schedule.steps or 0
        wanted = self.tasks.steps(config)
        lengths = fitted((*wanted, *self._beyond(wanted)), self._total)
        self.task_steps, self.beyond = lengths[: len(wanted)], lengths[len(wanted) :]
        self.round_steps = sum(lengths)
        """Of a round, at the least."""
        self.plan = TaskPlan(self.task_steps, setup.workers.size)
        self.vector = ParameterVector(setup.encoder, setup.heads)
        self._rate = rate_factor(setup.config.schedule)
        self._start_Q: Tensor | None = None
        self._losses_W: Tensor | None = None
        """Of the steps that the workers made at the leading slot, by rank."""
        self.round, self.began, self.place = 0, 0, 0
        """Number of the round, the step it began with, and how many steps of its present part are done."""
        self.over = False
        """Whether the last step ended a round."""

    def evaluates_after(self, step: int) -> bool:
        return self.over

    def ends_after(self, step: int) -> bool:
        return self.over and step + self.round_steps > self._total

    def look_ahead(self, step: int) -> DomainBatch:
        return self.tasks.all_of(step)

    def prepare(self, step: int) -> RoundPrepared:
        round_, place = self._position(step)
        slot, rank = self.plan.slots[place], self.setup.workers.rank
        batch = self._batch(slot, round_)
        mine = self.plan.own(slot, rank) if slot.leads else None
        own = None
        if mine is not None:
            own_batch = batch if mine == slot else self._batch(mine, round_)
            micro = self.micro.texts
            own = Prepared(own_batch, self._pieces(own_batch, micro, None), None, micro)
        return RoundPrepared(batch, (), None, 0, batch_tokens=self.tasks.tokens(batch), step=step, slot=slot, own=own)

    def step(self, prepared: Prepared) -> StepGradients:
        assert isinstance(prepared, RoundPrepared)
        self._count()
        slot = prepared.slot
        assert slot is not None
        if slot.leads:
            self._losses_W = self._lead(slot, prepared.own)
        assert self._start_Q is not None
        assert self._losses_W is not None, "a group begins with a slot that leads"
        losses_S = self._losses_W.new_zeros(len(prepared.batch.segments))
        losses_S[-1] = self._losses_W[slot.owner]
        if slot.ends:
            for task, owner in self.plan.members(slot.group):
                self._take(task, owner)
            self.vector.write(self._start_Q)
        if slot is self.plan.slots[-1]:
            self._tasks_trained(prepared.step)
        return StepGradients(losses_S)

    def check_same(self, steps: int) -> None:
        # Within a round every worker's parameters are those of its own task.
        if self._start_Q is None:
            super().check_same(steps)
        else:
            check_same(self.setup.workers, steps, {"what the round began with": self._start_Q})

    def round_state(self) -> dict[str, Any]:
        """What a resumed run needs beyond the parameters of the task at hand."""
        return {
            "start": None if self._start_Q is None else self._start_Q.cpu(),
            "round": self.round,
            "began": self.began,
            "place": self.place,
            "over": self.over,
        }

    def restore_round(self, state: Mapping[str, Any]) -> None:
        self._start_Q = None if state["start"] is None else state["start"].to(self.setup.compute.device)
        self.round, self.began, self.over = int(state["round"]), int(state["began"]), bool(state["over"])
        if self._start_Q is not None:
            self.vector.write(self._start_Q)
            self._replay(int(state["place"]))

    def _replay(self, place: int) -> None:
        """Make the steps of the part at hand again: nothing but whole parts is kept."""
        over = self.over
        self.place = self._replay_from()
        while self.place < place:
            self.step(self.prepare(self.began + self.place))
        self.over = over

    def _replay_from(self) -> int:
        """Place of the first step whose outcome is not known."""
        return self.plan.first(self._known) if self._known < len(self.task_steps) else 0

    @property
    @abstractmethod
    def _known(self) -> int:
        """How many tasks' outcomes of this round are known."""

    def _position(self, step: int) -> tuple[int, int]:
        """Round and place of a step."""
        return self.round, self.place

    def _count(self) -> None:
        """One more step of the round."""
        if self._start_Q is None:
            self._start_Q = self.vector.read()
        self.over = False
        self.place += 1

    def _end_round(self, step: int) -> None:
        self.round, self.began, self.place, self.over = self.round + 1, step + 1, 0, True
        self._start_Q = None

    @abstractmethod
    def _take(self, task: int, owner: int) -> None:
        """A task is trained: its owner's parameters are the outcome."""

    @abstractmethod
    def _tasks_trained(self, step: int) -> None:
        """All tasks are trained; body and heads hold the parameters that the round began with."""

    @abstractmethod
    def _task_weight(self, task: int) -> float:
        """What the task's learning rate is multiplied by."""

    def _batch(self, slot: Slot, round_: int) -> DomainBatch:
        return self.tasks.batch(slot.task, round_ * self.task_steps[slot.task] + slot.number)

    def _beyond(self, wanted: list[int]) -> tuple[int, ...]:
        """Steps of a round's other parts, from those of its tasks."""
        return ()

    def _lead(self, slot: Slot, own: Prepared | None) -> Tensor:
        """The steps of all workers of a group at the same time; their losses by rank, [W]."""
        setup, workers = self.setup, self.setup.workers
        dtype = torch.promote_types(self.vector.parameters[0].dtype, torch.float32)
        losses_W = torch.zeros(workers.size, dtype=dtype, device=setup.compute.device)
        with Agreement(workers):
            if own is not None:
                if slot.number == 0:
                    mine = self.plan.own(slot, workers.rank)
                    assert mine is not None
                    self._fresh_optimizer(self.task_steps[mine.task], self._task_weight(mine.task))
                losses_W[workers.rank] = super().step(own).losses_S[-1]
        workers.sum_(losses_W)
        return losses_W

    def _fresh_optimizer(self, steps: int, weight: float) -> None:
        """For a task, rates times `weight`; the schedule's factor goes through the round in so many steps.

        Under SGD the weight stands for one on the loss, behind the clipping: so weight decay is not multiplied.
        """
        optim = self.setup.config.optim
        self.optimizer = make_optimizer(self.setup.encoder, self.setup.heads, optim)
        for group in self.optimizer.param_groups:
            group["lr"] *= weight
            if optim.algorithm == "sgd":
                group["weight_decay"] /= weight
        began, span, rate = self.began, self.round_steps, self._rate
        self.schedule = LambdaLR(self.optimizer, lambda step: rate(began + step * span // steps))
