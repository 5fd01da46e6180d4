"""Masked-LM stages before fine-tuning: TAPT on the task's text, DAPT on in-domain text, and DAPT then TAPT."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveFloat, PositiveInt

from aang_ray.config.methods.base import MethodSection
from aang_ray.config.section import OpenFraction


class PretrainSection(MethodSection):
    """What the masked-LM stages have in common (Gururangan et al. 2020; semantics section 4).

    Fine-tuning follows with the run's own settings. The stages see no label, so their steps are no part of the
    budget of end-task examples; their tokens and seconds count.
    """

    auxiliary: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]]
    """Data of each stage, in order."""
    lr: PositiveFloat = 1e-4
    """Learning rate of the body."""
    head_lr: PositiveFloat | None = None
    """Learning rate of the masked-LM head; null takes `lr`."""
    batch: PositiveInt = 256
    """Texts a step."""
    epochs: PositiveInt = 100
    """Passes over a stage's texts, where its steps are not given."""
    mask_rate: OpenFraction = 0.15
    """Share of the real tokens that is selected."""

    def steps_of(self, text: str) -> int | None:
        """Steps of the stage on `end-task` or `in-domain` text; None where `epochs` decides."""
        value: int | None = getattr(self, STEPS[text])
        return value

    @property
    def pretraining_steps(self) -> int:
        return sum(self.steps_of(text) or 0 for text in self.texts)

    @property
    def pretraining_texts(self) -> int:
        return self.pretraining_steps * self.batch


STEPS = {"end-task": "tapt_steps", "in-domain": "dapt_steps"}
"""The setting that holds a stage's steps, by its data."""


class TaptConfig(PretrainSection):
    """Task-adaptive pretraining, then fine-tuning."""

    name: Literal["tapt"] = "tapt"
    texts: ClassVar[tuple[str, ...]] = ("end-task",)
    tapt_steps: PositiveInt | None = None
    """Masked-LM steps on task text; null: `epochs` over it."""


class DaptConfig(PretrainSection):
    """Domain-adaptive pretraining, then fine-tuning."""

    name: Literal["dapt"] = "dapt"
    texts: ClassVar[tuple[str, ...]] = ("in-domain",)
    dapt_steps: PositiveInt | None = None
    """Masked-LM steps on in-domain text; null: `epochs` over it."""


class TaptDaptConfig(PretrainSection):
    """DAPT, then TAPT, then fine-tuning."""

    name: Literal["tapt_dapt"] = "tapt_dapt"
    texts: ClassVar[tuple[str, ...]] = ("in-domain", "end-task")
    dapt_steps: PositiveInt | None = None
    """Masked-LM steps on in-domain text; null: `epochs` over it."""
    tapt_steps: PositiveInt | None = None
    """Masked-LM steps on task text; null: `epochs` over it."""
