"""Images: each is one row of the body, seen as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from aang_ray.data.images import LabelledImages
from aang_ray.objectives.batch import cut
from aang_ray.objectives.images.batch import ImagePiece, collate_images, image_losses
from aang_ray.objectives.images.segment import ImageSegment, Int64
from aang_ray.objectives.images.source import ImageBatch, ImageSource
from aang_ray.objectives.readings import NOTHING
from aang_ray.train.evaluate import Predictions
from aang_ray.train.parallel.placement import Range, parts_of
from aang_ray.train.precision import Compute

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
        return self.source.readings.size(objective)

    def costs(self, batch: ImageBatch) -> tuple[Int64, ...]:
        return tuple(segment.lengths_E for segment in batch.segments)

    def pieces(
        self, batch: ImageBatch, micro: int, per_segment: bool, ranges: Sequence[Range] | None = None
    ) -> tuple[ImagePiece, ...]:
        segments = batch.segments if ranges is None else parts_of(batch.segments, ranges)
        return tuple(collate_images(part) for part in cut(segments, micro, per_segment))

    def entries_read(self, batch: ImageBatch, ranges: Sequence[Range]) -> Int64:
        return NOTHING  # no table is used as a decoder

    def label_weights(self, segments: Sequence[ImageSegment]) -> tuple[float, ...]:
        return tuple(float(segment.weights_E.sum()) for segment in segments)

    def probe(self, batch: ImageBatch, examples: int) -> ImagePiece:
        one = next(s for s in batch.segments if s.texts).part(0, 1)
        return collate_images([one] * examples)

    def dev_head_piece(self, step: int) -> ImagePiece:
        return collate_images([self.source.dev_head_examples(step)])

    def end_task_pieces(self, split: str, examples: Int64, micro: int) -> tuple[ImagePiece, ...]:
        labelled = self.source.labelled("train" if split == "train" else "dev", examples)
        return tuple(collate_images(part) for part in cut([labelled], micro, per_segment=False))

    def losses(self, piece: ImagePiece, heads: Mapping[str, nn.Module]) -> Tensor:
        return image_losses(self._encoder, heads, piece)

    def features(self, piece: ImagePiece) -> tuple[Tensor, Tensor]:
        features_EF: Tensor = self._encoder(piece.pixels_E1HW)
        return features_EF, piece.targets[0].label_K

    def reader(self, split: str, first: int = 0, every: int = 1) -> ImageReader:
        source = self.source
        if split == "dev":
            return ImageReader(source.dev.take(source.readings.score_dev[first::every]))
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
