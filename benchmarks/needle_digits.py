"""Digits with a planted truth: a domain of `needle.py` in which it is known how much each auxiliary label helps.

The end task is `digits-left` with few train pairs. The auxiliary objectives read all train pairs of the same split.
Objective `labels-XX-Y` has the left digit's class as label, but XX % of the labels are replaced by a random class: 00
helps most, and with 99 all labels are random.

The module registers the domain in the tables of the package when it is imported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import torch
from torch import nn

from aang_ray.config import DataConfig, RunConfig
from aang_ray.config.sections import Semantics
from aang_ray.data import load_task
from aang_ray.data.digits import ImageTask, digits_fingerprint, load_digit_pairs, print_image_task
from aang_ray.data.modalities import MODALITIES, Modality
from aang_ray.data.tasks import Card, register_cards
from aang_ray.model.heads import ClassificationHead
from aang_ray.model.lenet import LeNet
from aang_ray.objectives import DOMAINS as TAXONOMIES
from aang_ray.objectives.images import ImageSegment, ImageSource, segment
from aang_ray.objectives.objective import Objective, Rule
from aang_ray.objectives.sampling import ExampleSchedule, Share, SourceSettings
from aang_ray.objectives.source import END_TASK_HEAD
from aang_ray.objectives.space import Space, enumerate_space, read_space
from aang_ray.train.domain import DOMAINS, DomainKind, DomainParts
from aang_ray.train.images import FINGERPRINT, LENET, ImageDomain, check_image_settings
from aang_ray.train.plan import sampled_count, source_settings, weighted

NAME: Final = "planted-digits"
ENCODER: Final = "planted-lenet"
"""The value of `encoder.name`: LeNet. A name belongs to one domain."""
NOISES: Final = ("00", "25", "50", "99")
COPIES: Final = 12
OUTPUTS: Final = tuple(f"labels-{noise}-{copy}" for noise in NOISES for copy in range(COPIES))
CLASSES: Final = 10


class PlantedTaxonomy:
    """One objective for each planted label."""

    def names(self, stage: str) -> tuple[str, ...]:
        """Return the names that can be chosen at a stage."""
        known = {"data": ("end-task",), "transform": ("no-op",), "representation": ("whole",), "output": OUTPUTS}
        return known[stage]

    def rules(self, objective: Objective) -> Sequence[Rule]:
        """Return no rules."""
        return ()

    def conflicts(self, objectives: Collection[Objective], labels: Semantics) -> dict[Objective, str]:
        """Return no conflicts."""
        return {}


TAXONOMY: Final = PlantedTaxonomy()


def planted_labels(output: str, classes_N: np.ndarray, seed: int) -> np.ndarray:
    """Return the labels of all train pairs for an objective's output."""
    _, noise, _ = output.split("-")
    digest = hashlib.sha256(output.encode()).digest()
    rng = np.random.default_rng([seed, *digest[:4]])
    random_N = rng.random(len(classes_N)) < (1.0 if noise == "99" else int(noise) / 100)
    return np.where(random_N, rng.integers(CLASSES, size=len(classes_N)), classes_N)


class PlantedSource(ImageSource):
    """Reads the end task from few train pairs, and the objectives from all of them.

    Args:
        task: The end task with few train pairs.
        pool: The end task with all train pairs.
        space: The objectives; None if there are none.
        n: Objectives in a step.
        settings: Settings that decide which examples are read.
        seed: Seed of the label noise.
    """

    def __init__(
        self, task: ImageTask, pool: ImageTask, space: Space | None, n: int, settings: SourceSettings, seed: int
    ) -> None:
        super().__init__(task, space, n, settings)
        pixels = task.train.pixels_NHW
        mean, deviation = pixels.mean(dtype=np.float64), pixels.std(dtype=np.float64)
        pixels_NHW = ((pool.train.pixels_NHW - mean) / deviation).astype(np.float32)
        self.pool = replace(pool.train, pixels_NHW=pixels_NHW)
        outputs = [objective.output for objective in space.objectives] if space is not None else []
        self._labels = {output: planted_labels(output, pool.train.labels, seed) for output in outputs}
        size = len(self.pool)
        self.schedule = ExampleSchedule(len(task.train), len(task.dev), lambda _: size, space, n, settings)

    def objective(self, share: Share) -> ImageSegment:
        """Return examples of the pool with the planted labels."""
        assert self.space is not None
        objective = self.space.objectives[share.objective]
        pixels_EHW = self.pool.take(share.examples).pixels_NHW
        return segment(objective.key, objective.output, pixels_EHW, self._labels[objective.output][share.examples])


def load_planted(data: DataConfig) -> ImageTask:
    """Return `digits-left` with the configured number of train pairs."""
    return replace(load_digit_pairs(data.model_copy(update={"task": "digits-left"})), name=NAME)


def check_settings(config: RunConfig) -> None:
    """Refuse settings that do not apply to images.

    Raises:
        UserError: for such a setting.
    """
    named = config.encoder.model_copy(update={"name": LENET if config.encoder.name == ENCODER else config.encoder.name})
    check_image_settings(config.model_copy(update={"encoder": named}))


def build_planted_run(config: RunConfig, device: torch.device) -> DomainParts:
    """Return the parts of a run on planted digits."""
    check_settings(config)
    task, pool = load_planted(config.data), load_planted(config.data.model_copy(update={"train_size": None}))
    encoder = LeNet(task.height, task.width).to(device)

    def stage(config: RunConfig) -> tuple[Space | None, ImageDomain]:
        space = None
        if config.method.auxiliary:
            space = enumerate_space(config.space, read_space(config.space), config.objectives.legality)
            space = weighted(config, space)
        n = sampled_count(config, space)
        source = PlantedSource(task, pool, space, n, source_settings(config), config.data.split_seed)
        return space, ImageDomain(encoder, source)

    space, domain = stage(config)
    names = [END_TASK_HEAD, *(objective.output for objective in (space.objectives if space is not None else ()))]
    width, dropout = encoder.hidden_size, config.encoder.head_dropout
    heads: dict[str, nn.Module] = {name: ClassificationHead(width, CLASSES, dropout) for name in names}
    return DomainParts(task, encoder, heads, space, domain, stage)


DOMAIN: Final = DomainKind(
    build=build_planted_run,
    check=check_settings,
    encoder_fingerprint=lambda config: FINGERPRINT,
    examples=lambda config: len(load_task(config.data, config.encoder).train),
    encoders=frozenset({ENCODER}),
)

MODALITIES[NAME] = Modality(lambda data, _: load_planted(data), digits_fingerprint, print_image_task)
TAXONOMIES[NAME] = DOMAINS[NAME] = __name__
register_cards(
    [Card(NAME, "superimposed digits", "accuracy", CLASSES, "digits-left", "planted labels", modality=NAME)], {}
)
