"""alphaVIL and DIW: methods that train every task alone, in rounds, and combine what came out. See docs/semantics.md, section 7.

Task 0 is the end task; the other tasks are the objectives that step 0 samples, for the whole run. A round trains every
task alone from the same parameters theta. Then

- alphaVIL adds the tasks' parameter updates, each times a factor that it finds by gradient descent on the dev loss
  (its paper, Algorithm 1);
- DIW scores every task's parameters on dev, then trains all tasks together, again and again with other weights,
  until the dev score improves (the baseline of that paper).

`train/rounds.py` carries out the training steps and calls a method's `task_trained`, `tasks_trained` and
`try_trained` at their ends.

Shape suffixes: N tasks, Q entries of all trained parameters of body and heads in one vector.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from aang_ray.config.methods import AlphavilConfig, DiwConfig
from aang_ray.config.run import RunConfig
from aang_ray.config.sections import MethodSection
from aang_ray.errors import UserError
from aang_ray.gradients.engine import Request
from aang_ray.methods.base import Method, Sampled, like_device
from aang_ray.objectives.space import Space
from aang_ray.store.schema import WeightRow

SMALLEST_WEIGHT = 1e-6
"""Lower bound of task weights: even a slightly negative one makes parameters overshoot (alphaVIL, footnote 1)."""


class Round(Protocol):
    """What a round offers its method. Every call is made by all workers of the run."""

    @property
    def objectives(self) -> tuple[int, ...]:
        """Indices of the objectives that are tasks."""

    @property
    def start_Q(self) -> Tensor:
        """Parameters with which the round began, [Q]; body and heads hold them when all tasks are trained."""

    def write(self, vector_Q: Tensor) -> None:
        """Give body and heads these parameters."""

    def allocate(self, rows: int) -> Tensor:
        """Return room for as many parameter vectors, [rows, Q]; raise `UserError` if it exceeds the free memory."""

    def task_update(self, owner: int, out_Q: Tensor) -> None:
        """Write into `out_Q`, on every worker, how far the worker `owner` has moved its parameters from `start_Q`."""

    def dev_gradient(self, point_Q: Tensor) -> Tensor:
        """Return the gradient of the mean dev loss at the parameters `point_Q`, [Q], dropout off."""

    def dev_score(self, owner: int) -> float:
        """Return the end task's dev score of the parameters that the worker `owner` holds."""

    def share(self, tensor: Tensor) -> None:
        """Give a tensor the first worker's values on every worker."""


