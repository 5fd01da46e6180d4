"""Training in rounds: every task alone from the same parameters, then what the method makes of it.

A step is one optimiser step of one task, so that the loop, its checkpoints and its counts stay those of any other
method. Within a round body and heads hold the parameters of a task in training; at its end they hold the round's
result, and only there dev is scored.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from aang_ray.config.methods import RoundsSection
from aang_ray.errors import UserError
from aang_ray.gradients.engine import StepGradients
from aang_ray.methods.base import Sampled
from aang_ray.train.domain import DomainBatch
from aang_ray.train.optim import make_optimizer, rate_factor
from aang_ray.train.setup import Setup
from aang_ray.train.step import Prepared, Stepper
from aang_ray.train.workers.group import Agreement, check_same

# --- train.rounds.vector: All trained parameters of body and heads as one vector. Shape suffix: Q its entries.


class ParameterVector:
    """Reads and writes the parameters that are trained; names are those of `modules.named_parameters()`."""

    def __init__(self, body: nn.Module, heads: nn.Module) -> None:
        self.modules = nn.ModuleDict({"body": body, "heads": heads})
        self._named = {name: p for name, p in self.modules.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._named.values())

    def read(self) -> Tensor:
        """A copy, [Q]."""
        return torch.cat([p.detach().flatten() for p in self._named.values()])

    @torch.no_grad()
    def write(self, vector_Q: Tensor) -> None:
        """Give the parameters the vector's values."""
        for name, part in self.split(vector_Q).items():
            self._named[name].copy_(part)

    def split(self, vector_Q: Tensor) -> dict[str, Tensor]:
        """Views of a vector by name, each in its parameter's shape."""
        parts = torch.split(vector_Q, [p.numel() for p in self._named.values()])
        return {name: part.view_as(p) for (name, p), part in zip(self._named.items(), parts, strict=True)}


# --- train.rounds.plan: Which optimiser steps a round is made of, and which worker makes them.


@dataclass(frozen=True)
class Slot:
    """One optimiser step of one task."""

    task: int
    number: int
    """Which of the task's steps in this round."""
    owner: int
    """Rank of the worker that makes it."""
    group: int
    leads: bool
    """Whether it comes first among the steps that the workers of its group make at the same time."""
    ends: bool
    """Whether all tasks of its group are trained after it."""


class TaskPlan:
    """The steps of all tasks of a round, each of which is trained alone.

    Task i is worker i mod W's; W tasks at a time form a group. What the workers of a group do at the same time stands
    in consecutive slots and is done at the leading one: so a round has as many slots for any W.
    """

    def __init__(self, steps_N: Sequence[int], workers: int) -> None:
        self.slots: list[Slot] = []
        for group, start in enumerate(range(0, len(steps_N), workers)):
            members = range(start, min(start + workers, len(steps_N)))
            steps = max(steps_N[task] for task in members)
            for number in range(steps):
                tasks = [task for task in members if steps_N[task] > number]
                self.slots += [
                    Slot(task, number, task - start, group, task == tasks[0], number == steps - 1 and task == tasks[-1])
                    for task in tasks
                ]
        self._places = {(slot.group, slot.number, slot.owner): slot for slot in self.slots}

    def own(self, slot: Slot, rank: int) -> Slot | None:
        """What a worker does while this step is made; None where it has nothing to do."""
        return self._places.get((slot.group, slot.number, rank))

    def members(self, group: int) -> list[tuple[int, int]]:
        """(task, owner) of a group."""
        return [(slot.task, slot.owner) for slot in self.slots if slot.group == group and slot.number == 0]

    def first(self, task: int) -> int:
        """Place of the first slot of the group that trains a task."""
        group = next(slot.group for slot in self.slots if slot.task == task)
        return next(place for place, slot in enumerate(self.slots) if slot.group == group)


def fitted(lengths: Sequence[int], total: int) -> tuple[int, ...]:
    """The lengths of a round's parts, shortened where the run has fewer steps than one round.

    Every part keeps one step; what is left is shared out in proportion to what each wanted beyond it.

    Raises:
        UserError: where there is no step for every part.
    """
    if sum(lengths) <= total:
        return tuple(lengths)
    if len(lengths) > total:
        raise UserError(
            f"schedule.steps: {total} is less than one step for each of the {len(lengths)} parts of a round; "
            "raise it or lower n"
        )
    spare, wanted = total - len(lengths), sum(lengths) - len(lengths)
    return tuple(1 + (length - 1) * spare // wanted for length in lengths)


# --- train.rounds.tasks: The tasks of a run in rounds, and the batches of each alone.


@dataclass(frozen=True)
class RoundPrepared(Prepared):
    """A step's batch, and what this worker does meanwhile."""

    step: int = 0
    slot: Slot | None = None
    """None where all tasks are trained together."""
    own: Prepared | None = None
    """This worker's own step, where the slot leads and the worker has one."""

    @property
    def sampled(self) -> Sampled:
        count = len(self.batch.sampled)
        return Sampled(self.step, self.batch.sampled, self.batch.shares, (1.0,) * count)


class Tasks:
    """Task 0 is the end task, then come the objectives that step 0 samples, for the whole run.

    A task's batch is `batch.end_task` examples, or the whole of `batch.auxiliary`.
    """

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.objectives = setup.domain.batch(0, False, None).sampled

    def __len__(self) -> int:
        return 1 + len(self.objectives)

    def steps(self, config: RoundsSection) -> list[int]:
        """Optimiser steps of each task in a round."""
        if config.round_steps is not None:
            return [config.round_steps] * len(self)
        setup, batch = self._setup, self._setup.config.batch
        sizes = [len(setup.task.train), *(setup.domain.size(objective) for objective in self.objectives)]
        at_once = [batch.end_task or 1, *(batch.auxiliary or 1 for _ in self.objectives)]
        return [math.ceil(config.round_fraction * size / of) for size, of in zip(sizes, at_once, strict=True)]

    def batch(self, task: int, number: int) -> DomainBatch:
        """Batch number so-and-so of a task."""
        objectives = (self.objectives[task - 1],) if task else ()
        return self._setup.domain.chosen(number, task == 0, objectives)

    def all_of(self, number: int) -> DomainBatch:
        """Batch number so-and-so of all tasks together."""
        return self._setup.domain.chosen(number, True, self.objectives)

    def tokens(self, batch: DomainBatch) -> int:
        """Of the whole batch, whoever computes them."""
        return sum(int(costs_E.sum()) for costs_E in self._setup.domain.costs(batch))


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
