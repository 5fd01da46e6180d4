"""`visibility: published`: the matrices, the rows that they apply to, and their effect in an encoder.

(docs/semantics.md, section 2.5)
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from aang_ray.model.attention import TokenInputs
from aang_ray.model.encoder import Encoder
from aang_ray.objectives.batch import BatchPiece, PublishedVisibility, collate
from aang_ray.objectives.packing import Segment
from aang_ray.objectives.source import plain
from aang_ray.objectives.texts import Vocabulary
from aang_ray.objectives.visibility import published_matrix
from tests.model.families import VOCAB, small_encoder
from tests.objectives.cells import cell
from tests.objectives.conftest import MASK, PAD, make_texts

SEED, STEP, WIDTH = 3, 5, 9
SEEN = 0.6


def segment(representation: str, lengths: list[int], seed: int = 0) -> Segment:
    vocabulary = Vocabulary(VOCAB, MASK, (0, 1, 2, 3))
    return cell("mask", representation, "denoise", make_texts(lengths, seed, VOCAB), vocabulary)


def end_task(lengths: list[int]) -> Segment:
    return plain("end-task", "end-task", make_texts(lengths, 7, VOCAB), np.zeros(len(lengths), dtype=np.int64))


def published(*segments: Segment) -> BatchPiece:
    return collate(segments, PAD, published=PublishedVisibility(SEED, STEP, WIDTH))


def test_bidirectional_sees_everything_and_the_causal_ones_are_triangular() -> None:
    assert published_matrix("bidirectional", 3, SEED, STEP).tolist() == [[True] * 3] * 3
    assert published_matrix("left-to-right", 3, SEED, STEP).tolist() == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]
    assert published_matrix("right-to-left", 3, SEED, STEP).tolist() == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
    ]


def test_random_factorized_is_bernoulli_without_the_diagonal() -> None:
    """200 * 199 entries of probability 0.6: the share of ones has deviation sqrt(0.24 / 39800) = 0.0025."""
    matrix = published_matrix("random-factorized", 200, SEED, STEP)
    entries = 200 * 199
    assert not matrix.diagonal().any()
    assert abs(matrix.sum() / entries - SEEN) < 5 * math.sqrt(SEEN * (1 - SEEN) / entries)
    # Independent entries: both (i, j) and (j, i) are seen with probability 0.36, of 19900 pairs.
    both = (matrix & matrix.T).sum() / entries
    assert abs(both - SEEN**2) < 5 * math.sqrt(SEEN**2 * (1 - SEEN**2) / (entries / 2))
    assert (matrix == published_matrix("random-factorized", 200, SEED, STEP)).all()
    for other in (
        published_matrix("random-factorized", 200, SEED, 6),
        published_matrix("random-factorized", 200, 4, 5),
    ):
        agree = (matrix == other).mean()
        assert agree < 0.6, "two independent draws agree in 0.52 of the entries, and on the diagonal"


def test_one_matrix_is_every_texts_of_the_batch() -> None:
    piece = published(segment("random-factorized", [9, 6, 4]), end_task([5]), segment("random-factorized", [8], seed=1))
    visible_RLL = piece.inputs.visibility_RLL().numpy()
    matrix = published_matrix("random-factorized", WIDTH, SEED, STEP)
    for row in (0, 1, 2, 4):
        assert (visible_RLL[row] == matrix).all()
    # A text that is cut into another piece keeps it.
    (alone,) = published(segment("random-factorized", [9, 6, 4]).part(2, 3)).inputs.visibility_RLL().numpy()
    assert (alone == matrix).all()


def test_the_end_task_keeps_the_sound_matrix() -> None:
    """The end task has no representation: its 5 tokens see each other, and none of the 4 padding places."""
    piece = published(segment("bidirectional", [9]), end_task([5]))
    visible_LL = piece.inputs.visibility_RLL()[1]
    assert visible_LL[:5, :5].all()
    assert not visible_LL[:5, 5:].any()


def hidden(encoder: Encoder, inputs: TokenInputs, column: int | None = None) -> Tensor:
    """Hidden states of the first row, [L, H], after one of its tokens, or none, is changed."""
    ids_RL = inputs.ids_RL.clone()
    if column is not None:
        ids_RL[0, column] = (ids_RL[0, column] + 11) % (VOCAB - 5) + 5
    with torch.no_grad():
        return encoder(replace(inputs, ids_RL=ids_RL))[0]


@pytest.mark.parametrize("representation", ["bidirectional", "left-to-right", "right-to-left", "random-factorized"])
def test_the_matrix_is_applied_to_query_rows(representation: str) -> None:
    """Through one layer a token changes its own output and those of the rows i that see it: [i, j], not [j, i]."""
    encoder = small_encoder("bert", layers=1, dtype=torch.float64).eval()
    inputs = published(segment(representation, [WIDTH])).inputs
    before_LH = hidden(encoder, inputs)
    changed = [(hidden(encoder, inputs, j) - before_LH).abs().amax(1).numpy() > 1e-9 for j in range(WIDTH)]
    expected = published_matrix(representation, WIDTH, SEED, STEP) | np.eye(WIDTH, dtype=bool)
    assert (np.stack(changed, axis=1) == expected).all()


@pytest.mark.parametrize("representation", ["bidirectional", "random-factorized"])
def test_padding_is_seen_as_published_and_never_in_sound_visibility(representation: str) -> None:
    """A text of 5 tokens in a row of 9: place 7 is padding."""
    encoder = small_encoder("bert", layers=2, dtype=torch.float64).eval()
    text = segment(representation, [5])
    for piece, seen in ((published(text), True), (collate([text], PAD), False)):
        difference_LH = hidden(encoder, piece.inputs, column=7) - hidden(encoder, piece.inputs)
        assert bool((difference_LH[:5].abs().amax(1) > 1e-9).all()) == seen
        assert bool((difference_LH[:5] == 0).all()) != seen
