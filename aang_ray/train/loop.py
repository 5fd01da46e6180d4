"""The training loop: steps, dev scores, early stopping, one test score (docs/semantics.md, section 5)."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from aang_ray.config.methods import HalvingConfig
from aang_ray.data.tasks import Metric
from aang_ray.errors import RunFailure
from aang_ray.objectives.source import END_TASK, END_TASK_HEAD
from aang_ray.store.schema import HistoryRow, Scores, WeightRow, prediction_table
from aang_ray.train.checkpoint import Checkpointer
from aang_ray.train.distances import local_distances
from aang_ray.train.evaluate import Predictions, Reader, bootstrap_interval, score_of
from aang_ray.train.halving import Search, example_losses
from aang_ray.train.optim import load_trained_state, trained_state, warmup_steps
from aang_ray.train.record import BEAT_SECONDS, Heartbeat, Progress, SplitScores
from aang_ray.train.rounds import make_stepper
from aang_ray.train.setup import Setup, majority_class, setup_of_stage, stages_of
from aang_ray.train.step import Prepared
from aang_ray.train.workers.group import gathered

T = TypeVar("T")


@dataclass(frozen=True)
class Finished:
    """The result of a finished run."""

    progress: Progress
    scores: SplitScores
    """Scores of the model with the best dev score."""
    clean_interval: tuple[float, float] | None
    """95 % bootstrap interval of the metric on the de-duplicated test view."""
    predictions: pa.Table
    """What that model predicts on dev and test, as rows of the store."""


class Trainer:
    """Trains a run through all its stages, starting from its checkpoint if there is one.

    Args:
        setup: The parts of the run; training changes them in place.
        on_evaluation: Called after each evaluation, in every worker; `weights` are then those of the evaluation.
        on_beat: Called after a step, every `BEAT_SECONDS`, in every worker.
        checkpointer: Reads and writes the checkpoint; None for a run without checkpoints.
    """

    def __init__(
        self,
        setup: Setup,
        on_evaluation: Callable[[HistoryRow], None] | None = None,
        checkpointer: Checkpointer | None = None,
        on_beat: Callable[[Heartbeat], None] | None = None,
    ) -> None:
        self.config = setup.config
        self.progress = Progress()
        self.weights: WeightRow | None = None
        """Those of the last evaluation; None: the method has none."""
        self._whole = setup
        self._search: Search | None = None
        self._first_model: dict[str, Tensor] = {}
        """Body and heads before the first step, in host memory, if there is a search, whose trials start from them."""
        if isinstance(setup.config.method, HalvingConfig):
            assert setup.space is not None
            self._search = Search(setup.space.factors()["A"], setup.config.method)
            self._first_model = in_host_memory(self._whole_model())
        self._enter_stage()
        self._on_evaluation, self._on_beat = on_evaluation, on_beat
        self._beat_at = time.monotonic()
        self._checkpointer = checkpointer
        self._metric: Metric = setup.task.metric
        self._dev = setup.domain.reader("dev", setup.workers.rank, setup.workers.size)
        self._losses = LossLog(1 if setup.compute.device.type == "cpu" else setup.config.schedule.eval_every)
        self._best_model: dict[str, Tensor] = {}
        """Parameters of body and end-task head with the best dev score so far, in host memory."""
        self._best_dev: Predictions | None = None
        """What that model predicts on dev; None after a resume."""
        self._started = time.monotonic()

    def run(self) -> Finished:
        """Train, and score test once with the model that has the best dev score.

        Raises:
            UserError: For a checkpoint that the run cannot continue from.
            RunFailure: For a loss that is not finite, or when memory runs out.
            Interrupted, KeyboardInterrupt: When asked to stop; the checkpoint is written.
            StepLimitReached: At the step limit; the checkpoint is written.
        """
        if self._checkpointer is None or not self._checkpointer.resume(self._restore):
            self.stepper.estimate_memory(self.stepper.prepare(0))
        else:
            self._checkpointer.after_resume(self.progress.steps)
        self.stepper.check_same(self.progress.steps)
        with nullcontext() if self._checkpointer is None else self._checkpointer.delaying_signals():
            self._train_stage()
            while self.progress.stage + 1 < len(self._stages):
                self._next_stage()
                self._train_stage()
        scores, test = self._score_best_model()
        clean = test.take(self.setup.task.test_clean)
        if self.setup.compute.device.type == "cuda":
            torch.cuda.synchronize(self.setup.compute.device)
        interval = bootstrap_interval(clean, self._metric, self.setup.classes)
        return Finished(self.progress, scores, interval, self._prediction_rows(test))

    @property
    def seconds(self) -> float:
        """Duration of the run, without the time between an interruption and the resumption."""
        return time.monotonic() - self._started

    @property
    def _stage_is_over(self) -> bool:
        progress = self.progress
        return (
            self.stepper.ends_after(progress.stage_steps) or progress.since_best >= self.setup.config.schedule.patience
        )

    def _enter_stage(self) -> None:
        """Make the batches, method, optimiser and schedule of the current stage."""
        self._stages = stages_of(self.config, self._search)
        self.stage = self._stages[self.progress.stage]
        self.setup = setup_of_stage(self._whole, self.stage.config)
        self.stepper = make_stepper(self.setup)
        schedule, optim = self.stage.config.schedule, self.stage.config.optim
        converges = schedule.until == "converged"
        self._settling_steps = max(warmup_steps(schedule), optim.head_warmup_steps) if converges else 0
        """Steps of the stage in which evaluations do not count as evaluations without improvement."""

    def _next_stage(self) -> None:
        """Start the next stage from the best model on dev, or from the last model if the stage did not score dev."""
        keeps_start = False
        if self._search is not None and not self._search.over:
            self._end_trial(self._search)
            if not self._search.over:
                self.progress.stage_steps = 0
                self._enter_stage()
                return
        if self.stage.decides:
            self.progress.before, _ = self._score_best_model()
            final = self.config.final_finetune
            keeps_start = final is not None and final.keep_start
            if not keeps_start:
                self._best_model, self._best_dev = {}, None
        self.progress.next_stage(keeps_start)
        self._enter_stage()
        self.stepper.estimate_memory(self.stepper.prepare(0))

    def _end_trial(self, search: Search) -> None:
        """Judge the trial that has ended, and return to the run's first parameters."""
        losses_E = example_losses(self._predict(self._dev), self.setup.class_weights())
        row = search.judge(losses_E, self.progress.steps)
        if row is not None:
            self.progress.weights.append(row)
        self.progress.search = search.state_dict()
        load_trained_state(self._whole_model(), self._first_model)

    def _train_stage(self) -> None:
        first = self.progress.stage_steps
        last = first if self._stage_is_over else self.setup.config.schedule.steps or 0
        depth = 2 if self.stepper.prepares_ahead else 0
        for prepared in prefetched(self.stepper.prepare, first, last, depth):
            gradients = self.stepper.step(prepared)
            progress = self.progress
            progress.steps += 1
            progress.stage_steps += 1
            progress.examples += prepared.batch.segments[END_TASK].examples
            progress.tokens += prepared.real_tokens
            self._losses.add(progress.steps, prepared.names, gradients.losses_S)
            if self.stepper.evaluates_after(progress.stage_steps):
                self._evaluate(prepared)
            if self._on_beat is not None and time.monotonic() - self._beat_at >= BEAT_SECONDS:
                self._beat_at = time.monotonic()
                self._on_beat(Heartbeat(progress.steps, self.seconds, self._losses.latest))
            if self._checkpointer is not None:
                self._checkpointer.after_step(progress.steps, self._state, progress.best_step, self._best_model)
            if self._stage_is_over:
                break

    def save(self) -> None:
        """Write the checkpoint of a finished run, so that its export can be tried again without training.

        With several workers nothing is written: a sharded state takes all of them, and they have ended.
        """
        if self._checkpointer is not None and self.setup.workers.size == 1:
            self._checkpointer.save(self.progress.steps, self._state(), self.progress.best_step, self._best_model)

    def _state(self) -> dict[str, Any]:
        """Return the state for a resumed run, without the best model. The keys are part of the checkpoint format."""
        return {
            "stepper": self.stepper.state_dict(),
            "progress": self.progress.state_dict(),
            "losses": self._losses.state_dict(),
            "seconds": self.seconds,
        }

    def _restore(self, state: Mapping[str, Any], best_model: dict[str, Tensor]) -> None:
        self.progress = Progress.from_state(state["progress"])
        if self._search is not None and self.progress.search is not None:
            self._search.load_state_dict(self.progress.search)
        if self.progress.stage > 0 or self._search is not None:
            self._enter_stage()
        self.stepper.load_state_dict(state["stepper"])
        self._losses.load_state_dict(state["losses"])
        self._started = time.monotonic() - state["seconds"]
        self._best_model = best_model

    def _evaluate(self, prepared: Prepared) -> None:
        """Score dev if the stage uses it, and log losses and weights."""
        setup, progress = self.setup, self.progress
        self.stepper.check_same(progress.steps)
        row = HistoryRow(
            step=progress.steps,
            dev=self._score_dev() if self.stage.decides else None,
            losses=self._losses.means(),
            seconds=self.seconds,
            examples=progress.examples,
            tokens=progress.tokens,
            stage=self.stage.name,
        )
        progress.history.append(row)
        # In a trial the only objective has all of the weight, which says nothing.
        weights = None if self.stage.name == "search" else setup.method.describe(prepared.sampled)
        if weights is not None:
            weights = replace(weights, step=progress.steps)  # the method counts the steps of its stage
        self.weights = weights
        if weights is not None:
            if setup.config.gradients.local_distances:
                distances = local_distances(self.stepper, progress.stage_steps)
                weights = self.weights = replace(weights, health={**weights.health, **distances})
            progress.weights.append(weights)
        if self._on_evaluation is not None:
            self._on_evaluation(row)

    def _score_dev(self) -> Scores:
        """Score dev, and copy the model if its score is higher than all before."""
        setup, progress = self.setup, self.progress
        predictions = self._predict(self._dev)
        scores = predictions.scores(setup.task.label_names)
        score = score_of(scores, self._metric)
        if not self._at_majority(predictions, scores):
            progress.majority = False
        if progress.stage_steps > self._settling_steps:
            progress.since_best += 1
        if score > progress.best_score:
            progress.best_score, progress.best_step, progress.since_best = score, progress.steps, 0
            self._best_model = in_host_memory(self._scored_model())
            self._best_dev = predictions
        return scores

    def _scored_model(self) -> nn.Module:
        return nn.ModuleDict({"encoder": self.setup.encoder, "head": self.setup.head_of[END_TASK_HEAD]})

    def _whole_model(self) -> nn.Module:
        return nn.ModuleDict({"encoder": self._whole.encoder, "heads": self._whole.heads})

    def _predict(self, reader: Reader) -> Predictions:
        """Return the end-task logits of a whole split; each worker computes its share."""
        setup = self.setup
        own = reader.predict(setup.encoder, setup.head_of[END_TASK_HEAD], setup.compute)
        return gathered(setup.workers, own, setup.classes)

    def _at_majority(self, predictions: Predictions, scores: Scores) -> bool:
        """Return whether the model predicts one class only, or is no better than train's majority class."""
        task = self.setup.task
        share = float(np.mean(predictions.labels_E == majority_class(task)))
        # F1 is 2p / (p + 1) for the class that is always predicted, and 0 for all others.
        baseline = share if self._metric == "accuracy" else 2 * share / (share + 1) / len(task.label_names)
        return len(np.unique(predictions.classes_E)) < 2 or score_of(scores, self._metric) <= baseline

    def _score_best_model(self) -> tuple[SplitScores, Predictions]:
        """Load the best model and score it on test; return also its predictions there."""
        setup = self.setup
        load_trained_state(self._scored_model(), self._best_model)
        test = self._predict(self._whole.domain.reader("test", setup.workers.rank, setup.workers.size))
        clean = test.take(setup.task.test_clean)
        dev = self.progress.best_dev
        if dev is None:
            raise ValueError("the best model has no dev scores")
        names = setup.task.label_names
        return SplitScores(dev, test.scores(names), clean.scores(names)), test

    def _prediction_rows(self, test: Predictions) -> pa.Table:
        """Return what the loaded best model predicts on dev and test, as rows of the store."""
        task, domain = self.setup.task, self._whole.domain
        parts = {
            "dev": (self._best_dev or self._predict(self._dev), task.dev, domain.source.schedule.score_dev),
            "test": (test, task.test, np.arange(len(task.test))),
        }
        return pa.concat_tables(
            prediction_table(
                self.config.cell,
                split,
                task.label_names,
                positions_E,
                labelled.digests(positions_E),
                predictions.labels_E,
                torch.softmax(predictions.logits_EC, dim=1).numpy(),
            )
            for split, (predictions, labelled, positions_E) in parts.items()
        )


