"""Everything that a run computes with, built from its configuration."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import nn

from aang_ray.config.run import RunConfig
from aang_ray.data import is_image_task
from aang_ray.errors import UserError
from aang_ray.methods.base import Method
from aang_ray.methods.registry import make_method
from aang_ray.objectives.space import Space
from aang_ray.train.device import Compute
from aang_ray.train.domain import Domain, StageParts, Task
from aang_ray.train.images import image_parts
from aang_ray.train.text import text_parts
from aang_ray.train.workers.group import Workers


@dataclass
class Setup:
    """The parts of one run."""

    config: RunConfig
    compute: Compute
    task: Task
    encoder: nn.Module
    heads: nn.ModuleDict
    """Heads by number; `head_of` finds them by name (module names admit no dots or slashes)."""
    head_of: dict[str, nn.Module]
    space: Space | None
    domain: Domain
    method: Method
    stage: StageParts
    workers: Workers = field(default_factory=Workers.alone)

    @property
    def classes(self) -> int:
        return len(self.task.label_names)


def build(config: RunConfig, compute: Compute, workers: Workers | None = None) -> Setup:
    """Load the task and the encoder, make heads and method; the kind of task decides how.

    Raises:
        UserError: for data, an encoder or a space that will not do.
    """
    torch.manual_seed(config.seed)
    parts_of = image_parts if is_image_task(config.data) else text_parts
    parts = parts_of(config, compute.device)
    task, head_of, space = parts.task, parts.head_of, parts.space
    heads = nn.ModuleDict({str(number): head for number, head in enumerate(head_of.values())}).to(compute.device)
    method = make_method(config, space, compute.device)
    if method.uses_dev and len(task.dev) < 2:
        raise UserError(f"{task.name}: dev has {len(task.dev)} example; dev head and dev gradient need one each")
    return Setup(
        config,
        compute,
        task,
        parts.encoder,
        heads,
        head_of,
        space,
        parts.domain,
        method,
        parts.stage,
        workers or Workers.alone(),
    )


def majority_class(task: Task) -> int:
    """The most frequent class of train; of ties the first."""
    counts = Counter(int(label) for label in task.train.labels)
    return min(counts, key=lambda label: (-counts[label], label))
