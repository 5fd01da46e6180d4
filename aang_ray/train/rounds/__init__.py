"""Methods that train task by task, in rounds, behind the same steps as all others."""

from __future__ import annotations

from aang_ray.config.methods import AlphavilConfig, DiwConfig
from aang_ray.methods.alphavil import Alphavil
from aang_ray.methods.diw import Diw
from aang_ray.train.rounds.alphavil import AlphavilStepper
from aang_ray.train.rounds.diw import DiwStepper
from aang_ray.train.setup import Setup
from aang_ray.train.step import Stepper


def make_stepper(setup: Setup) -> Stepper:
    """Whatever makes the steps of a set-up's method."""
    config, method = setup.config.method, setup.method
    if isinstance(config, AlphavilConfig) and isinstance(method, Alphavil):
        return AlphavilStepper(setup, method, config)
    if isinstance(config, DiwConfig) and isinstance(method, Diw):
        return DiwStepper(setup, method, config)
    return Stepper(setup)
