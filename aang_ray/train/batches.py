"""What a configuration says about a step's batch, whatever the examples are."""

from __future__ import annotations

from aang_ray.config.methods import AangConfig, PretrainSection
from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.objectives.readings import SourceSettings
from aang_ray.objectives.space import Space, enumerate_space, read_space


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
