"""Fill in what a configuration leaves to the task: then its hash names the run."""

from __future__ import annotations

import math
from typing import Any, Final

from aang_ray.config.methods import STEPS, AangConfig, PretrainSection
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
from aang_ray.objectives.sampling import SourceSettings
from aang_ray.objectives.space import Space, enumerate_space, read_space

# --- train.image_settings: What a configuration may say for a task of images.


LENET: Final = "lenet"
"""The value of `encoder.name` that stands for the body of images."""
FINGERPRINT: Final = "lenet:1"
"""Of the body and how it starts: to be raised when `model/lenet.py` changes."""
_USED: Final = {
    "data": {"task", "metric", "train_size", "class_weights", "split_seed", "dev_fraction", "test_fraction"},
    "encoder": {"name", "head_dropout"},
    "objectives": {"legality", "allocation", "heads"},
    "gradients": {"engine", "local_distances"},
}
"""Settings of these sections that mean something for images; all others belong to text."""


def check_image_settings(config: RunConfig) -> None:
    """Refuse what means nothing for images, rather than let it change the name of a cell and not its result.

    Raises:
        UserError: for a setting of text that is away from its default, a masked-LM method, or another encoder.
    """
    if config.encoder.name != LENET:
        raise UserError(f"encoder.name: {config.data.task} is a task of images; its encoder is {LENET}")
    if isinstance(config.method, PretrainSection):
        raise UserError(f"method.name: {config.method.name} pretrains on text; {config.data.task} is a task of images")
    plain = type(config)()
    for section, used in _USED.items():
        given, default = getattr(config, section), getattr(plain, section)
        for name in type(given).model_fields:
            if name not in used and getattr(given, name) != getattr(default, name):
                raise UserError(f"{section}.{name}: means nothing for {config.data.task}, a task of images")


PAPER_END_TASK, PAPER_AUXILIARY, PAPER_DEV_HEAD = 128, 256, 32
"""Batch sizes of Dery et al. 2023, Tables 4 and 5, where no card says otherwise."""


def resolve(config: RunConfig) -> RunConfig:
    """The same run with the card's metric and batch sizes, the number of steps, and fingerprints of its inputs.

    Raises:
        UserError: if the task, the encoder or the space is not there, or something could not be logged.
    """
    if config.gradients.local_distances and not (config.method.auxiliary and config.method.logs_weights):
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


# --- train.batches: What a configuration says about a step's batch, whatever the examples are.


def source_settings(config: RunConfig) -> SourceSettings:
    """Sizes and switches of the batches of a resolved configuration."""
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
    """How many objectives a step samples: n, or all of a pretraining stage's.

    Raises:
        UserError: if n exceeds the size of the space.
    """
    if space is None:
        return 0
    if config.n == "all" or isinstance(config.method, PretrainSection):
        return len(space)
    _check_n(config, config.n, len(space))
    return config.n


def check_n(config: RunConfig) -> None:
    """Refuse an n that the space is too small for whatever the task and the encoder are, before either is read.

    Raises:
        UserError: if so.
    """
    if config.n == "all" or not config.method.auxiliary or isinstance(config.method, PretrainSection):
        return
    settings = config.objectives
    space = enumerate_space(config.space, read_space(config.space), settings.legality, settings.labels)
    # What is left out here is so for the sake of others, which a task or an encoder may rule out instead.
    _check_n(config, config.n, len(space) + len(space.left_out))


def _check_n(config: RunConfig, n: int, size: int) -> None:
    if n > size:
        raise UserError(f"n: {n} exceeds the {size} objectives of space {config.space}; use at most that, or all")
