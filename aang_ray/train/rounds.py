"""Training in rounds: each task is trained alone from the same parameters, then the method combines the results.

The methods (alphaVIL, DIW) are in `methods/rounds.py`. A step is one optimiser step of one task, so loop, checkpoints
and counts work as for any other method. Within a round, body and heads hold the parameters of the task that is being
trained; at its end, the round's result, which is scored on dev.

Shape suffixes: N tasks, Q entries of all trained parameters, W workers, S segments of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from aang_ray.config.methods import RoundsSection
from aang_ray.errors import UserError
from aang_ray.gradients.engine import StepGradients, check_memory, split_vector
from aang_ray.gradients.statistics import called_at
from aang_ray.methods.base import Sampled
from aang_ray.methods.rounds import RoundMethod
from aang_ray.objectives.source import END_TASK_HEAD
from aang_ray.train.domain import DomainBatch
from aang_ray.train.evaluate import score_of
from aang_ray.train.optim import make_optimizer, rate_factor
from aang_ray.train.primary import ExampleLosses
from aang_ray.train.setup import Setup
from aang_ray.train.step import Prepared, Stepper
from aang_ray.train.workers.group import agreed, check_same


def make_stepper(setup: Setup) -> Stepper:
    """Return the stepper for a run's method."""
    return RoundStepper(setup, setup.method) if isinstance(setup.method, RoundMethod) else Stepper(setup)


class ParameterVector:
    """Reads and writes all trained parameters of body and heads as one vector, [Q]."""

    def __init__(self, body: nn.Module, heads: nn.Module) -> None:
        self.modules = nn.ModuleDict({"body": body, "heads": heads})
        self._named = {name: p for name, p in self.modules.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._named.values())

    def read(self) -> Tensor:
        """Return a copy of all parameters, [Q]."""
        return torch.cat([p.detach().flatten() for p in self._named.values()])

    @torch.no_grad()
    def write(self, vector_Q: Tensor) -> None:
        """Copy the vector's values, [Q], into the parameters."""
        for name, part in self.split(vector_Q).items():
            self._named[name].copy_(part)

    def split(self, vector_Q: Tensor) -> dict[str, Tensor]:
        """Return views of a vector [Q], one per parameter: by name in `modules`, in the parameter's shape."""
        return dict(zip(self._named, (part for _, part in split_vector(vector_Q, self._named.values())), strict=True))


@dataclass(frozen=True)
class Slot:
    """One optimiser step of one task."""

    task: int
    number: int
    """Index of the step among the task's steps in this round."""
    owner: int
    """Rank of the worker that makes the step."""
    group: int
    """Index of the group of tasks that are trained at the same time."""
    leads: bool
    """Whether the slot is the first of the slots that the workers of its group run at the same time."""
    ends: bool
    """Whether this is the last slot of its group."""


class TaskPlan:
    """The order of the steps of a round in which each task is trained alone.

    Worker i mod W trains task i, and W consecutive tasks form a group. The steps that its workers make at the same time
    are consecutive slots, all executed at the first, so a round has the same number of slots for any W.
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
        """Return the step that worker `rank` makes at the same time as `slot`; None if it makes none."""
        return self._places.get((slot.group, slot.number, rank))

    def members(self, group: int) -> list[tuple[int, int]]:
        """Return the pairs (task, rank of its worker) of a group."""
        return [(slot.task, slot.owner) for slot in self.slots if slot.group == group and slot.number == 0]

    def first(self, task: int) -> int:
        """Return the index of the first slot of the group that contains a task."""
        group = next(slot.group for slot in self.slots if slot.task == task)
        return next(place for place, slot in enumerate(self.slots) if slot.group == group)


def fitted(lengths: Sequence[int], total: int) -> tuple[int, ...]:
    """Return the lengths of a round's parts, shortened if the run has fewer steps (`total`) than one round.

    Every part gets one step. The remaining steps are divided in proportion to `length - 1`, rounded down.

    Raises:
        UserError: There is no step for every part.
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


