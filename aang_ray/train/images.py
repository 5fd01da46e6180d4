"""Images: each is one row of the body, seen as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aang_ray.config.run import RunConfig
from aang_ray.data import ImageTask, load_task
from aang_ray.data.digits import LabelledImages
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
from aang_ray.train.domain import DomainParts
from aang_ray.train.evaluate import Predictions
from aang_ray.train.plan import check_image_settings, sampled_count, source_settings
from aang_ray.train.workers.placement import Range, parts_of

IMAGES_AT_ONCE = 1024


class ImageDomain:
    """The domain of all tasks whose examples are images."""

    def __init__(self, encoder: nn.Module, source: ImageSource) -> None:
        self._encoder, self.source = encoder, source
        self.head_refit_every = source.settings.head_refit_every
        self.follows_factors = source.settings.published_allocation

    def batch(self, step: int, with_dev: bool, factors: Mapping[str, npt.NDArray[np.float64]] | None) -> ImageBatch:
        return self.source.step(step, with_dev, factors)

    def chosen(self, number: int, end_task: bool, objectives: Sequence[int]) -> ImageBatch:
        return self.source.chosen(number, end_task, objectives)

    def size(self, objective: int) -> int:
        return self.source.schedule.size(objective)

    def costs(self, batch: ImageBatch) -> tuple[Int64, ...]:
        return tuple(segment.lengths_E for segment in batch.segments)

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
        one = next(s for s in batch.segments if s.texts).part(0, 1)
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
    """The images of a split, to be scored many times."""

    def __init__(self, split: LabelledImages) -> None:
        self._labels = split.labels
        self._pixels_N1HW = torch.from_numpy(np.ascontiguousarray(split.pixels_NHW)).unsqueeze(1)

    @torch.no_grad()
    def predict(self, encoder: nn.Module, head: nn.Module, compute: Compute) -> Predictions:
        """Logits of every image, in the split's order; eval mode for the time being."""
        training = encoder.training
        encoder.eval()
        head.eval()
        with compute.autocast():
            parts = [
                head(encoder(part.to(compute.device))).float()
                for part in torch.split(self._pixels_N1HW, IMAGES_AT_ONCE)
            ]
        encoder.train(training)
        head.train(training)
        return Predictions(torch.cat(parts).cpu(), self._labels)


# --- train.image_setup: A run on images: a body that starts at random, heads of the outputs, and the batches of a space over the images.


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
    if file.domain != "images":
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
