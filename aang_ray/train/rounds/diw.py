"""DIW's rounds: every task alone and its score on dev, then all together until dev improves. (semantics section 7)"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aang_ray.config.methods import DiwConfig
from aang_ray.gradients.engine import StepGradients
from aang_ray.methods.diw import Diw
from aang_ray.objectives.source import END_TASK_HEAD
from aang_ray.train.evaluate import score_of
from aang_ray.train.rounds.stepper import RoundStepper
from aang_ray.train.rounds.tasks import RoundPrepared
from aang_ray.train.setup import Setup
from aang_ray.train.step import Prepared, Stepper


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