@dataclass(frozen=True)
class RoundPrepared(Prepared):
    """A step's batch, and the step that this worker makes at the same time."""

    step: int = 0
    slot: Slot | None = None
    """Position in the round; None if all tasks are trained together."""
    own: Prepared | None = None
    """This worker's own step; None unless the slot leads and the worker has a step."""

    @property
    def sampled(self) -> Sampled:
        count = len(self.batch.sampled)
        return Sampled(self.step, self.batch.sampled, self.batch.shares, (1.0,) * count)


class RoundStepper(Stepper):
    """Makes the steps of rounds, and implements the `Round` interface that the method uses.

    A run has as many whole rounds as fit into `schedule.steps`; if not even one fits, the round is shortened. Every
    task's learning rate runs through the round's whole part of the schedule, so a task's update does not depend on
    their order.

    Optimiser states of single tasks are not saved: a resumed run repeats the current group of tasks, or the current
    try.
    """

    def __init__(self, setup: Setup, method: RoundMethod) -> None:
        super().__init__(setup)
        config, name = setup.config.method, setup.config.method.name
        assert isinstance(config, RoundsSection)
        if setup.domain.follows_factors:
            raise UserError(f"objectives.allocation: published does not go with {name}; use equal")
        if setup.config.resources.optimizer_state == "sharded":
            raise UserError(f"resources.optimizer_state: sharded does not go with {name}; use replicated")
        self.method = method
        self.objectives: tuple[int, ...] = setup.domain.batch(0, False, None).sampled
        self._total = setup.config.schedule.steps or 0
        wanted = self._steps_of_tasks(config)
        lengths = fitted([*wanted, wanted[0]] if method.has_tries else wanted, self._total)
        self.task_steps, self.try_steps = lengths[: len(wanted)], sum(lengths[len(wanted) :])
        self.round_steps = sum(lengths)
        """Minimum number of steps of a round."""
        self.plan = TaskPlan(self.task_steps, setup.workers.size)
        self.vector = ParameterVector(setup.encoder, setup.heads)
        self._dev = setup.domain.reader("dev")
        self._dev_losses = ExampleLosses(setup)
        self._rate = rate_factor(setup.config.schedule)
        self._start_Q: Tensor | None = None
        self._losses_W: Tensor | None = None
        """Losses of the steps that the workers made at the last leading slot, by rank, [W]."""
        self.round, self.began, self.place = 0, 0, 0
        """Index of the round, its first step, and the number of completed steps in its current part."""
        self.over = False
        """Whether the last step ended a round."""

    # Methods of `Stepper`, called by the loop.

    @property
    def prepares_ahead(self) -> bool:
        return not self.method.has_tries  # the number of tries depends on the scores

    def evaluates_after(self, step: int) -> bool:
        return self.over

    def ends_after(self, step: int) -> bool:
        return self.over and step + self.round_steps > self._total

    def batch(self, step: int, with_dev: bool = False) -> DomainBatch:
        return self.setup.domain.source.batch_of(step, True, self.objectives)

    def prepare(self, step: int) -> RoundPrepared:
        if self.method.together:
            return self._prepare_try(step)
        # Without tries all rounds have equally many steps, so batches can be made while an earlier step runs.
        round_, place = (self.round, self.place) if self.method.has_tries else divmod(step, self.round_steps)
        slot = self.plan.slots[place]
        batch, own = self._task_batch(slot, round_), None
        mine = self.plan.own(slot, self.setup.workers.rank) if slot.leads else None
        if mine is not None:
            own_batch = batch if mine == slot else self._task_batch(mine, round_)
            micro = self.micro.texts
            own = Prepared(own_batch, self._pieces(own_batch, micro, None), None, micro)
        tokens = self.setup.domain.tokens(batch)
        return RoundPrepared(batch, (), None, 0, batch_tokens=tokens, step=step, slot=slot, own=own)

    def step(self, prepared: Prepared) -> StepGradients:
        assert isinstance(prepared, RoundPrepared)
        if self._start_Q is None:
            self._start_Q = self.vector.read()
        self.over = False
        self.place += 1
        return self._step_together(prepared) if prepared.slot is None else self._step_alone(prepared, prepared.slot)

    def check_same(self, steps: int) -> None:
        # Within a round every worker's parameters are those of its own task.
        if self._start_Q is None:
            super().check_same(steps)
        else:
            check_same(self.setup.workers, steps, {"what the round began with": self._start_Q})

    def state_dict(self) -> dict[str, Any]:
        place = {"round": self.round, "began": self.began, "place": self.place, "over": self.over}
        start_Q = None if self._start_Q is None else self._start_Q.cpu()
        return {**super().state_dict(), "round": {"start": start_Q, **place, **self.method.round_state()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        state = state["round"]
        self.method.restore_round(self, state)
        self._start_Q = None if state["start"] is None else state["start"].to(self.setup.compute.device)
        self.round, self.began, self.over = int(state["round"]), int(state["began"]), bool(state["over"])
        if self._start_Q is None:
            return
        # Repeat the steps of the current part, because only whole parts are saved.
        self.vector.write(self._start_Q)
        trained = self.method.trained
        self.place = self.plan.first(trained) if trained < len(self.task_steps) else 0
        while self.place < int(state["place"]):
            self.step(self.prepare(self.began + self.place))
        self.over = bool(state["over"])

    # Methods of `Round`, called by the method.

    @property
    def start_Q(self) -> Tensor:
        assert self._start_Q is not None, "a round has begun"
        return self._start_Q

    def write(self, vector_Q: Tensor) -> None:
        self.vector.write(vector_Q)

    def allocate(self, rows: int) -> Tensor:
        with agreed(self.setup.workers):  # the workers must agree on whether there is memory
            # The 3 more rows are the round's first parameters, the mixed parameters, and their gradient.
            check_memory(self.vector.parameters, rows + 3)
            return self.vector.read().repeat(rows, 1)

    def task_update(self, owner: int, out_Q: Tensor) -> None:
        if self.setup.workers.rank == owner:
            torch.sub(self.vector.read(), self.start_Q, out=out_Q)
        self.setup.workers.broadcast_(out_Q, owner)

    def dev_gradient(self, point_Q: Tensor) -> Tensor:
        point_Q = point_Q.detach().requires_grad_()
        gradient_Q = torch.zeros_like(point_Q)
        size = len(self.setup.task.dev)
        with self._dev_losses.evaluating():
            for piece in self.setup.domain.end_task_pieces("dev", np.arange(size), self.micro.texts):
                losses_E = called_at(self.vector.split(point_Q), self.vector.modules, self._dev_losses, piece)
                gradient_Q += torch.autograd.grad(losses_E.sum(), point_Q)[0]
        return gradient_Q / size

    def dev_score(self, owner: int) -> float:
        workers = self.setup.workers
        return workers.sum_host([self._score() if workers.rank == owner else 0.0])[0]

    def share(self, tensor: Tensor) -> None:
        self.setup.workers.broadcast_(tensor)

    # Steps of a single task and of all tasks together.

    def _step_alone(self, prepared: RoundPrepared, slot: Slot) -> StepGradients:
        if slot.leads:
            self._losses_W = self._lead(slot, prepared.own)
        assert self._losses_W is not None, "a group begins with a slot that leads"
        losses_S = self._losses_W.new_zeros(len(prepared.batch.segments))
        losses_S[-1] = self._losses_W[slot.owner]
        if slot.ends:
            for task, owner in self.plan.members(slot.group):
                self.method.task_trained(self, task, owner)
            self.vector.write(self.start_Q)
        if slot is self.plan.slots[-1]:
            self.place = 0
            if self.method.tasks_trained(self):
                self._end_round(prepared.step)
        return StepGradients(losses_S)

    def _lead(self, slot: Slot, own: Prepared | None) -> Tensor:
        """Make the steps of all workers of a group at the same time, and return their losses by rank, [W]."""
        workers = self.setup.workers
        dtype = torch.promote_types(self.vector.parameters[0].dtype, torch.float32)
        losses_W = torch.zeros(workers.size, dtype=dtype, device=self.setup.compute.device)
        with agreed(workers):
            if own is not None:
                mine = self.plan.own(slot, workers.rank)
                assert mine is not None
                if mine.number == 0:
                    weight = self.method.rate_scale(mine.task, self.objectives)
                    self._fresh_optimizer(self.task_steps[mine.task], weight)
                losses_W[workers.rank] = super().step(own).losses_S[-1]
        workers.sum_(losses_W)
        return losses_W

    def _prepare_try(self, step: int) -> RoundPrepared:
        setup, micro = self.setup, self.micro.texts
        batch = self.batch(self.round * self.try_steps + self.place)
        share = None if setup.workers.size == 1 else self.exchange.share(setup.domain, batch, whole=False)
        pieces, tokens = self._pieces(batch, micro, share), setup.domain.tokens(batch)
        return RoundPrepared(batch, pieces, None, micro, share=share, batch_tokens=tokens, step=step)

    def _step_together(self, prepared: RoundPrepared) -> StepGradients:
        if self.place == 1:
            self._fresh_optimizer(self.try_steps, 1.0)
        gradients = super().step(prepared)
        if self.place == self.try_steps:
            self.place = 0
            if self.method.try_trained(self, again=prepared.step + 1 + self.try_steps <= self._total):
                self._end_round(prepared.step)
        return gradients

    def _end_round(self, step: int) -> None:
        self.round, self.began, self.over = self.round + 1, step + 1, True
        self._start_Q = None

    def _fresh_optimizer(self, steps: int, weight: float) -> None:
        """Make an optimiser for a task or a try whose schedule runs through the round's part in `steps` steps.

        `weight` multiplies the learning rates, and divides the weight decay of SGD, which is multiplied by the rate.
        """
        optim = self.setup.config.optim
        self.optimizer = make_optimizer(self.setup.encoder, self.setup.heads, optim)
        for group in self.optimizer.param_groups:
            group["lr"] *= weight
            if optim.algorithm == "sgd":
                group["weight_decay"] /= weight
        began, span, rate = self.began, self.round_steps, self._rate
        self.schedule = LambdaLR(self.optimizer, lambda step: rate(began + step * span // steps))

    def _task_batch(self, slot: Slot, round_: int) -> DomainBatch:
        objectives = (self.objectives[slot.task - 1],) if slot.task else ()
        number = round_ * self.task_steps[slot.task] + slot.number
        return self.setup.domain.source.batch_of(number, slot.task == 0, objectives)

    def _steps_of_tasks(self, config: RoundsSection) -> list[int]:
        """Return the number of optimiser steps of each task in a round, which sees a fraction of its examples."""
        if config.round_steps is not None:
            return [config.round_steps] * (1 + len(self.objectives))
        setup, batch = self.setup, self.setup.config.batch
        sizes = [len(setup.task.train), *map(setup.domain.source.schedule.size, self.objectives)]
        at_once = [batch.end_task or 1, *(batch.auxiliary or 1 for _ in self.objectives)]
        return [math.ceil(config.round_fraction * size / of) for size, of in zip(sizes, at_once, strict=True)]

    def _score(self) -> float:
        setup = self.setup
        predictions = self._dev.predict(setup.encoder, setup.head_of[END_TASK_HEAD], setup.compute)
        return score_of(predictions.scores(setup.task.label_names), setup.task.metric)