def in_host_memory(module: nn.Module) -> dict[str, Tensor]:
    """Return a copy of what training changes of a module in host memory."""
    return {name: value.detach().to("cpu", copy=True) for name, value in trained_state(module).items()}


def prefetched(make: Callable[[int], T], first: int, stop: int, depth: int = 2) -> Iterator[T]:
    """Yield make(first), ..., make(stop - 1) in order; `depth` results are computed ahead on another thread."""
    if depth == 0:
        yield from map(make, range(first, stop))
        return
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
        try:
            for step in range(first, stop):
                waiting.append(pool.submit(make, step))
                if len(waiting) > depth:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class LossLog:
    """Computes mean losses since the last evaluation, and raises `RunFailure` for a loss that is not finite.

    Reading a loss waits for the device. So losses stay on the device and are read every `check_every` steps: at each
    step on a CPU, at evaluations on a GPU.
    """

    def __init__(self, check_every: int) -> None:
        self.check_every = check_every
        self._unread: list[tuple[int, Sequence[str], Tensor]] = []
        self._last: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, step: int, names: Sequence[str], losses_S: Tensor) -> None:
        """Add the losses of a step, [S], with the name of each segment; a segment with an empty name is skipped."""
        self._unread.append((step, names, losses_S.detach()))
        if len(self._unread) >= self.check_every:
            self.read()

    @property
    def latest(self) -> float | None:
        """The last loss that was read of the first segment; None before one was read."""
        return next(iter(self._last.values()), None)

    def means(self) -> dict[str, float]:
        """Return the mean loss since the last call, by segment name, and start new means."""
        self.read()
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        self.read()
        return {"last": dict(self._last), "sums": {name: list(sums) for name, sums in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._last = dict(state["last"])
        self._sums = {name: (total, count) for name, (total, count) in state["sums"].items()}

    def read(self) -> None:
        """Copy the unread losses to the host and check them."""
        if not self._unread:
            return
        values = iter(torch.cat([losses_S for _, _, losses_S in self._unread]).tolist())  # one copy to the host
        for step, names, losses_S in self._unread:
            for name, value in zip(names, [next(values) for _ in range(len(losses_S))], strict=True):
                if name:
                    self._count(step, name, value)
        self._unread.clear()

    def _count(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            last = self._last.get(name)
            before = "it had none before" if last is None else f"its last finite loss was {last:.4g}"
            raise RunFailure(
                f"step {step}: the loss of {name} is {value}, {before}; lower optim.body_lr, "
                "optim.head_lr or a rate of the method's own, or set precision=fp32 if it is another"
            )
        self._last[name] = value
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, count + 1)