class RoundMethod(Method):
    """Base of the methods that train in rounds: one weight w_i a task, 1 at the start, that moves once a round.

    A step trains one task alone, or (`together`) all of them by the loss 1/N sum_i w_i L_i: at w = 1 that is the
    paper's multitask baseline, which averages.
    """

    has_tries = False
    """Whether a round goes on after the tasks with steps that train all of them together."""

    def __init__(self, names: Sequence[str], device: torch.device, config: MethodSection) -> None:
        self._names, self._device = names, device
        self.end_task_weight = 1.0
        self._weights: dict[int, float] = {}
        """By objective; 1 if it never moved."""
        self._objectives: tuple[int, ...] = ()
        """The tasks of the last round."""
        self._health: dict[str, float] = {}
        """What is stored with the weights, by name."""
        self.together = False
        """Whether the next step trains all tasks together."""
        self.loss_scale = 1.0
        """Weight of the loss of a task that is trained alone."""

    @classmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        if space is None:
            raise UserError(f"method.name: {config.method.name} needs a space of auxiliary objectives")
        return cls(space.factors()["A"], device, config.method)

    @property
    @abstractmethod
    def trained(self) -> int:
        """How many tasks of the present round are trained."""

    def rate_scale(self, task: int, objectives: Sequence[int]) -> float:
        """Return the factor on a task's learning rates; called before the task is trained."""
        return 1.0

    @abstractmethod
    def task_trained(self, round_: Round, task: int, owner: int) -> None:
        """Take the outcome of a task's training from the worker `owner`, whose body and heads hold it."""

    @abstractmethod
    def tasks_trained(self, round_: Round) -> bool:
        """Continue when all tasks are trained; return whether the round is over."""

    def try_trained(self, round_: Round, again: bool) -> bool:
        """Judge a try, which body and heads hold; return whether the round is over.

        Args:
            round_: The round.
            again: Whether the run has enough steps left for another try.
        """
        raise NotImplementedError("this method trains no tries")

    def weights(self, objectives: Sequence[int]) -> list[float]:
        """Return w of the end task and of these objectives."""
        return [self.end_task_weight, *(self._weights.get(k, 1.0) for k in objectives)]

    def move(self, objectives: Sequence[int], by: Sequence[float]) -> None:
        """w_i <- max(w_i + by_i, 1e-6) for the end task and these objectives."""
        moved = [max(w + step, SMALLEST_WEIGHT) for w, step in zip(self.weights(objectives), by, strict=True)]
        self.end_task_weight = moved[0]
        self._weights.update(zip(objectives, moved[1:], strict=True))
        self._objectives = tuple(objectives)

    def request(self, sampled: Sampled) -> Request:
        coefficients = [0.0] * (1 + len(sampled.objectives)) + [self.loss_scale]
        if self.together:
            weights = self.weights(sampled.objectives)
            coefficients = [0.0, *(w / len(weights) for w in weights)]
        return Request(like_device(coefficients, torch.empty(0, device=self._device)))

    def describe(self, sampled: Sampled) -> WeightRow:
        """Return normalised weights for the store: of the end task among all, of the objectives among themselves."""
        objectives = self._objectives or sampled.objectives
        end_task, *others = self.weights(objectives)
        names, total = [self._names[k] for k in objectives], sum(others)
        raw = {f"w/{name}": w for name, w in zip(("end-task", *names), (end_task, *others), strict=True)}
        return WeightRow(
            step=sampled.step + 1,
            end_task_weight=end_task / (end_task + total),
            weights={name: w / total for name, w in zip(names, others, strict=True)},
            factors={},
            health={**raw, **self._health},
        )

    def state_dict(self) -> dict[str, Any]:
        weights = {"end_task": self.end_task_weight, "weights": dict(self._weights)}
        return {**weights, "objectives": list(self._objectives)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.end_task_weight = float(state["end_task"])
        self._weights = {int(k): float(w) for k, w in state["weights"].items()}
        self._objectives = tuple(state["objectives"])

    @abstractmethod
    def round_state(self) -> dict[str, Any]:
        """Return what is known of the present round: a run continues from there within a round."""

    @abstractmethod
    def restore_round(self, round_: Round, state: Mapping[str, Any]) -> None:
        """Restore what `round_state` returned."""

    def _task_names(self, objectives: Sequence[int]) -> list[str]:
        return ["end-task", *(self._names[k] for k in objectives)]


class Alphavil(RoundMethod):
    """theta <- theta + sum_i alpha_i delta_i, then w_i <- max(w_i + (alpha_i - 1), 1e-6).

    delta_i = theta_i - theta is the update of task i trained alone. Every worker keeps all of them and finds alpha for
    itself on all of dev, dropout off, heads and body alike: `alpha_steps` forward and backward passes over dev a
    round. The weight w_i scales the learning rate of task i (`published`: its loss).
    """

    def __init__(self, names: Sequence[str], device: torch.device, config: AlphavilConfig) -> None:
        super().__init__(names, device, config)
        self.config = config
        self._alpha: list[float] = []
        self.deltas_NQ: Tensor | None = None
        """Updates of the tasks: as many rows as tasks are trained count."""
        self._trained = 0

    @property
    def trained(self) -> int:
        return self._trained

    def rate_scale(self, task: int, objectives: Sequence[int]) -> float:
        weight = self.weights(objectives)[task]
        published = self.config.task_weight == "published"
        self.loss_scale = weight if published else 1.0
        return 1.0 if published else weight

    def task_trained(self, round_: Round, task: int, owner: int) -> None:
        round_.task_update(owner, self._rows(round_)[task])
        self._trained = task + 1

    def tasks_trained(self, round_: Round) -> bool:
        deltas_NQ = self._rows(round_)
        alpha_N = self.mix(round_.start_Q, deltas_NQ, round_.dev_gradient)
        # Where kernels are not deterministic, workers that computed the same would drift apart.
        round_.share(alpha_N)
        round_.write(torch.addmv(round_.start_Q, deltas_NQ.t(), alpha_N))
        self.learn(round_.objectives, alpha_N.tolist())
        self._trained = 0
        return True

    def mix(self, theta_Q: Tensor, deltas_NQ: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """Return alpha, [N], after some steps of SGD from 1 on L(theta + sum_i alpha_i delta_i).

        `gradient` gives the gradient of L at parameters [Q], and dL / d alpha_i is its inner product with delta_i.
        (alphaVIL, Algorithm 1, lines 8 and 9)
        """
        alpha_N = torch.ones(len(deltas_NQ), dtype=deltas_NQ.dtype, device=deltas_NQ.device)
        optimizer = torch.optim.SGD([alpha_N], lr=self.config.alpha_lr, momentum=self.config.alpha_momentum)
        for _ in range(self.config.alpha_steps):
            alpha_N.grad = deltas_NQ @ gradient(torch.addmv(theta_Q, deltas_NQ.t(), alpha_N))
            optimizer.step()
        return alpha_N.detach()

    def learn(self, objectives: Sequence[int], alpha: Sequence[float]) -> None:
        """Move the weights by what the mixing found."""
        self.move(objectives, [value - 1 for value in alpha])
        self._set_alpha(alpha)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "alpha": list(self._alpha)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._set_alpha(state["alpha"])

    def round_state(self) -> dict[str, Any]:
        deltas_NQ = None if self.deltas_NQ is None else self.deltas_NQ[: self._trained].cpu()
        return {"deltas": deltas_NQ, "taken": self._trained}

    def restore_round(self, round_: Round, state: Mapping[str, Any]) -> None:
        self._trained = int(state["taken"])
        if self._trained:
            self._rows(round_)[: self._trained] = state["deltas"].to(self._device)

    def _set_alpha(self, alpha: Sequence[float]) -> None:
        self._alpha = list(alpha)
        names = self._task_names(self._objectives)
        self._health = {f"alpha/{name}": value for name, value in zip(names, self._alpha, strict=False)}

    def _rows(self, round_: Round) -> Tensor:
        """One row a task, [N, Q]."""
        if self.deltas_NQ is None:
            self.deltas_NQ = round_.allocate(1 + len(round_.objectives))
        return self.deltas_NQ


class Diw(RoundMethod):
    """w_i <- max(w_i + rate (score of task i alone - score of all together), 1e-6), scores on dev.

    A round trains every task alone, with weight 1, then a try: all of them together from the same parameters, with
    the weights w. The try is made again with the moved weights until its score exceeds the last round's, or `tries`
    are made; then the last try stands. A try takes as many steps as the end task does alone, on the same batches at
    every try, and on several workers all of them train it. A round is begun if the run has the steps for one try, and
    a try is made again if the run has the steps for it.
    """

    has_tries = True

    def __init__(self, names: Sequence[str], device: torch.device, config: DiwConfig) -> None:
        super().__init__(names, device, config)
        self.config = config
        self.tries = 0
        """Made in this round."""
        self.last_score = -1.0
        """Score of the last round; before the first one it is less than any score."""
        self._alone: list[float] = []
        """Scores of the tasks that are trained, in the present round."""

    @property
    def trained(self) -> int:
        return len(self._alone)

    def task_trained(self, round_: Round, task: int, owner: int) -> None:
        self._alone.append(round_.dev_score(owner))

    def tasks_trained(self, round_: Round) -> bool:
        self.together = True
        return False

    def try_trained(self, round_: Round, again: bool) -> bool:
        score = round_.dev_score(0)
        if not self.judge(round_.objectives, self._alone, score) and again:
            round_.write(round_.start_Q)
            return False
        self.end_round(score)
        self.together, self._alone = False, []
        return True

    def judge(self, objectives: Sequence[int], alone: Sequence[float], together: float) -> bool:
        """Move the weights after a try; return whether the round is over.

        Args:
            objectives: The objectives of the run.
            alone: Dev score of every task trained alone, the end task first.
            together: Dev score of the try.
        """
        self.move(objectives, [self.config.weight_lr * (score - together) for score in alone])
        self.tries += 1
        names = self._task_names(objectives)
        self._health = {f"alone/{name}": score for name, score in zip(names, alone, strict=True)}
        self._health |= {"together": together, "tries": float(self.tries)}
        return together > self.last_score or self.tries >= self.config.tries

    def end_round(self, together: float) -> None:
        """Keep the score that the next round is compared with."""
        self.last_score, self.tries = together, 0

    def state_dict(self) -> dict[str, Any]:
        own = {"tries": self.tries, "last_score": self.last_score, "health": dict(self._health)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.tries, self.last_score = int(state["tries"]), float(state["last_score"])
        self._health = dict(state["health"])

    def round_state(self) -> dict[str, Any]:
        return {"alone": list(self._alone), "together": self.together}

    def restore_round(self, round_: Round, state: Mapping[str, Any]) -> None:
        self._alone, self.together = list(state["alone"]), bool(state["together"])
