"""Replaced-token detection: the input of the generator, its samples, and the labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aang_ray.model.heads import TokenHead
from aang_ray.objectives.batch import BatchPiece, Replacements, collate
from aang_ray.objectives.losses import draw, segment_losses, with_replacements
from aang_ray.objectives.texts import Vocabulary
from tests.model.families import small_encoder
from tests.objectives.cells import cell
from tests.objectives.conftest import FIRST, LAST, MASK, PAD, make_texts

SPECIAL = (PAD, FIRST, LAST, MASK)


def piece(vocabulary: Vocabulary, lengths: list[int], rate: float = 0.15) -> BatchPiece:
    """A piece of three segments; the middle one has replacements."""
    texts = make_texts(lengths)
    other = cell("mask", "bidirectional", "denoise", make_texts([9, 5], seed=3), vocabulary)
    wanted = cell("replace", "left-to-right", "real-synthetic", texts, vocabulary, rate=rate)
    return collate([other, wanted, other], PAD)


class Fixed(nn.Module):
    """A denoise head that ignores its input."""

    def __init__(self, logits_V: Tensor) -> None:
        super().__init__()
        self.logits_V = logits_V

    def forward(self, hidden_MH: Tensor) -> Tensor:
        return self.logits_V.expand(len(hidden_MH), -1)


def test_the_generator_reads_masks_where_the_samples_go(vocabulary: Vocabulary) -> None:
    made = piece(vocabulary, [30, 12, 20])
    wanted = made.replacements
    assert wanted is not None
    assert (wanted.inputs.ids_RL.flatten()[wanted.index_G] == MASK).all()
    # Apart from the masks it reads the same texts, and sees all of each.
    masked = wanted.inputs.ids_RL.flatten().clone()
    masked[wanted.index_G] = made.inputs.ids_RL.flatten()[wanted.place_G]
    texts = make_texts([30, 12, 20])
    assert sorted(masked[masked != PAD].tolist()) == sorted(texts.ids_T.tolist())
    assert (wanted.inputs.ranks_RL == 0).all()
    # Until they are drawn the originals stand there.
    assert len(wanted.place_G) == pytest.approx(0.15 * 56, abs=3)


def test_samples_follow_the_predicted_distribution(vocabulary: Vocabulary) -> None:
    probabilities = torch.zeros(vocabulary.size).scatter(0, torch.tensor([5, 6, 7]), torch.tensor([0.2, 0.3, 0.5]))
    made = piece(vocabulary, [200] * 60, rate=0.9).replacements
    assert made is not None
    encoder = small_encoder("bert", layers=1)
    made = replace(made, inputs=replace(made.inputs, positions_RL=made.inputs.positions_RL % 40))
    samples = draw(encoder, Fixed(probabilities.log()), made)
    # About 10 700 samples: a share of 0.5 is known to 0.005.
    shares = torch.bincount(samples, minlength=vocabulary.size) / len(samples)
    torch.testing.assert_close(shares, probabilities, atol=0.025, rtol=0)


def test_special_tokens_and_ids_beyond_the_tokenizer_are_never_drawn(vocabulary: Vocabulary) -> None:
    logits = torch.zeros(vocabulary.size + 14)
    logits[list(SPECIAL)] = 30.0
    logits[vocabulary.size :] = 30.0
    made = piece(vocabulary, [30] * 40, rate=0.9).replacements
    assert made is not None
    samples = draw(small_encoder("bert"), Fixed(logits), made)
    assert not set(samples.tolist()) & set(SPECIAL)
    assert int(samples.max()) < vocabulary.size
    # The ends of [0, 1) are drawn inside, too.
    for number, expected in ((0.0, 4), (1.0 - 2.0**-53, vocabulary.size - 1)):
        ends = replace(made, uniform_G=torch.full_like(made.uniform_G, number))
        assert set(draw(small_encoder("bert"), Fixed(logits), ends).tolist()) == {expected}


def test_labels_say_which_tokens_differ_from_the_originals(vocabulary: Vocabulary) -> None:
    made = piece(vocabulary, [30, 12, 20])
    assert made.replacements is not None
    encoder, head = small_encoder("bert"), Fixed(torch.zeros(97))
    done = with_replacements(encoder, {"denoise": head}, made)
    before, after = made.inputs.ids_RL.flatten(), done.inputs.ids_RL.flatten()
    changed = set(torch.nonzero(before != after).flatten().tolist())
    assert changed
    assert changed <= set(made.replacements.place_G.tolist())
    (targets,) = [targets for targets in done.vocabulary if targets.head == "real-synthetic"]
    real = targets.weight_K > 0
    assert targets.label_K[real].tolist() == [int(place in changed) for place in targets.index_K[real].tolist()]
    assert set(targets.index_K[real].tolist()) >= changed
    (untouched,) = [targets for targets in done.vocabulary if targets.head == "denoise"]
    assert (untouched.label_K == made.vocabulary[0].label_K).all()


def test_the_generator_gets_no_gradient_and_leaves_the_mode_alone(vocabulary: Vocabulary) -> None:
    encoder = small_encoder("bert", dropout=0.1)
    denoise = TokenHead(encoder.word_embeddings, encoder.hidden_size)
    heads = {"denoise": denoise, "real-synthetic": nn.Linear(encoder.hidden_size, 2)}
    made = collate([cell("replace", "bidirectional", "real-synthetic", make_texts([30, 9]), vocabulary)], PAD)
    assert made.replacements is not None
    state = torch.get_rng_state()
    samples = draw(encoder, denoise, made.replacements)
    assert torch.equal(state, torch.get_rng_state())  # no dropout, no stream of random numbers
    assert encoder.training
    assert torch.equal(samples, draw(encoder, denoise, made.replacements))
    torch.autograd.backward(segment_losses(encoder, heads, made).sum())
    assert all(parameter.grad is None for parameter in denoise.parameters())
    assert any(parameter.grad is not None for parameter in encoder.parameters())


def test_a_part_of_a_segment_draws_what_the_whole_draws(vocabulary: Vocabulary) -> None:
    encoder = small_encoder("bert", dtype=torch.float64)
    denoise = TokenHead(encoder.word_embeddings, encoder.hidden_size).double()
    segment = cell("replace", "bidirectional", "real-synthetic", make_texts([30, 9, 14]), vocabulary)

    def drawn(wanted: Replacements | None) -> list[int]:
        assert wanted is not None
        return draw(encoder, denoise, wanted).tolist()

    parts = [drawn(collate([segment.part(i, i + 1)], PAD).replacements) for i in range(3)]
    assert drawn(collate([segment], PAD).replacements) == np.concatenate(parts).tolist()
