"""alphaVIL and DIW: in each round, train every task alone and combine the results (docs/semantics.md, section 7).

Task 0 is the end task. The other tasks are the objectives sampled for step 0, and stay the same in the whole run.
`train/rounds.py` carries out the training steps and calls a method's `task_trained`, `tasks_trained` and `try_trained`
at their ends.

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
    """The interface of a round for its method. All workers of the run must make the same calls."""

    @property
    def objectives(self) -> tuple[int, ...]:
        """Indices of the objectives that are tasks."""

    @property
    def start_Q(self) -> Tensor:
        """Parameters with which the round began, [Q]; body and heads hold them when all tasks are trained."""

    def write(self, vector_Q: Tensor) -> None:
        """Copy these parameters, [Q], into body and heads."""

    def allocate(self, rows: int) -> Tensor:
        """Return a tensor for `rows` parameter vectors, [rows, Q]; `UserError` if it does not fit into memory."""

    def task_update(self, owner: int, out_Q: Tensor) -> None:
        """Write the difference of worker `owner`'s parameters from `start_Q` into `out_Q`, [Q], on every worker."""

    def dev_gradient(self, point_Q: Tensor) -> Tensor:
        """Return the gradient of the mean dev loss at the parameters `point_Q`, [Q], with dropout off."""

    def dev_score(self, owner: int) -> float:
        """Return the end task's dev score with worker `owner`'s parameters."""

    def share(self, tensor: Tensor) -> None:
        """Replace a tensor's values by those of the first worker, on every worker."""


class RoundMethod(Method):
    """Base class of methods that train in rounds. Each task has a weight w_i, which is 1 at the start.

    A step trains one task alone, or (`together`) all tasks with the loss 1/N sum_i w_i L_i.
    """

    has_tries = False
    """Whether a round continues, after the single tasks, with steps that train all tasks together."""

    def __init__(self, names: Sequence[str], device: torch.device, config: MethodSection) -> None:
        self._names, self._device = names, device
        self.end_task_weight = 1.0
        self._weights: dict[int, float] = {}
        """Weight of each objective by index; objectives that are missing have weight 1."""
        self._objectives: tuple[int, ...] = ()
        """The tasks of the last round."""
        self._health: dict[str, float] = {}
        """Further values that are stored with the weights, by name."""
        self.together = False
        """Whether the next step trains all tasks together."""
        self.loss_scale = 1.0
        """Weight of the loss of a task that is trained alone."""
        self.trained = 0
        """Number of tasks whose training in the current round is finished."""

    @classmethod
    def build(cls, config: RunConfig, space: Space | None, device: torch.device) -> Self:
        if space is None:
            raise UserError(f"method.name: {config.method.name} needs a space of auxiliary objectives")
        return cls(space.factors()["A"], device, config.method)

    def rate_scale(self, task: int, objectives: Sequence[int]) -> float:
        """Return the factor on a task's learning rates; called before the task is trained."""
        return 1.0

    @abstractmethod
    def task_trained(self, round_: Round, task: int, owner: int) -> None:
        """Use the result of a task's training, which is in the body and heads of worker `owner`."""

    @abstractmethod
    def tasks_trained(self, round_: Round) -> bool:
        """Use the results after all tasks are trained; return whether the round is finished."""

    def try_trained(self, round_: Round, again: bool) -> bool:
        """Evaluate a try, in body and heads; return whether the round is finished. `again`: another fits."""
        raise NotImplementedError("this method trains no tries")

    def weights(self, objectives: Sequence[int]) -> list[float]:
        """Return w of the end task and of these objectives."""
        return [self.end_task_weight, *(self._weights.get(k, 1.0) for k in objectives)]

    def move(self, objectives: Sequence[int], by: Sequence[float]) -> None:
        """Set w_i <- max(w_i + by_i, 1e-6) for the end task and these objectives."""
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
        """Return weights for the store: the end task's fraction of all weights, the objectives' fractions of theirs."""
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
        """Return the method's state within the current round, for a resumed run."""

    @abstractmethod
    def restore_round(self, round_: Round, state: Mapping[str, Any]) -> None:
        """Restore what `round_state` returned."""

    def _task_names(self, objectives: Sequence[int]) -> list[str]:
        return ["end-task", *(self._names[k] for k in objectives)]


