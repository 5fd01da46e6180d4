"""Segments of images become one batch.

Shape suffixes: E images, H height, W width, K images that a head reads, S segments, P pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from aang_ray.model.segments import SegmentRows
from aang_ray.objectives.batch import Targets, moved, pinned
from aang_ray.objectives.images.segment import ImageSegment
from aang_ray.objectives.losses import shares


@dataclass(frozen=True)
class ImagePiece:
    """What goes through the model in one forward pass."""

    pixels_E1HW: Tensor
    tokens: SegmentRows
    """Whose image is whose: a row of the body is an image."""
    targets: tuple[Targets, ...]
    """One entry for each head; numbers to be predicted are pixels, [K, P]."""

    @property
    def segments(self) -> int:
        return self.tokens.count

    @property
    def real_tokens(self) -> int:
        """Images: none is padding."""
        return self.tokens.rows

    def to(self, device: torch.device) -> ImagePiece:
        """The same piece on a device."""
        return replace(
            self,
            pixels_E1HW=self.pixels_E1HW.to(device, non_blocking=True),
            targets=tuple(moved(targets, device) for targets in self.targets),
        )

    def pin(self) -> ImagePiece:
        """The same piece in page-locked memory, from which copies to a GPU do not block."""
        return replace(
            self,
            pixels_E1HW=self.pixels_E1HW.pin_memory(),
            targets=tuple(pinned(targets) for targets in self.targets),
        )


def collate_images(segments: Sequence[ImageSegment]) -> ImagePiece:
    """One piece of a batch as tensors in host memory."""
    pixels_EHW = np.concatenate([segment.pixels_EHW for segment in segments])
    return ImagePiece(
        torch.from_numpy(np.ascontiguousarray(pixels_EHW)).unsqueeze(1),
        SegmentRows(_bounds(segment.texts for segment in segments)),
        tuple(_targets(segments)),
    )


def image_losses(body: nn.Module, heads: Mapping[str, nn.Module], piece: ImagePiece) -> Tensor:
    """The unweighted mean loss of every segment of a piece, [S], differentiable.

    Cross-entropy for classes; for pixels the squared error, averaged over them.
    """
    features_EF = body(piece.pixels_E1HW)
    losses_S = torch.zeros(
        piece.segments, device=features_EF.device, dtype=torch.promote_types(features_EF.dtype, torch.float32)
    )
    for targets in piece.targets:
        losses_S = losses_S + shares(heads[targets.head], features_EF, targets, piece.segments)
    return losses_S


def _targets(segments: Sequence[ImageSegment]) -> Iterator[Targets]:
    """What each head has to predict, segment after segment."""
    starts = _bounds(segment.texts for segment in segments)
    for head in dict.fromkeys(segment.head for segment in segments if segment.texts):
        read = [(number, s) for number, s in enumerate(segments) if s.head == head and s.texts]
        counts = [segment.texts if segment.head == head else 0 for segment in segments]
        labels = np.concatenate([_labels(segment) for _, segment in read])
        weights = np.concatenate([segment.weights_E / np.float32(segment.normaliser) for _, segment in read])
        index = np.concatenate([np.arange(starts[number], starts[number + 1]) for number, _ in read])
        yield Targets(
            head=head,
            index_K=torch.from_numpy(index),
            label_K=torch.from_numpy(labels),
            weight_K=torch.from_numpy(weights),
            segment_K=torch.from_numpy(np.repeat(np.arange(len(segments)), counts)),
            rows=SegmentRows(_bounds(counts)),
        )


def _labels(segment: ImageSegment) -> np.ndarray:
    if segment.classes_E is not None:
        return segment.classes_E
    assert segment.clean_EHW is not None
    return segment.clean_EHW.reshape(segment.texts, -1)


def _bounds(counts: Iterator[int] | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(bound) for bound in np.cumsum([0, *counts]))
