"""A run on images: a body that starts at random, heads of the outputs, and the batches of a space over the images."""

from __future__ import annotations

import torch
from torch import nn

from aang_ray.config.run import RunConfig
from aang_ray.data import ImageTask, load_task
from aang_ray.errors import UserError
from aang_ray.model.heads import ClassificationHead
from aang_ray.model.lenet import LeNet
from aang_ray.objectives.images.outputs import TURNS
from aang_ray.objectives.images.source import ImageSource
from aang_ray.objectives.source import END_TASK_HEAD, head_name
from aang_ray.objectives.space import ImageSpaceFile, Space, enumerate_space, read_space
from aang_ray.train.batches import sampled_count, source_settings
from aang_ray.train.domain import DomainParts
from aang_ray.train.image_settings import check_image_settings
from aang_ray.train.images import ImageDomain


def image_parts(config: RunConfig, device: torch.device) -> DomainParts:
    """Make the images, the body and the heads.

    Raises:
        UserError: for settings or a space that will not do.
    """
    check_image_settings(config)
    task = load_task(config.data, config.encoder)
    assert isinstance(task, ImageTask)
    encoder = LeNet(task.height, task.width).to(device)

    def stage(config: RunConfig) -> tuple[Space | None, ImageDomain]:
        space = make_image_space(config) if config.method.auxiliary else None
        source = ImageSource(task, space, sampled_count(config, space), source_settings(config))
        return space, ImageDomain(encoder, source)

    space, domain = stage(config)
    return DomainParts(task, encoder, make_image_heads(config, task, encoder, space), space, domain, stage)


def make_image_space(config: RunConfig) -> Space:
    """The legal objectives of the space.

    Raises:
        UserError: for a space of objectives on text.
    """
    file = read_space(config.space)
    if not isinstance(file, ImageSpaceFile):
        raise UserError(f"space: {config.space} holds objectives on text; for {config.data.task} use digits")
    return enumerate_space(config.space, file, config.objectives.legality)


def make_image_heads(config: RunConfig, task: ImageTask, encoder: LeNet, space: Space | None) -> dict[str, nn.Module]:
    """phi_E and the heads of the outputs, by name: pixels by a linear layer, classes as on text."""
    classes = {"other-digit": len(task.label_names), "end-task": len(task.label_names), "rotation": TURNS}
    width, dropout = encoder.hidden_size, config.encoder.head_dropout
    heads: dict[str, nn.Module] = {END_TASK_HEAD: ClassificationHead(width, len(task.label_names), dropout)}
    for objective in space.objectives if space is not None else ():
        name = head_name(objective, config.objectives.heads == "per_objective")
        if name in heads:
            continue
        if objective.output == "denoise":
            heads[name] = nn.Linear(width, task.height * task.width)
        else:
            heads[name] = ClassificationHead(width, classes[objective.output], dropout)
    return heads
