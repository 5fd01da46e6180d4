"""alphaVIL's rounds: the tasks' updates, their mixing on dev, the next parameters. (semantics section 7)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aang_ray.config.methods import AlphavilConfig
from aang_ray.gradients.functional import called_at
from aang_ray.gradients.memory import check_memory
from aang_ray.methods.alphavil import Alphavil
from aang_ray.train.parallel.agreement import Agreement
from aang_ray.train.primary import ExampleLosses
from aang_ray.train.rounds.stepper import RoundStepper
from aang_ray.train.setup import Setup


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