class Alphavil(RoundMethod):
    """theta <- theta + sum_i alpha_i delta_i, then w_i <- max(w_i + (alpha_i - 1), 1e-6). (alphaVIL, Algorithm 1)

    delta_i = theta_i - theta is the update of body and heads when task i is trained alone. Every worker stores all of
    them and computes alpha on all of dev with dropout off. The weight w_i scales the learning rate of task i
    (`published`: its loss).
    """

    def __init__(self, names: Sequence[str], device: torch.device, config: AlphavilConfig) -> None:
        super().__init__(names, device, config)
        self.config = config
        self._alpha: list[float] = []
        self.deltas_NQ: Tensor | None = None
        """Updates of the tasks, [N, Q]; only the first `trained` rows are valid."""

    def rate_scale(self, task: int, objectives: Sequence[int]) -> float:
        weight = self.weights(objectives)[task]
        published = self.config.task_weight == "published"
        self.loss_scale = weight if published else 1.0
        return 1.0 if published else weight

    def task_trained(self, round_: Round, task: int, owner: int) -> None:
        round_.task_update(owner, self._rows(round_)[task])
        self.trained = task + 1

    def tasks_trained(self, round_: Round) -> bool:
        deltas_NQ = self._rows(round_)
        alpha_N = self.mix(round_.start_Q, deltas_NQ, round_.dev_gradient)
        # With non-deterministic kernels, the workers' results would differ slightly.
        round_.share(alpha_N)
        round_.write(torch.addmv(round_.start_Q, deltas_NQ.t(), alpha_N))
        self.learn(round_.objectives, alpha_N.tolist())
        self.trained = 0
        return True

    def mix(self, theta_Q: Tensor, deltas_NQ: Tensor, gradient: Callable[[Tensor], Tensor]) -> Tensor:
        """Return alpha, [N], after `alpha_steps` steps of SGD on L(theta + sum_i alpha_i delta_i), starting from 1.

        dL / d alpha_i is the inner product of delta_i with the gradient of L, which `gradient` returns at given
        parameters (Algorithm 1, lines 8 and 9).
        """
        alpha_N = torch.ones(len(deltas_NQ), dtype=deltas_NQ.dtype, device=deltas_NQ.device)
        optimizer = torch.optim.SGD([alpha_N], lr=self.config.alpha_lr, momentum=self.config.alpha_momentum)
        for _ in range(self.config.alpha_steps):
            alpha_N.grad = deltas_NQ @ gradient(torch.addmv(theta_Q, deltas_NQ.t(), alpha_N))
            optimizer.step()
        return alpha_N.detach()

    def learn(self, objectives: Sequence[int], alpha: Sequence[float]) -> None:
        """Add alpha_i - 1 to the weights, and keep alpha for the store."""
        self.move(objectives, [value - 1 for value in alpha])
        self._set_alpha(alpha)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "alpha": list(self._alpha)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._set_alpha(state["alpha"])

    def round_state(self) -> dict[str, Any]:
        deltas_NQ = None if self.deltas_NQ is None else self.deltas_NQ[: self.trained].cpu()
        return {"deltas": deltas_NQ, "taken": self.trained}

    def restore_round(self, round_: Round, state: Mapping[str, Any]) -> None:
        self.trained = int(state["taken"])
        if self.trained:
            self._rows(round_)[: self.trained] = state["deltas"].to(self._device)

    def _set_alpha(self, alpha: Sequence[float]) -> None:
        self._alpha = list(alpha)
        names = self._task_names(self._objectives)
        self._health = {f"alpha/{name}": value for name, value in zip(names, self._alpha, strict=False)}

    def _rows(self, round_: Round) -> Tensor:
        """Return the tensor of updates with one row per task, [N, Q]."""
        if self.deltas_NQ is None:
            self.deltas_NQ = round_.allocate(1 + len(round_.objectives))
        return self.deltas_NQ


class Diw(RoundMethod):
    """w_i <- max(w_i + rate (score of task i alone - score of all together), 1e-6), with scores on dev.

    A round trains every task alone with weight 1. Then it trains all tasks together, from the same parameters, with the
    weights w. This try is repeated with the new weights until its score exceeds that of the last round, or `tries`
    times. A try has as many steps as the end task alone, and the same batches every time.
    """

    has_tries = True

    def __init__(self, names: Sequence[str], device: torch.device, config: DiwConfig) -> None:
        super().__init__(names, device, config)
        self.config = config
        self.tries = 0
        """Number of tries in this round."""
        self.last_score = -1.0
        """Score of the last round; before the first round it is lower than any score."""
        self._alone: list[float] = []
        """Dev scores of the tasks that are already trained in the current round."""

    def task_trained(self, round_: Round, task: int, owner: int) -> None:
        self._alone.append(round_.dev_score(owner))
        self.trained = len(self._alone)

    def tasks_trained(self, round_: Round) -> bool:
        self.together = True
        return False

    def try_trained(self, round_: Round, again: bool) -> bool:
        score = round_.dev_score(0)
        if not self.judge(round_.objectives, self._alone, score) and again:
            round_.write(round_.start_Q)
            return False
        self.end_round(score)
        self.together, self._alone, self.trained = False, [], 0
        return True

    def judge(self, objectives: Sequence[int], alone: Sequence[float], together: float) -> bool:
        """Update the weights after a try from the dev scores of the tasks alone, the end task first, and of the try.

        Return whether the round is finished.
        """
        self.move(objectives, [self.config.weight_lr * (score - together) for score in alone])
        self.tries += 1
        names = self._task_names(objectives)
        self._health = {f"alone/{name}": score for name, score in zip(names, alone, strict=True)}
        self._health |= {"together": together, "tries": float(self.tries)}
        return together > self.last_score or self.tries >= self.config.tries

    def end_round(self, together: float) -> None:
        """Keep the score for comparison with the next round, and reset the number of tries."""
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
        self.trained = len(self._alone)
