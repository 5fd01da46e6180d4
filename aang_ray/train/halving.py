"""Search for the objectives that help, then train with these: successive halving over short trials.

A *trial* trains the end task and one objective, with weights 1/2 and 1/2, for a few steps from the run's own first
parameters. Its loss is the calibrated dev loss (objectives/calibration.py) of the model that results. All trials have
the same end-task batches, so their losses differ by what the objective did. A *rung* has a trial of every objective
that is left; the better half goes on to the next rung, which has trials of twice as many steps (Karnin et al. 2013).
The last rung has `finalists` objectives, and a trial of the end task alone. An objective helps if

    z = mean(d) / (sd(d) / sqrt(E)) > least_z,        d_e = loss of the end task alone - loss of the trial, example e.

If several help, trials of the same length follow with the best two of them, the best three, and so on, as many as there
are (checkpoints to average are chosen in the same way: Wortsman et al. 2022). Of these sets of objectives, the largest
is kept that is within one standard error of the best one, by the same formula: what trials cannot tell apart, a longer
training can use. The kept objectives have equal weights in it; if none helps, it is on the end task alone.

docs/methods/halving.md says when this pays. Shape suffix: E dev examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

from aang_ray.config.methods import FinetuneConfig, HalvingConfig, StaticConfig, WeightsConfig
from aang_ray.config.run import RunConfig
from aang_ray.objectives.calibration import calibrated
from aang_ray.store.schema import WeightRow
from aang_ray.train.evaluate import Predictions

Float64 = npt.NDArray[np.float64]
Trial = tuple[str, ...]
"""The objectives of a trial; none for that of the end task alone."""


def example_losses(predictions: Predictions, class_weights_C: torch.Tensor | None) -> Float64:
    """Return the calibrated cross-entropy of every example, [E]; its mean is the calibrated dev loss.

    With class weights, an example's loss is multiplied by its class's weight over the mean weight.
    """
    labels_E = torch.from_numpy(predictions.labels_E)
    weights_E = torch.ones(len(labels_E), dtype=torch.float64)
    if class_weights_C is not None:
        weights_E = class_weights_C.double().cpu()[labels_E]
    logits_EC = calibrated(predictions.logits_EC.double(), labels_E, weights_E)
    losses_E = F.cross_entropy(logits_EC, labels_E, reduction="none") * weights_E / weights_E.mean()
    found: Float64 = losses_E.numpy()
    return found


def z_of(better_E: Float64, worse_E: Float64) -> float:
    """Return mean over standard error of `worse_E - better_E`; 0 if all differences are 0."""
    difference_E = worse_E - better_E
    error = float(difference_E.std(ddof=1)) / math.sqrt(len(difference_E))
    mean = float(difference_E.mean())
    return mean / error if error > 0 else math.copysign(math.inf, mean) if mean else 0.0


class Search:
    """The state of a search: which trials are done, which one is next, and in the end which objectives are kept.

    Args:
        keys: The objectives of the space, by key.
        config: The method's settings.
    """

    def __init__(self, keys: Sequence[str], config: HalvingConfig) -> None:
        self._keys, self._config = tuple(keys), config
        self._rungs = config.rungs(len(keys))
        self.rung = 0
        """Number of the current rung; that of the trials with several objectives comes after the last one."""
        self.left: tuple[str, ...] = self._keys
        """The objectives of the current rung, after the first one from best to worst."""
        self._losses: dict[Trial, Float64] = {}
        """Losses of the current rung's finished trials, [E] each."""
        self.kept: tuple[str, ...] | None = None
        """The result; None while the search runs."""

    @property
    def over(self) -> bool:
        """Whether the search has its result."""
        return self.kept is not None

    @property
    def _trials(self) -> list[Trial]:
        """The trials of the current rung, in order."""
        if self.rung == len(self._rungs):
            return [self.left[:size] for size in range(1, len(self.left) + 1)]
        alone: list[Trial] = [()] if self.rung == len(self._rungs) - 1 else []
        return [(key,) for key in self.left] + alone

    @property
    def next(self) -> Trial:
        """The objectives of the next trial; none: the end task alone."""
        return next(trial for trial in self._trials if trial not in self._losses)

    def stage_config(self, config: RunConfig) -> RunConfig:
        """Return the configuration of the next trial."""
        steps = self._rungs[min(self.rung, len(self._rungs) - 1)][1]
        schedule = config.schedule.changed(steps=steps, eval_every=steps, until="steps")
        method = trained_with(self.next)
        batch = config.batch.changed(auxiliary=self._config.batch or config.batch.auxiliary)
        return config.changed(method=method, n="all", schedule=schedule, batch=batch)

    def result_config(self, config: RunConfig) -> RunConfig:
        """Return the configuration of the training with the kept objectives."""
        kept = self.kept or ()
        n = config.n if config.n != "all" and config.n <= len(kept) else "all"
        return config.changed(method=trained_with(kept), n=n)

    def judge(self, losses_E: Float64, step: int) -> WeightRow | None:
        """Use the losses of the trial that has ended; return the weights at the end of a rung, else None."""
        self._losses[self.next] = losses_E
        if len(self._losses) < len(self._trials):
            return None
        means = {trial: float(losses.mean()) for trial, losses in self._losses.items()}
        health = {f"dev_loss/{' + '.join(trial) or 'end-task'}": mean for trial, mean in means.items()}
        best_first = sorted((trial for trial in means if trial), key=means.__getitem__)
        finished, self._losses = self._losses, {}
        self.rung += 1
        if self.rung > len(self._rungs):
            behind = {trial: z_of(finished[best_first[0]], finished[trial]) for trial in best_first}
            self.left = self.kept = max((trial for trial in best_first if behind[trial] <= 1), key=len)
        elif self.rung == len(self._rungs):
            z = {key: z_of(finished[(key,)], finished[()]) for (key,) in best_first}
            health |= {f"z/{key}": min(max(value, -1e6), 1e6) for key, value in z.items()}
            self.left = tuple(key for key in z if z[key] > self._config.least_z)
            self.kept = self.left if len(self.left) < 2 else None
            self._losses = {trial: finished[trial] for trial in [self.left[:1]] if trial}  # the best alone is done
        else:
            self.left = tuple(key for (key,) in best_first[: self._rungs[self.rung][0]])
        share = 1 / max(len(self.left), 1)
        return WeightRow(
            step=step,
            end_task_weight=0.5 if self.left else 1.0,
            weights={key: share if key in self.left else 0.0 for key in self._keys},
            factors={},
            health=health,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain values."""
        losses = [[list(trial), values.tolist()] for trial, values in self._losses.items()]
        kept = None if self.kept is None else list(self.kept)
        return {"rung": self.rung, "left": list(self.left), "losses": losses, "kept": kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.rung, self.left = int(state["rung"]), tuple(state["left"])
        self._losses = {tuple(trial): np.asarray(values, dtype=np.float64) for trial, values in state["losses"]}
        self.kept = None if state["kept"] is None else tuple(state["kept"])


def trained_with(keys: Sequence[str]) -> StaticConfig | FinetuneConfig:
    """Return static multitask with equal weights of these objectives; fine-tuning if there are none."""
    if not keys:
        return FinetuneConfig()
    return StaticConfig(weights=WeightsConfig(end_task=0.5, objectives=dict.fromkeys(keys, 1.0)))
