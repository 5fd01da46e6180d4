"""All transforms and outputs in one packed batch: the single pass and the loop agree, in every family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from aang_ray.data.tasks import Ragged
from aang_ray.gradients import make_engine
from aang_ray.gradients.engine import Request, StepGradients
from aang_ray.model.encoder import Encoder
from aang_ray.model.heads import ClassificationHead, TokenHead
from aang_ray.objectives.batch import collate, cut
from aang_ray.objectives.losses import segment_losses
from aang_ray.objectives.packing import Segment
from aang_ray.objectives.primitives import BUILT_IN
from aang_ray.objectives.texts import Texts, Vocabulary
from tests.model.families import FAMILIES, small_encoder
from tests.objectives.cells import cell
from tests.objectives.conftest import FIRST, LAST, MASK, PAD, make_texts

VOCABULARY = Vocabulary(50, MASK, (PAD, FIRST, LAST, MASK))
CELLS = (
    ("no-op", "bidirectional", "end-task"),
    ("mask", "right-to-left", "denoise"),
    ("noised-embeddings", "bidirectional", "denoise"),
    ("deletion", "random-factorized", "denoise"),
    ("span-mask", "left-to-right", "next-token"),
    ("replace", "bidirectional", "real-synthetic"),
    ("replace", "right-to-left", "real-synthetic"),
    ("bert-op", "random-factorized", "tf-idf"),
    ("noised-embeddings", "left-to-right", "tf"),
    ("deletion", "bidirectional", "capitalisation"),
    ("span-mask", "random-factorized", "supervised"),
)


def texts(seed: int) -> Texts:
    made = make_texts([9, 14, 5], seed)
    return Texts(made.ids_T, made.lengths_E, made.keys_E, made.ids_T % 3 == 0)


def segments(width: int) -> list[Segment]:
    made = []
    for seed, (transform, representation, output) in enumerate(CELLS):
        read = texts(seed)
        fit = BUILT_IN.outputs[output].fit
        known = None if fit is None else fit(Ragged(read.ids_T, np.array([0, 9, 23, 28])), VOCABULARY)
        data = "external:x" if output == "supervised" else "end-task"
        made.append(
            cell(
                transform, representation, output, read, VOCABULARY, fitted=known, data=data, deviation=0.2, width=width
            )
        )
    return made


def gradients(
    engine: Literal["segments", "loop"], family: str, batch: Sequence[Segment]
) -> tuple[StepGradients, torch.Tensor]:
    encoder = small_encoder(family, layers=2, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = nn.ModuleDict({name: _head(name, encoder) for name in dict.fromkeys(s.head for s in batch)}).double()
    made = make_engine(engine, encoder, heads, tied_in_scores=True)
    pieces = [collate(part, PAD) for part in cut(batch, None, made.per_segment)]
    request = Request(torch.linspace(0.0, 1.0, len(batch), dtype=torch.float64), scores=True, joint_from=2)
    found = made(pieces, lambda piece: segment_losses(encoder, dict(heads.items()), piece), request)
    parameters = [*encoder.parameters(), *heads.parameters()]
    return found, torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


def _head(name: str, encoder: Encoder) -> nn.Module:
    kind, size = BUILT_IN.outputs[name].head.kind, BUILT_IN.outputs[name].head.size
    if kind == "vocabulary":
        return TokenHead(encoder.word_embeddings, encoder.hidden_size)
    return ClassificationHead(encoder.hidden_size, size or 2, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_pass_and_loop_agree(family: str) -> None:
    batch = segments(width=16 if family == "electra" else 32)
    one, one_update = gradients("segments", family, batch)
    loop, loop_update = gradients("loop", family, batch)
    assert (one.losses_S > 0).all()
    torch.testing.assert_close(one.losses_S, loop.losses_S)
    torch.testing.assert_close(one.dots_S, loop.dots_S)
    torch.testing.assert_close(one.norms2_S, loop.norms2_S)
    torch.testing.assert_close(one.joint_norm2, loop.joint_norm2)
    torch.testing.assert_close(one_update, loop_update)
