"""Methods that train task by task, in rounds, behind the same steps as all others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aang_ray.config.methods import AlphavilConfig, DiwConfig
from aang_ray.gradients.engine import StepGradients, check_memory
from aang_ray.gradients.statistics import called_at
from aang_ray.methods.rounds import Alphavil, Diw
from aang_ray.objectives.source import END_TASK_HEAD
from aang_ray.train.evaluate import score_of
from aang_ray.train.primary import ExampleLosses
from aang_ray.train.rounds import RoundPrepared, RoundStepper
from aang_ray.train.setup import Setup
from aang_ray.train.step import Prepared, Stepper
from aang_ray.train.workers.group import Agreement

# --- train.rounds.alphavil: alphaVIL's rounds: the tasks' updates, their mixing on dev, the next parameters. (semantics section 7)


class AlphavilStepper(RoundStepper):
    """delta_i = theta_i - theta of every task i, one vector each on every worker; then theta + sum_i alpha_i delta_i.

    alpha is found on all of dev, dropout off, heads and body alike, by every worker for itself: 10 forward and
    backward passes over dev a round. The weight w_i scales the learning rate of task i (`published`: its loss).
    """

    def __init__(self, setup: Setup, method: Alphavil, config: AlphavilConfig) -> None:
        super().__init__(setup, config)
        self._method, self._published = method, config.task_weight == "published"
        self._dev_losses = ExampleLosses(setup)
        self._deltas_NQ: Tensor | None = None
        self._taken = 0

    @property
    def prepares_ahead(self) -> bool:
        return True

    def round_state(self) -> dict[str, Any]:
        deltas = None if self._deltas_NQ is None else self._deltas_NQ[: self._taken].cpu()
        return {**super().round_state(), "deltas": deltas, "taken": self._taken}

    def restore_round(self, state: Mapping[str, Any]) -> None:
        self._taken = int(state["taken"])
        if self._taken:
            self._rows()[: self._taken] = state["deltas"].to(self.setup.compute.device)
        super().restore_round(state)

    @property
    def _known(self) -> int:
        return self._taken

    def _position(self, step: int) -> tuple[int, int]:
        return divmod(step, self.round_steps)

    def _task_weight(self, task: int) -> float:
        weight = self._method.weights(self.tasks.objectives)[task]
        self._method.loss_scale = weight if self._published else 1.0
        return 1.0 if self._published else weight

    def _take(self, task: int, owner: int) -> None:
        assert self._start_Q is not None
        workers = self.setup.workers
        with Agreement(workers):  # on whether there is memory for them
            delta_Q = self._rows()[task]
        if workers.rank == owner:
            torch.sub(self.vector.read(), self._start_Q, out=delta_Q)
        workers.broadcast_(delta_Q, owner)
        self._taken = task + 1

    def _tasks_trained(self, step: int) -> None:
        assert self._start_Q is not None
        deltas_NQ = self._rows()
        alpha_N = self._method.mix(self._start_Q, deltas_NQ, self._dev_gradient)
        # Where kernels are not deterministic, workers that computed the same would drift apart.
        self.setup.workers.broadcast_(alpha_N)
        self.vector.write(torch.addmv(self._start_Q, deltas_NQ.t(), alpha_N))
        self._method.learn(self.tasks.objectives, alpha_N.tolist())
        self._taken = 0
        self._end_round(step)

    def _rows(self) -> Tensor:
        """One row a task, [N, Q]."""
        if self._deltas_NQ is None:
            tasks = len(self.tasks)
            # Also the round's first parameters, the mixed ones, and their gradient.
            check_memory(self.vector.parameters, tasks + 3)
            self._deltas_NQ = self.vector.read().repeat(tasks, 1)
        return self._deltas_NQ

    def _dev_gradient(self, point_Q: Tensor) -> Tensor:
        """The gradient, [Q], of the mean dev loss at other parameters than those at hand."""
        point_Q = point_Q.detach().requires_grad_()
        gradient_Q = torch.zeros_like(point_Q)
        size = len(self.setup.task.dev)
        with self._dev_losses.evaluating():
            for piece in self.setup.domain.end_task_pieces("dev", np.arange(size), self.micro.texts):
                losses_E = called_at(self.vector.split(point_Q), self.vector.modules, self._dev_losses, piece)
                gradient_Q += torch.autograd.grad(losses_E.sum(), point_Q)[0]
        return gradient_Q / size


# --- train.rounds.diw: DIW's rounds: every task alone and its score on dev, then all together until dev improves. (semantics section 7)


class DiwStepper(RoundStepper):
    """A round: every task alone, unweighted; then, from the same parameters, tries of all together.

    A try takes as many steps as the end task does alone, on the same batches at every try: `batch.end_task` examples
    of the end task, and `batch.auxiliary` shared by the objectives. A round is begun where the run has the steps for
    one try, and tried again where it has them for another. On several workers a try is trained by all, as in other
    methods.
    """

    def __init__(self, setup: Setup, method: Diw, config: DiwConfig) -> None:
        super().__init__(setup, config)
        self._method = method
        self._dev = setup.domain.reader("dev")
        self._alone: list[float] = []

    @property
    def prepares_ahead(self) -> bool:
        return False

    def prepare(self, step: int) -> RoundPrepared:
        if not self._method.together:
            return super().prepare(step)
        setup = self.setup
        batch = self.tasks.all_of(self.round * self.beyond[0] + self.place)
        share = None if setup.workers.size == 1 else self.exchange.share(setup.domain, batch, whole=False)
        micro = self.micro.texts
        pieces = self._pieces(batch, micro, share)
        return RoundPrepared(batch, pieces, None, micro, share=share, batch_tokens=self.tasks.tokens(batch), step=step)

    def step(self, prepared: Prepared) -> StepGradients:
        assert isinstance(prepared, RoundPrepared)
        if prepared.slot is not None:
            return super().step(prepared)
        self._count()
        if self.place == 1:
            self._fresh_optimizer(self.beyond[0], 1.0)
        gradients = Stepper.step(self, prepared)
        if self.place == self.beyond[0]:
            self._judge(prepared.step)
        return gradients

    def round_state(self) -> dict[str, Any]:
        return {**super().round_state(), "alone": list(self._alone), "together": self._method.together}

    def restore_round(self, state: Mapping[str, Any]) -> None:
        self._alone, self._method.together = list(state["alone"]), bool(state["together"])
        super().restore_round(state)

    @property
    def _known(self) -> int:
        return len(self._alone)

    def _beyond(self, wanted: list[int]) -> tuple[int, ...]:
        return (wanted[0],)

    def _task_weight(self, task: int) -> float:
        return 1.0

    def _take(self, task: int, owner: int) -> None:
        self._alone.append(self._score_by(owner))

    def _tasks_trained(self, step: int) -> None:
        self._method.together = True
        self.place = 0

    def _judge(self, step: int) -> None:
        """Score the try: the round is over, or is tried again with other weights."""
        assert self._start_Q is not None
        score = self._score_by(0)
        over = self._method.judge(self.tasks.objectives, self._alone, score)
        if not over and step + 1 + self.beyond[0] <= self._total:
            self.vector.write(self._start_Q)
            self.place = 0
            return
        self._method.end_round(score)
        self._method.together, self._alone = False, []
        self._end_round(step)

    def _score_by(self, owner: int) -> float:
        """One worker's score for all: on it depends how the round goes on."""
        workers = self.setup.workers
        return workers.sum_host([self._score() if workers.rank == owner else 0.0])[0]

    def _score(self) -> float:
        setup = self.setup
        predictions = self._dev.predict(setup.encoder, setup.head_of[END_TASK_HEAD], setup.compute)
        return score_of(predictions.scores(setup.task.label_names), setup.task.metric)


def make_stepper(setup: Setup) -> Stepper:
    """Whatever makes the steps of a set-up's method."""
    config, method = setup.config.method, setup.method
    if isinstance(config, AlphavilConfig) and isinstance(method, Alphavil):
        return AlphavilStepper(setup, method, config)
    if isinstance(config, DiwConfig) and isinstance(method, Diw):
        return DiwStepper(setup, method, config)
    return Stepper(setup)
