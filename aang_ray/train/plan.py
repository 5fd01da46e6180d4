"""Resolve a configuration, whose hash names the run: fill in values that depend on the task and the encoder."""

from __future__ import annotations

import math
from typing import Any

from aang_ray.config.methods import (
    STEPS,
    AangConfig,
    HalvingConfig,
    PooledConfig,
    RoundsSection,
    StagesSection,
    StaticConfig,
    WeightsConfig,
)
from aang_ray.config.run import RunConfig
from aang_ray.data import card_of, load_end_task, task_fingerprint
from aang_ray.data.random_encoder import locate_encoder
from aang_ray.data.tokens import reads_token_types
from aang_ray.errors import UserError
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.sampling import SourceSettings
from aang_ray.objectives.space import TEXT, Capabilities, Space, enumerate_space, read_space, unavailable
from aang_ray.train.domain import check_domain, domain_of
from aang_ray.train.found_weights import found_weights

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
    sets = len(config.data.external)
    if isinstance(method, PooledConfig) and not 0 < sets <= method.batch:
        raise UserError(
            f"method pooled: data.external lists {sets} other labelled sets; list at least one, and at most "
            f"method.batch, {method.batch}"
        )
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
    if config.data.text_b is not None and reads_token_types(locate_encoder(config.data, config.encoder)):
        fingerprints["token_types"] = "tokenizer"
    resolved = config.changed(
        batch=config.batch.changed(**batch),
        data=config.data.changed(metric=metric),
        fingerprints=config.fingerprints.changed(**fingerprints),
    )
    if isinstance(method, StaticConfig) and method.weights is not None:
        resolved = _with_weights(resolved, method, method.weights)
    _check_batch(resolved)
    if isinstance(method, HalvingConfig):
        count = len(_found(resolved))
        if not count:
            raise UserError(f"space {config.space} has no objective to search among")
        resolved = resolved.changed(method=method.changed(candidates=count))
    if isinstance(method, StagesSection):
        resolved = resolved.changed(method=with_steps(resolved, method))
    if resolved.schedule.steps is not None:
        return resolved
    # Epochs over train and in-domain examples at the auxiliary batch size, for every method: so all methods see equally
    # many end-task examples (Dery et al. 2023, appendix D).
    examples = config.schedule.epochs * domain_of(config.data).examples(config)
    return resolved.changed(schedule=config.schedule.changed(steps=math.ceil(examples / batch["auxiliary"])))


def _with_weights(config: RunConfig, method: StaticConfig, weights: WeightsConfig) -> RunConfig:
    """Replace a store and a row by the weights that were found there. Then n is at most the number that is kept.

    Raises:
        UserError: There are no such runs, or the space lacks one of the objectives.
    """
    settings, given = config.objectives, weights.objectives is not None
    if not given:
        weights = found_weights(config, weights)
    kept = weights.objectives or {}
    enumerate_space(config.space, read_space(config.space), settings.legality, settings.labels).only(kept)
    n = config.n if given or config.n == "all" else min(config.n, len(kept))
    return config.changed(n=n, method=method.changed(weights=weights))


def weighted(config: RunConfig, space: Space) -> Space:
    """Return the space without the objectives that `method.weights` gives no weight, if it gives any."""
    weights = config.method.weights if isinstance(config.method, StaticConfig) else None
    return space if weights is None or weights.objectives is None else space.only(weights.objectives)


def with_steps(config: RunConfig, method: StagesSection) -> StagesSection:
    """Return the method with a number of steps for every stage before fine-tuning, by default those of its epochs.

    Raises:
        UserError: For a stage on in-domain text if there is none.
    """
    missing = [text for text in method.texts if method.steps_of(text) is None]
    if not missing:
        return method
    task = load_end_task(config.data, config.encoder)
    sizes = {
        "end-task": len(task.train),
        "in-domain": len(task.corpora.get("in_domain", ())),
        "external": sum(len(other.train) for other in task.external.values()),
    }
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
        end_task=0 if isinstance(config.method, StagesSection) else batch.end_task,
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
    if isinstance(config.method, StagesSection):
        return len(space)
    n = len(space) if config.n == "all" else config.n
    _check_n(config, n, len(space))
    _check_share(config, n)
    return n


def check_n(config: RunConfig) -> None:
    """Raise `UserError` for an n that is too large for any task and encoder, without loading either."""
    if config.n == "all" or not config.method.auxiliary:
        return
    settings = config.objectives
    space = enumerate_space(config.space, read_space(config.space), settings.legality, settings.labels)
    # An objective that was left out may replace another one that the task or the encoder rules out: count both.
    _check_n(config, config.n, len(space) + len(space.left_out))


def _check_batch(config: RunConfig) -> None:
    """Refuse more objectives in a step than it has auxiliary examples, as far as it is known before the encoder is."""
    if not config.method.auxiliary:
        return
    if config.n != "all":
        check_n(config)
        _check_share(config, config.n)
        return
    _check_share(config, len(_found(config)))


def _found(config: RunConfig) -> tuple[Objective, ...]:
    """Return the objectives of the space that any encoder can compute, as far as it is known before it is loaded."""
    settings, file = config.objectives, read_space(config.space)
    found = weighted(config, enumerate_space(config.space, file, settings.legality, settings.labels)).objectives
    if file.domain == TEXT:
        data = frozenset(objective.data for objective in found)
        least = Capabilities(False, data, settings.visibility == "sound", settings.heads == "shared")
        found = tuple(k for k in found if unavailable(k, least, settings.labels) is None)
    return found


def _check_share(config: RunConfig, n: int) -> None:
    """Refuse a step whose equal shares of the auxiliary batch leave some of its n objectives without an example."""
    # Published allocation rounds every share up, and methods of rounds give every task a batch of its own.
    exempt = config.objectives.allocation == "published" or isinstance(config.method, RoundsSection)
    examples = config.batch.auxiliary or PAPER_AUXILIARY
    if n > examples and not exempt:
        named = f"{config.n} ({n} objectives)" if config.n == "all" else str(n)
        raise UserError(
            f"n: {named} exceeds batch.auxiliary, {examples}: each objective of a step needs an example; "
            "lower n or raise batch.auxiliary"
        )


def _check_n(config: RunConfig, n: int, size: int) -> None:
    if n > size:
        raise UserError(f"n: {n} exceeds the {size} objectives of space {config.space}; use at most that, or all")
