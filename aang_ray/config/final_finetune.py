"""The optional last stage: fine-tuning on the end task alone, from the model that the run kept."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from aang_ray.config.section import Section


class FinalFinetuneConfig(Section):
    """A fresh optimiser and schedule; dev decides again, among the models of this stage.

    Its end-task examples come on top of the run's own and count in its budget.
    """

    steps: PositiveInt
    """Optimiser steps."""
    body_lr: PositiveFloat = 2e-5
    """Learning rate of the body; the default is that of fine-tuning after TAPT (semantics section 4)."""
    head_lr: PositiveFloat | None = None
    """Learning rate of the end-task head; null: `optim.head_lr`."""
    patience: PositiveInt | None = None
    """Evaluations without improvement after which the stage stops; null: `schedule.patience`."""
