"""Invariants of the objectives that need a model: no objective is easier than it may be. (semantics section 8)"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from aang_ray.model.heads import TokenHead
from aang_ray.objectives.batch import collate
from aang_ray.objectives.losses import segment_losses
from aang_ray.objectives.objective import PRIMITIVES, Objective
from aang_ray.objectives.outputs import OutputSettings, build
from aang_ray.objectives.space import enumerate_space, read_space
from aang_ray.objectives.transforms import Vocabulary
from tests.model.families import small_encoder
from tests.objectives.conftest import FIRST, LAST, MASK, PAD, make_texts

ORDINARY = 16
VOCABULARY = Vocabulary(ORDINARY + 4, MASK, (PAD, FIRST, LAST, MASK))
SETTINGS = OutputSettings(0.15, "sound", "mean")
DENOISING = [k for k in enumerate_space("td", read_space("td")).objectives if k.output == "denoise"]


def loss_after_training(objective: Objective, steps: int) -> float:
    """Loss on fresh random tokens after training on fresh random tokens, averaged over 20 batches."""
    torch.manual_seed(0)
    encoder = small_encoder("bert", layers=3, pooling="mean")
    head = TokenHead(encoder.word_embeddings, encoder.hidden_size)
    with torch.no_grad():  # special tokens are never the answer, and a model may know that
        head.decoder.bias[:4] = -20.0
        head.decoder.bias[ORDINARY + 4 :] = -20.0
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    losses = []
    for step in range(steps + 20):
        texts = make_texts([14] * 24, seed=1000 + step, vocabulary=ORDINARY + 4)
        piece = collate([build(objective, "h", texts, None, VOCABULARY, SETTINGS)], PAD)
        loss = segment_losses(encoder, nn.ModuleDict({"h": head}), piece)[0]
        if step < steps:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            losses.append(float(loss.detach()))
    return float(np.mean(losses))


@pytest.mark.parametrize("objective", DENOISING, ids=lambda k: f"{k.transform}-{k.representation}")
def test_on_random_tokens_nothing_beats_ln_v(objective: Objective) -> None:
    # BERT-op leaves 10 % of the selected tokens as they are and replaces 10 %: what is seen at a position
    # that is not masked is the answer in about half of the cases, and a bidirectional or own-position view
    # may use that. Its floor: 0.8 ln V for the masked, and for the rest (half kept, half uniform) the
    # entropy of "the visible token with probability 1/2 + 1/(2V), else uniform over the others".
    floor = math.log(ORDINARY)
    if objective.transform == "bert-op":
        same = 0.5 + 0.5 / ORDINARY
        rest = -same * math.log(same) - (1 - same) * math.log((1 - same) / (ORDINARY - 1))
        floor = 0.8 * floor + 0.2 * rest
    assert loss_after_training(objective, 40) > floor - 0.03


def test_a_copy_task_would_be_caught() -> None:
    """The published no-op, bidirectional denoising is learned far below ln V: the test above can fail."""
    copying = Objective("end-task", "no-op", "bidirectional", "denoise")
    assert loss_after_training(copying, 60) < 0.8 * math.log(ORDINARY)


def test_every_primitive_of_td_is_covered() -> None:
    assert {k.transform for k in DENOISING} == set(PRIMITIVES["transform"])
    assert {k.representation for k in DENOISING} == set(PRIMITIVES["representation"])
