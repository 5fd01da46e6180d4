"""Methods that train task by task in rounds: alphaVIL and DIW."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from aang_ray.config.methods.base import MethodSection
from aang_ray.config.section import HalfOpen, Semantics

Share = Annotated[float, Field(gt=0.0, le=1.0)]


class RoundsSection(MethodSection):
    """What methods of rounds have in common (semantics section 7).

    The tasks are the end task and n objectives of the space, drawn once for the whole run (`n: all`: every one).
    `schedule.steps` counts the optimiser steps of all tasks; dev is scored at the ends of rounds alone.
    """

    auxiliary: ClassVar[bool] = True
    round_fraction: Share = 1.0
    """Part of each task's examples that a round trains on: 1 is an epoch; the paper takes 0.25 for text."""
    round_steps: PositiveInt | None = None
    """Optimiser steps of each task in a round; null: as many as `round_fraction` takes."""


class AlphavilConfig(RoundsSection):
    """alphaVIL: mixes the tasks' parameter updates by gradient descent on the dev loss."""

    name: Literal["alphavil"] = "alphavil"
    alpha_steps: PositiveInt = 10
    """s: steps of SGD on alpha in a round."""
    alpha_lr: PositiveFloat = 0.001
    """Its learning rate; the paper takes 0.005 for images."""
    alpha_momentum: HalfOpen = 0.5
    task_weight: Semantics = "sound"
    """What w_i scales under AdamW: the task's learning rate, or (`published`) its loss, which changes nothing there."""


class DiwConfig(RoundsSection):
    """Discriminative importance weighting: task weights moved by dev scores, tried again until dev improves."""

    name: Literal["diw"] = "diw"
    weight_lr: NonNegativeFloat = 0.1
    """How far a difference of two dev scores moves a weight."""
    tries: PositiveInt = 10
    """Most trainings of one round with new weights."""
