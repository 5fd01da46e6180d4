"""The domain of images. An image is one row in the body, and the body starts from random parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from aang_ray.config.methods import StagesSection
from aang_ray.config.run import RunConfig
from aang_ray.data import ImageTask, load_task
from aang_ray.data.digits import IMAGES, LabelledImages
from aang_ray.errors import UserError
from aang_ray.model.heads import ClassificationHead
from aang_ray.model.lenet import LeNet
from aang_ray.objectives.batch import cut
from aang_ray.objectives.images import (
    TURNS,
    ImageBatch,
    ImagePiece,
    ImageSegment,
    ImageSource,
    collate_images,
    image_losses,
)
from aang_ray.objectives.sampling import NO_EXAMPLES
from aang_ray.objectives.source import END_TASK_HEAD, head_name
from aang_ray.objectives.space import Space, enumerate_space, read_space
from aang_ray.objectives.texts import Int64
from aang_ray.train.device import Compute
from aang_ray.train.domain import Domain, DomainKind, DomainParts
from aang_ray.train.evaluate import Predictions, predicting
from aang_ray.train.plan import sampled_count, source_settings, weighted
from aang_ray.train.workers.placement import Range, parts_of

LENET: Final = "lenet"
"""The value of `encoder.name` for the body of images."""
FINGERPRINT: Final = "lenet:1"
"""Fingerprint of the body and its initialisation; increase the number when `model/lenet.py` changes."""
USED_SETTINGS: Final = {
    "data": {"task", "metric", "train_size", "class_weights", "split_seed", "dev_fraction", "test_fraction"},
    "encoder": {"name", "head_dropout"},
    "objectives": {"legality", "allocation", "heads"},
    "gradients": {"engine", "local_distances"},
}
"""The settings of these sections that apply to images; all others apply to text only."""
IMAGES_AT_ONCE: Final = 1024
"""Images in a forward pass without gradients."""


class ImageDomain(Domain):
    """The domain of end tasks whose examples are images."""

    source: ImageSource

    def __init__(self, encoder: nn.Module, source: ImageSource) -> None:
        super().__init__(source, source.settings)
        self._encoder = encoder

    def pieces(
        self, batch: ImageBatch, micro: int, per_segment: bool, ranges: Sequence[Range] | None = None
    ) -> tuple[ImagePiece, ...]:
        segments = batch.segments if ranges is None else parts_of(batch.segments, ranges)
        return tuple(collate_images(part) for part in cut(segments, micro, per_segment))

    def entries_read(self, batch: ImageBatch, ranges: Sequence[Range]) -> Int64:
        return NO_EXAMPLES  # no table is used as a decoder

    def label_weights(self, segments: Sequence[ImageSegment]) -> tuple[float, ...]:
        return tuple(float(segment.weights_E.sum()) for segment in segments)

    def probe(self, batch: ImageBatch, examples: int) -> ImagePiece:
        one = next(s for s in batch.segments if s.examples).part(0, 1)
        return collate_images([one] * examples)

    def dev_head_piece(self, step: int) -> ImagePiece:
        return collate_images([self.source.dev_head_examples(step)])

    def end_task_pieces(self, split: str, examples: Int64, micro: int) -> tuple[ImagePiece, ...]:
        labelled = self.source.labelled(split, END_TASK_HEAD, "train" if split == "train" else "dev", examples)
        return tuple(collate_images(part) for part in cut([labelled], micro, per_segment=False))

    def losses(self, piece: ImagePiece, heads: Mapping[str, nn.Module]) -> Tensor:
        return image_losses(self._encoder, heads, piece)

    def features(self, piece: ImagePiece) -> tuple[Tensor, Tensor]:
        features_EF: Tensor = self._encoder(piece.pixels_E1HW)
        return features_EF, piece.targets[0].label_K

    def reader(self, split: str, first: int = 0, every: int = 1) -> ImageReader:
        source = self.source
        if split == "dev":
            return ImageReader(source.dev.take(source.schedule.score_dev[first::every]))
        return ImageReader(source.test.take(np.arange(first, len(source.test), every)))


class ImageReader:
    """The images of a split, for repeated evaluation."""

    def __init__(self, split: LabelledImages) -> None:
        self._labels = split.labels
        self._pixels_N1HW = torch.from_numpy(np.ascontiguousarray(split.pixels_NHW)).unsqueeze(1)

    def predict(self, encoder: nn.Module, head: nn.Module, compute: Compute) -> Predictions:
        with predicting(encoder, head, compute):
            parts = [
                head(encoder(part.to(compute.device))).float()
                for part in torch.split(self._pixels_N1HW, IMAGES_AT_ONCE)
            ]
            return Predictions(torch.cat(parts).cpu(), self._labels)


def check_image_settings(config: RunConfig) -> None:
    """Refuse settings that do not apply to images: they would change the name of a cell but not its result."""
    if config.encoder.name != LENET:
        raise UserError(f"encoder.name: {config.data.task} is a task of images; its encoder is {LENET}")
    if isinstance(config.method, StagesSection):
        raise UserError(f"method.name: {config.method.name} pretrains on text; {config.data.task} is a task of images")
    plain = type(config)()
    for section, used in USED_SETTINGS.items():
        given, default = getattr(config, section), getattr(plain, section)
        for name in type(given).model_fields:
            if name not in used and getattr(given, name) != getattr(default, name):
                raise UserError(f"{section}.{name}: means nothing for {config.data.task}, a task of images")


def build_image_run(config: RunConfig, device: torch.device) -> DomainParts:
    """Load the images and make a body with random parameters, its heads, the space and the domain."""
    check_image_settings(config)
    task = load_task(config.data, config.encoder)
    assert isinstance(task, ImageTask)
    encoder = LeNet(task.height, task.width).to(device)

    def stage(config: RunConfig) -> tuple[Space | None, ImageDomain]:
        space = make_image_space(config, task) if config.method.auxiliary else None
        source = ImageSource(task, space, sampled_count(config, space), source_settings(config))
        return space, ImageDomain(encoder, source)

    space, domain = stage(config)
    return DomainParts(task, encoder, make_image_heads(config, task, encoder, space), space, domain, stage)


def make_image_space(config: RunConfig, task: ImageTask) -> Space:
    """Return the legal objectives of the configured space."""
    file = read_space(config.space)
    if file.domain != IMAGES:
        raise UserError(f"space: {config.space} holds objectives on {file.domain}; for {config.data.task} use digits")
    if any("in-domain" in block.data for block in file.blocks) and not len(task.unlabelled):
        raise UserError(f"space {config.space}: all images have labels, none is left as in-domain; set data.train_size")
    return weighted(config, enumerate_space(config.space, file, config.objectives.legality))


def make_image_heads(config: RunConfig, task: ImageTask, encoder: LeNet, space: Space | None) -> dict[str, nn.Module]:
    """Return phi_E and the heads of the outputs, by name; outputs of pixels have a linear head."""
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


DOMAIN = DomainKind(
    build=build_image_run,
    check=check_image_settings,
    encoder_fingerprint=lambda config: FINGERPRINT,
    examples=lambda config: len(load_task(config.data, config.encoder).train),
    encoders=frozenset({LENET}),
)
