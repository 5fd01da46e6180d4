"""Fill in what a configuration leaves to the task: then its hash names the run."""

from __future__ import annotations

import math
from typing import Any

from aang_ray.config.run import RunConfig
from aang_ray.data import card_of, data_fingerprint, encoder_fingerprint, load_end_task, locate
from aang_ray.objectives.space import read_space

PAPER_END_TASK, PAPER_AUXILIARY, PAPER_DEV_HEAD = 128, 256, 32
"""Batch sizes of Dery et al. 2023, Tables 4 and 5, where no card says otherwise."""


def resolve(config: RunConfig) -> RunConfig:
    """The same run with the card's metric and batch sizes, the number of steps, and fingerprints of its inputs.

    Raises:
        UserError: if the task, the encoder or the space is not there.
    """
    card = card_of(config.data)
    batch: dict[str, Any] = {
        "end_task": config.batch.end_task or (card.batch_end_task if card else PAPER_END_TASK),
        "auxiliary": config.batch.auxiliary or (card.batch_auxiliary if card else PAPER_AUXILIARY),
        "dev_head": config.batch.dev_head or (card.batch_dev_head if card else PAPER_DEV_HEAD),
    }
    metric = config.data.metric or (card.metric if card else "accuracy")
    fingerprints = {
        "data": data_fingerprint(config.data),
        "encoder": encoder_fingerprint(locate(config.encoder)),
        "space": read_space(config.space).fingerprint if config.method.auxiliary else "",
    }
    resolved = config.model_copy(
        update={
            "batch": config.batch.model_copy(update=batch),
            "data": config.data.model_copy(update={"metric": metric}),
            "fingerprints": config.fingerprints.model_copy(update=fingerprints),
        }
    )
    if resolved.schedule.steps is not None:
        return resolved
    steps = {"steps": epoch_steps(resolved)}
    return resolved.model_copy(update={"schedule": resolved.schedule.model_copy(update=steps)})


def epoch_steps(config: RunConfig) -> int:
    """Steps of `schedule.epochs` over task and domain texts at the auxiliary batch size.

    The same for every method, so that methods are compared at equal budgets of end-task examples.
    (Dery et al. 2023, appendix D)
    """
    task = load_end_task(config.data, config.encoder)
    texts = len(task.train) + sum(len(corpus) for corpus in task.corpora.values())
    return math.ceil(config.schedule.epochs * texts / (config.batch.auxiliary or PAPER_AUXILIARY))
