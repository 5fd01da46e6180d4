"""The loop: steps, evaluations on dev, early stopping, the kept checkpoint, test once. (semantics section 5)"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from aang_ray.data.tasks import Metric
from aang_ray.errors import RunFailure
from aang_ray.objectives.source import END_TASK, END_TASK_HEAD
from aang_ray.store.schema import HistoryRow, Scores, WeightRow
from aang_ray.train.checkpoint import Checkpointer
from aang_ray.train.distances import local_distances
from aang_ray.train.evaluate import Predictions, Reader, bootstrap_interval, score_of
from aang_ray.train.rounds import make_stepper
from aang_ray.train.setup import Setup, majority_class
from aang_ray.train.stages import staged, stages_of
from aang_ray.train.step import Prepared, restore_stepper, stepper_state
from aang_ray.train.workers.group import gathered

# --- train.prefetch: Prepare the next steps' batches on another thread, so that the step never waits for data.


T = TypeVar("T")


def prefetched(make: Callable[[int], T], first: int, stop: int, depth: int = 2) -> Iterator[T]:
    """make(first), ..., make(stop - 1) in order, at most `depth` ahead; depth 0 makes each when it is asked for.

    An exception in `make` is raised where its result would have come.
    """
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


# --- train.progress: What a run has done so far, and its plain form for a checkpoint.


@dataclass(frozen=True)
class SplitScores:
    """One model on all views that the store keeps."""

    dev: Scores
    test: Scores
    test_clean: Scores


@dataclass
class Progress:
    """What a run has done so far."""

    steps: int = 0
    """Of all stages."""
    stage: int = 0
    """Number of the stage it is in."""
    stage_steps: int = 0
    """Steps of that stage."""
    examples: int = 0
    """End-task examples."""
    tokens: int = 0
    history: list[HistoryRow] = field(default_factory=list)
    weights: list[WeightRow] = field(default_factory=list)
    best_step: int = 0
    best_score: float = -1.0
    since_best: int = 0
    """Evaluations without improvement."""
    majority: bool = True
    """No evaluation so far was better than the majority class."""
    before: SplitScores | None = None
    """Of the model that the last fine-tuning started from, once it has begun."""

    def next_stage(self) -> None:
        """Begin the next stage: what dev has decided so far belongs to the last one."""
        self.stage += 1
        self.stage_steps = self.since_best = 0
        self.best_step, self.best_score = 0, -1.0

    def state_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """What `state_dict` gave, as rows again."""
        rows: dict[str, Any] = {
            "history": [HistoryRow(**{**row, "dev": _scores(row["dev"])}) for row in state["history"]],
            "weights": [WeightRow(**row) for row in state["weights"]],
        }
        before = state["before"]
        if before is not None:
            rows["before"] = SplitScores(**{view: Scores(**scores) for view, scores in before.items()})
        return cls(**{**state, **rows})


def _scores(state: Mapping[str, Any] | None) -> Scores | None:
    return None if state is None else Scores(**state)


# --- train.losses: What the steps' losses were since the last evaluation, and whether they are still numbers.


class LossLog:
    """Keeps each step's losses on the device and reads them every `check_every` steps.

    Reading waits for the device, so a GPU is read at evaluations, a CPU at every step.
    """

    def __init__(self, check_every: int) -> None:
        self.check_every = check_every
        self._unread: list[tuple[int, Sequence[str], Tensor]] = []
        self._last: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, step: int, names: Sequence[str], losses_S: Tensor) -> None:
        """Losses of a step's segments; a segment without a name is left out.

        Raises:
            RunFailure: for a loss that is not finite.
        """
        self._unread.append((step, names, losses_S.detach()))
        if len(self._unread) >= self.check_every:
            self.read()

    def read(self) -> None:
        """Bring the kept losses to the host and check them.

        Raises:
            RunFailure: naming the step, the objective and its last finite loss.
        """
        if not self._unread:
            return
        flat = torch.cat([losses_S for _, _, losses_S in self._unread]).tolist()
        start = 0
        for step, names, losses_S in self._unread:
            for name, value in zip(names, flat[start : start + len(losses_S)], strict=True):
                if name:
                    self._take(step, name, value)
            start += len(losses_S)
        self._unread.clear()

    def means(self) -> dict[str, float]:
        """Mean loss by name since the last call."""
        self.read()
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Everything read so far, as plain numbers.

        Raises:
            RunFailure: for a loss that is not finite.
        """
        self.read()
        return {"last": dict(self._last), "sums": {name: list(sums) for name, sums in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._last = dict(state["last"])
        self._sums = {name: (total, count) for name, (total, count) in state["sums"].items()}

    def _take(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            last = self._last.get(name)
            before = "it had none before" if last is None else f"its last finite loss was {last:.4g}"
            raise RunFailure(
                f"step {step}: the loss of {name} is {value}, {before}; lower optim.body_lr, "
                "optim.head_lr or a rate of the method's own, or set precision=fp32"
            )
        self._last[name] = value
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, count + 1)


OnEvaluation = Callable[[HistoryRow], None]


@dataclass(frozen=True)
class Finished:
    """A run at its end."""

    progress: Progress
    scores: SplitScores
    clean_interval: tuple[float, float] | None
    """95 % bootstrap interval of the metric on `test_clean`."""
    seconds: float


class Trainer:
    """Trains one set-up through its stages to its end, from its checkpoint where `checkpointer` has one."""

    def __init__(
        self, setup: Setup, on_evaluation: OnEvaluation | None = None, checkpointer: Checkpointer | None = None
    ) -> None:
        self.config = setup.config
        self.progress = Progress()
        self._whole = setup
        self._stages = stages_of(setup.config)
        self._enter()
        self._on_evaluation = on_evaluation
        self._checkpointer = checkpointer
        self._metric: Metric = setup.task.metric
        self._dev = setup.domain.reader("dev", setup.workers.rank, setup.workers.size)
        self._losses = LossLog(1 if setup.compute.device.type == "cpu" else setup.config.schedule.eval_every)
        self._kept: dict[str, Tensor] = {}
        self._started = time.monotonic()

    def run(self) -> Finished:
        """Train, keep the best dev checkpoint, score test once from it.

        Raises:
            UserError: for a checkpoint that the run cannot go on from.
            RunFailure: for a loss that is not finite, or memory that runs out.
            Interrupted, KeyboardInterrupt: when asked to stop, with the checkpoint written.
            StepLimitReached: at the step it was to stop at, with the checkpoint written.
        """
        if self._checkpointer is None or not self._checkpointer.resume(self._restore):
            self.stepper.estimate_memory(self.stepper.prepare(0))
        else:
            self._checkpointer.after_resume(self.progress.steps)
        self.stepper.check_same(self.progress.steps)
        with nullcontext() if self._checkpointer is None else self._checkpointer.delaying_signals():
            self._train()
            while self.progress.stage + 1 < len(self._stages):
                self._next_stage()
                self._train()
        return self._finish()

    @property
    def seconds(self) -> float:
        """Since the run began, less the time between an interruption and its resumption."""
        return time.monotonic() - self._started

    @property
    def _total(self) -> int:
        return self.setup.config.schedule.steps or 0

    @property
    def _over(self) -> bool:
        progress = self.progress
        return (
            self.stepper.ends_after(progress.stage_steps) or progress.since_best >= self.setup.config.schedule.patience
        )

    def _enter(self) -> None:
        """Make the stage that the progress names: its batches, method, optimiser and schedule."""
        self.stage = self._stages[self.progress.stage]
        self.setup = staged(self._whole, self.stage.config)
        self.stepper = make_stepper(self.setup)

    def _next_stage(self) -> None:
        """Go on from the model that dev kept, where dev decides, else from the last one."""
        if self.stage.decides:
            self._load_kept()
            self.progress.before, _ = self._kept_scores()
            self._kept = {}
        self.progress.next_stage()
        self._enter()
        self.stepper.estimate_memory(self.stepper.prepare(0))

    def _train(self) -> None:
        """Step after step of a stage, from the one after the last that was done."""
        first = self.progress.stage_steps
        depth = 2 if self.stepper.prepares_ahead else 0
        for prepared in prefetched(self.stepper.prepare, first, first if self._over else self._total, depth):
            gradients = self.stepper.step(prepared)
            progress = self.progress
            progress.steps += 1
            progress.stage_steps += 1
            progress.examples += prepared.batch.segments[END_TASK].texts
            progress.tokens += prepared.real_tokens
            self._losses.add(progress.steps, prepared.names, gradients.losses_S)
            if self.stepper.evaluates_after(progress.stage_steps):
                self._evaluate(prepared)
            if self._checkpointer is not None:
                self._checkpointer.after_step(self.progress.steps, self._state, self.progress.best_step, self._kept)
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
        self.progress = Progress.from_state(state["progress"])
        if self.progress.stage > 0:
            self._enter()
        restore_stepper(self.stepper, state["stepper"])
        self._losses.load_state_dict(state["losses"])
        self._started = time.monotonic() - state["seconds"]
        self._kept = kept

    def _evaluate(self, prepared: Prepared) -> None:
        """Score dev where it decides, log losses and weights."""
        setup, progress = self.setup, self.progress
        self.stepper.check_same(progress.steps)
        row = HistoryRow(
            step=progress.steps,
            dev=self._decide() if self.stage.decides else None,
            losses=self._losses.means(),
            seconds=self.seconds,
            examples=progress.examples,
            tokens=progress.tokens,
            stage=self.stage.name,
        )
        progress.history.append(row)
        weights = setup.method.describe(prepared.sampled)
        if weights is not None:
            if setup.config.gradients.local_distances:
                distances = local_distances(self.stepper, progress.stage_steps)
                weights = replace(weights, health={**weights.health, **distances})
            progress.weights.append(weights)
        if self._on_evaluation is not None:
            self._on_evaluation(row)

    def _decide(self) -> Scores:
        """Score dev, and keep the model if it is the best so far (first of ties)."""
        setup, progress = self.setup, self.progress
        predictions = self._predict(self._dev)
        scores = predictions.scores(setup.task.label_names)
        score = score_of(scores, self._metric)
        if not self._at_majority(predictions, scores):
            progress.majority = False
        progress.since_best += 1
        if score > progress.best_score:
            progress.best_score, progress.best_step, progress.since_best = score, progress.steps, 0
            self._kept = {name: value.detach().to("cpu", copy=True) for name, value in self._model_state().items()}
        return scores

    def _predict(self, reader: Reader) -> Predictions:
        """Logits of the end task, of this worker's examples from this worker and so on."""
        setup = self.setup
        own = reader.predict(setup.encoder, setup.head_of[END_TASK_HEAD], setup.compute)
        return gathered(setup.workers, own, setup.classes)

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

    def _load_kept(self) -> None:
        setup = self.setup
        parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "head": {}}
        for name, value in self._kept.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        setup.encoder.load_state_dict(parts["encoder"])
        setup.head_of[END_TASK_HEAD].load_state_dict(parts["head"])

    def _kept_scores(self) -> tuple[SplitScores, Predictions]:
        """Of the kept model, once it is loaded; and its predictions on the clean view of test."""
        setup = self.setup
        test = self._predict(self._whole.domain.reader("test", setup.workers.rank, setup.workers.size))
        clean = test.take(setup.task.test_clean)
        dev = next(row.dev for row in self.progress.history if row.step == self.progress.best_step)
        if dev is None:
            raise ValueError("the kept model was not scored on dev")
        names = setup.task.label_names
        return SplitScores(dev, test.scores(names), clean.scores(names)), clean

    def _finish(self) -> Finished:
        self._load_kept()
        scores, clean = self._kept_scores()
        if self.setup.compute.device.type == "cuda":
            torch.cuda.synchronize(self.setup.compute.device)
        interval = bootstrap_interval(clean, self._metric, self.setup.classes)
        return Finished(self.progress, scores, interval, self.seconds)
