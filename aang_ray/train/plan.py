"""Resolve a configuration, whose hash names the run: fill in values that depend on the task and the encoder."""

from __future__ import annotations

import math
from typing import Any

from aang_ray.config.methods import STEPS, AangConfig, PretrainSection
from aang_ray.config.run import RunConfig
from aang_ray.data import card_of, load_end_task, task_fingerprint
from aang_ray.errors import UserError
from aang_ray.objectives.sampling import SourceSettings
from aang_ray.objectives.space import Space, enumerate_space, read_space
from aang_ray.train.domain import check_domain, domain_of

PAPER_END_TASK, PAPER_AUXILIARY, PAPER_DEV_HEAD = 128, 256, 32
"""Batch sizes of Dery et al. 2023, Tables 4 and 5, for tasks without a card."""


def resolve(config: RunConfig) -> RunConfig:
    """Return the configuration with metric, batch sizes, number of steps and fingerprints of its inputs filled in.

    Metric and batch sizes come from the task's card unless the user has set them.

    Raises:
        UserError: The task, the encoder or the space does not exist, or a setting does not fit the others.
    """
    method = config.method
    if config.gradients.local_distances and not (method.auxiliary and method.logs_weights):
        raise UserError(f"gradients.local_distances: they are logged beside the weights, and {method.name} has none")
    card = card_of(config.data)
    batch: dict[str, Any] = {
        "end_task": config.batch.end_task or (card.batch_end_task if card else PAPER_END_TASK),
        "auxiliary": config.batch.auxiliary or (card.batch_auxiliary if card else PAPER_AUXILIARY),
        "dev_head": config.batch.dev_head or (card.batch_dev_head if card else PAPER_DEV_HEAD),
    }
    metric = config.data.metric or (card.metric if card else "accuracy")
    data = task_fingerprint(config.data)
    check_domain(config)
    fingerprints = {
        "data": data,
        "encoder": domain_of(config.data).encoder_fingerprint(config),
        "space": read_space(config.space).fingerprint if method.auxiliary else "",
    }
    resolved = config.changed(
        batch=config.batch.changed(**batch),
        data=config.data.changed(metric=metric),
        fingerprints=config.fingerprints.changed(**fingerprints),
    )
    if isinstance(method, PretrainSection):
        resolved = resolved.changed(method=with_steps(resolved, method))
    if resolved.schedule.steps is not None:
        return resolved
    # Epochs over train and in-domain examples at the auxiliary batch size, for every method: so all methods see equally
    # many end-task examples (Dery et al. 2023, appendix D).
    examples = config.schedule.epochs * domain_of(config.data).examples(config)
    return resolved.changed(schedule=config.schedule.changed(steps=math.ceil(examples / batch["auxiliary"])))


def with_steps(config: RunConfig, method: PretrainSection) -> PretrainSection:
    """Return the method with a number of steps for every masked-LM stage, by default those of `epochs` epochs.

    Raises:
        UserError: For a stage on in-domain text if there is none.
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
    return method.changed(**steps)


def source_settings(config: RunConfig) -> SourceSettings:
    """Return the batch settings of a resolved configuration, for any domain."""
    meta = config.method if isinstance(config.method, AangConfig) else AangConfig()
    batch = config.batch
    if batch.end_task is None or batch.auxiliary is None or batch.dev_head is None:
        raise ValueError("the configuration must be resolved first")
    return SourceSettings(
        end_task=0 if isinstance(config.method, PretrainSection) else batch.end_task,
        auxiliary=batch.auxiliary,
        dev=batch.dev,
        dev_head=0 if meta.dev_head == "live" else batch.dev_head,
        seed=config.seed,
        per_objective_heads=config.objectives.heads == "per_objective",
        head_from_train=meta.dev_sample == "published",
        head_refit_every=meta.head_refit_every,
        meta_dev_fraction=meta.meta_dev_fraction,
        published_allocation=config.objectives.allocation == "published",
    )


def sampled_count(config: RunConfig, space: Space | None) -> int:
    """Return the number of objectives in a step: n, or all objectives in a pretraining stage; 0 without a space.

    Raises:
        UserError: `n` exceeds the size of the space.
    """
    if space is None:
        return 0
    if config.n == "all" or isinstance(config.method, PretrainSection):
        return len(space)
    _check_n(config, config.n, len(space))
    return config.n


def check_n(config: RunConfig) -> None:
    """Raise `UserError` for an n that is too large for any task and encoder, without loading either."""
    if config.n == "all" or not config.method.auxiliary or isinstance(config.method, PretrainSection):
        return
    settings = config.objectives
    space = enumerate_space(config.space, read_space(config.space), settings.legality, settings.labels)
    # An objective that was left out may replace another one that the task or the encoder rules out: count both.
    _check_n(config, config.n, len(space) + len(space.left_out))


def _check_n(config: RunConfig, n: int, size: int) -> None:
    if n > size:
        raise UserError(f"n: {n} exceeds the {size} objectives of space {config.space}; use at most that, or all")
