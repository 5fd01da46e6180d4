"""The loop: steps, evaluations on dev, early stopping, the kept checkpoint, test once. (semantics section 5)"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aang_ray.data.task import Metric
from aang_ray.objectives.source import END_TASK_HEAD
from aang_ray.store.rows import HistoryRow, Scores
from aang_ray.train.checkpoint import Keeper
from aang_ray.train.checkpoint_state import restore_stepper, stepper_state
from aang_ray.train.evaluate import Predictions, bootstrap_interval, score_of
from aang_ray.train.losses import LossLog
from aang_ray.train.prefetch import prefetched
from aang_ray.train.progress import Progress
from aang_ray.train.setup import Setup, majority_class
from aang_ray.train.step import Prepared, Stepper

OnEvaluation = Callable[[HistoryRow], None]


@dataclass(frozen=True)
class Finished:
    """A run at its end."""

    progress: Progress
    dev: Scores
    test: Scores
    test_clean: Scores
    clean_interval: tuple[float, float] | None
    """95 % bootstrap interval of the metric on `test_clean`."""
    seconds: float


class Trainer:
    """Trains one set-up to its end, from its checkpoint where `keeper` has one."""

    def __init__(self, setup: Setup, on_evaluation: OnEvaluation | None = None, keeper: Keeper | None = None) -> None:
        self.setup = setup
        self.stepper = Stepper(setup)
        self.progress = Progress()
        self._on_evaluation = on_evaluation
        self._keeper = keeper
        self._metric: Metric = setup.task.metric
        self._dev = setup.domain.reader("dev")
        self._losses = LossLog(1 if setup.compute.device.type == "cpu" else setup.config.schedule.eval_every)
        self._kept: dict[str, Tensor] = {}
        self._started = time.monotonic()

    def run(self) -> Finished:
        """Train, keep the best dev checkpoint, score test once from it.

        Raises:
            UserError: for a checkpoint that the run cannot go on from.
            RunFailure: for a loss that is not finite, or memory that runs out.
            Interrupted, KeyboardInterrupt: when asked to stop, with the checkpoint written.
        """
        if self._keeper is None or not self._keeper.resume(self._restore):
            self.stepper.estimate_memory(self.stepper.prepare(0))
        with nullcontext() if self._keeper is None else self._keeper.watching():
            self._train()
        return self._finish()

    @property
    def seconds(self) -> float:
        """Since the run began, less the time between an interruption and its resumption."""
        return time.monotonic() - self._started

    @property
    def examples(self) -> int:
        """End-task examples seen so far."""
        return self.progress.steps * (self.setup.config.batch.end_task or 0)

    @property
    def _total(self) -> int:
        return self.setup.config.schedule.steps or 0

    @property
    def _over(self) -> bool:
        progress = self.progress
        return progress.steps >= self._total or progress.since_best >= self.setup.config.schedule.patience

    def _train(self) -> None:
        """Step after step, from the one after the last that was done."""
        first = self.progress.steps
        depth = 0 if self.setup.domain.follows_factors else 2
        for prepared in prefetched(self.stepper.prepare, first, first if self._over else self._total, depth):
            gradients = self.stepper.step(prepared)
            self._losses.add(prepared.batch.step + 1, prepared.names, gradients.losses_S)
            self.progress.steps += 1
            self.progress.tokens += prepared.real_tokens
            if self.progress.steps % self.setup.config.schedule.eval_every == 0 or self.progress.steps == self._total:
                self._evaluate(prepared)
            if self._keeper is not None:
                self._keeper.after_step(self.progress.steps, self._state, self.progress.best_step, self._kept)
            if self._over:
                break

    def _state(self) -> dict[str, Any]:
        """All that a resumed run needs besides its best model, as plain values."""
        return {
            "stepper": stepper_state(self.stepper),
            "progress": self.progress.state_dict(),
            "losses": self._losses.state_dict(),
            "seconds": self.seconds,
        }

    def _restore(self, state: Mapping[str, Any], kept: dict[str, Tensor]) -> None:
        restore_stepper(self.stepper, state["stepper"])
        self.progress = Progress.from_state(state["progress"])
        self._losses.load_state_dict(state["losses"])
        self._started = time.monotonic() - state["seconds"]
        self._kept = kept

    def _evaluate(self, prepared: Prepared) -> None:
        """Score dev, keep the model if it is the best so far (first of ties), log losses and weights."""
        setup, progress = self.setup, self.progress
        losses = self._losses.means()
        predictions = self._dev.predict(setup.encoder, setup.head_of[END_TASK_HEAD], setup.compute)
        scores = predictions.scores(setup.task.label_names)
        score = score_of(scores, self._metric)
        if not self._at_majority(predictions, scores):
            progress.majority = False
        progress.since_best += 1
        if score > progress.best_score:
            progress.best_score, progress.best_step, progress.since_best = score, progress.steps, 0
            self._kept = {name: value.detach().to("cpu", copy=True) for name, value in self._model_state().items()}
        row = HistoryRow(
            step=progress.steps,
            dev=scores,
            losses=losses,
            seconds=self.seconds,
            examples=self.examples,
            tokens=progress.tokens,
        )
        progress.history.append(row)
        weights = setup.method.describe(prepared.sampled)
        if weights is not None:
            progress.weights.append(weights)
        if self._on_evaluation is not None:
            self._on_evaluation(row)

    def _at_majority(self, predictions: Predictions, scores: Scores) -> bool:
        """One class for all, or no better than the majority class of train."""
        task = self.setup.task
        share = float(np.mean(predictions.labels_E == majority_class(task)))
        # F1 of the class that is always predicted is 2p / (p + 1), of all others 0.
        baseline = share if self._metric == "accuracy" else 2 * share / (share + 1) / len(task.label_names)
        return len(np.unique(predictions.classes_E)) < 2 or score_of(scores, self._metric) <= baseline

    def _model_state(self) -> dict[str, Tensor]:
        setup = self.setup
        body = {f"encoder.{name}": value for name, value in setup.encoder.state_dict().items()}
        head = setup.head_of[END_TASK_HEAD].state_dict()
        return body | {f"head.{name}": value for name, value in head.items()}

    def _finish(self) -> Finished:
        setup = self.setup
        head = setup.head_of[END_TASK_HEAD]
        parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "head": {}}
        for name, value in self._kept.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        setup.encoder.load_state_dict(parts["encoder"])
        head.load_state_dict(parts["head"])
        test = setup.domain.reader("test").predict(setup.encoder, head, setup.compute)
        best = next(row for row in self.progress.history if row.step == self.progress.best_step)
        names = setup.task.label_names
        if setup.compute.device.type == "cuda":
            torch.cuda.synchronize(setup.compute.device)
        clean = test.take(setup.task.test_clean)
        return Finished(
            self.progress,
            dev=best.dev,
            test=test.scores(names),
            test_clean=clean.scores(names),
            clean_interval=bootstrap_interval(clean, self._metric, len(names)),
            seconds=self.seconds,
        )
