"""Fill in what a configuration leaves to the task: then its hash names the run."""

from __future__ import annotations

import math
from typing import Any

from aang_ray.config.methods import PretrainSection
from aang_ray.config.methods.tapt import STEPS
from aang_ray.config.run import RunConfig
from aang_ray.data import (
    ImageTask,
    card_of,
    encoder_fingerprint,
    is_image_task,
    load_end_task,
    load_task,
    locate,
    task_fingerprint,
)
from aang_ray.errors import UserError
from aang_ray.objectives.space import read_space
from aang_ray.train.image_settings import FINGERPRINT, LENET, check_image_settings

PAPER_END_TASK, PAPER_AUXILIARY, PAPER_DEV_HEAD = 128, 256, 32
"""Batch sizes of Dery et al. 2023, Tables 4 and 5, where no card says otherwise."""


def resolve(config: RunConfig) -> RunConfig:
    """The same run with the card's metric and batch sizes, the number of steps, and fingerprints of its inputs.

    Raises:
        UserError: if the task, the encoder or the space is not there, or something could not be logged.
    """
    if config.gradients.local_distances and (config.method.name == "graddrop" or not config.method.auxiliary):
        raise UserError(
            f"gradients.local_distances: they are logged beside the weights, and {config.method.name} has none"
        )
    card = card_of(config.data)
    batch: dict[str, Any] = {
        "end_task": config.batch.end_task or (card.batch_end_task if card else PAPER_END_TASK),
        "auxiliary": config.batch.auxiliary or (card.batch_auxiliary if card else PAPER_AUXILIARY),
        "dev_head": config.batch.dev_head or (card.batch_dev_head if card else PAPER_DEV_HEAD),
    }
    metric = config.data.metric or (card.metric if card else "accuracy")
    fingerprints = {
        "data": task_fingerprint(config.data),
        "encoder": _encoder_fingerprint(config),
        "space": read_space(config.space).fingerprint if config.method.auxiliary else "",
    }
    resolved = config.model_copy(
        update={
            "batch": config.batch.model_copy(update=batch),
            "data": config.data.model_copy(update={"metric": metric}),
            "fingerprints": config.fingerprints.model_copy(update=fingerprints),
        }
    )
    if isinstance(resolved.method, PretrainSection):
        resolved = resolved.model_copy(update={"method": with_steps(resolved, resolved.method)})
    if resolved.schedule.steps is not None:
        return resolved
    steps = {"steps": epoch_steps(resolved)}
    return resolved.model_copy(update={"schedule": resolved.schedule.model_copy(update=steps)})


def _encoder_fingerprint(config: RunConfig) -> str:
    if is_image_task(config.data):
        check_image_settings(config)
        return FINGERPRINT
    if config.encoder.name == LENET:
        raise UserError(f"encoder.name: {LENET} reads images; {config.data.task} is a task of text")
    return encoder_fingerprint(locate(config.encoder))


def with_steps(config: RunConfig, method: PretrainSection) -> PretrainSection:
    """The same masked-LM stages with the number of their steps: `epochs` over each one's texts where none is given.

    Raises:
        UserError: for a stage on in-domain text where there is none.
    """
    missing = [text for text in method.texts if method.steps_of(text) is None]
    if not missing:
        return method
    task = load_end_task(config.data, config.encoder)
    sizes = {"end-task": len(task.train), "in-domain": len(task.corpora.get("in_domain", ()))}
    for text in missing:
        if not sizes[text]:
            raise UserError(f"method {config.method.name}: no {text} text is given; set data.{text.replace('-', '_')}")
    steps = {STEPS[text]: math.ceil(method.epochs * sizes[text] / method.batch) for text in missing}
    return method.model_copy(update=steps)


def epoch_steps(config: RunConfig) -> int:
    """Steps of `schedule.epochs` over task and domain texts at the auxiliary batch size.

    The same for every method, so that methods are compared at equal budgets of end-task examples.
    (Dery et al. 2023, appendix D)
    """
    task = load_task(config.data, config.encoder)
    domain = () if isinstance(task, ImageTask) else task.corpora.get("in_domain", ())
    texts = len(task.train) + len(domain)
    return math.ceil(config.schedule.epochs * texts / (config.batch.auxiliary or PAPER_AUXILIARY))
