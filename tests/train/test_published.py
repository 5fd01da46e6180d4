"""Whole steps with the `published` switches: each does what semantics.md says, and `sound` does not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from aang_ray.methods.aang import Aang
from aang_ray.model.heads import OwnDecoder, TiedDecoder, TokenHead
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.source import BatchSource
from aang_ray.train import step as step_module
from aang_ray.train.run import run_cell
from aang_ray.train.step import Stepper
from aang_ray.train.text import TextDomain
from tests.train.running import stepper, tiny_config

NO_DROPOUT = ("encoder.dropout=0.0", "encoder.head_dropout=0.0")
SGD = "optim={algorithm: sgd, momentum: 0.0, body_weight_decay: 0.0, head_weight_decay: 0.0}"


def objectives_of(made: Stepper) -> tuple[Objective, ...]:
    assert made.setup.space is not None
    return made.setup.space.objectives


def source_of(made: Stepper) -> BatchSource:
    assert isinstance(made.setup.domain, TextDomain)
    return made.setup.domain.source


# legality: published. (semantics section 1)


@pytest.mark.parametrize(("space", "sound", "published"), [("td", 23, 24), ("td_ed", 38, 40)])
def test_legality_of_a_run(tiny: dict[str, Any], space: str, sound: int, published: int) -> None:
    for legality, size in (("sound", sound), ("published", published)):
        made = stepper(
            tiny_config(tiny, f"space={space}", f"objectives.legality={legality}", "n=all", "batch.auxiliary=40")
        )
        assert len(objectives_of(made)) == size
        # The cells that are added copy an uncorrupted input that every token sees.
        intact = {k.output for k in objectives_of(made) if k.stages[1:3] == ("no-op", "bidirectional")}
        assert intact == ({"end-task", "denoise"} if legality == "published" else {"end-task"})


# allocation: published. (semantics section 2.3)


def softmax(logits: dict[str, float]) -> dict[str, float]:
    total = sum(math.exp(value) for value in logits.values())
    return {name: math.exp(value) / total for name, value in logits.items()}


@pytest.mark.parametrize("method", ["aang", "static"])
def test_coefficients_of_a_published_batch(tiny: dict[str, Any], method: str) -> None:
    """(1 - lambda) (b / B) softmax_S(A_k + O_o), with b as many examples as the segment has, and B = 24."""
    settings = ("objectives.allocation=published", f"method={method}", "space=td_ed", "n=all")
    made = stepper(tiny_config(tiny, *settings))
    weighting = vars(made.setup.method)["weighting"]
    generator = torch.Generator().manual_seed(0)
    weighting.flat_F.copy_(torch.randn(weighting.index.size, generator=generator))
    weighting.lambda_logits_2.copy_(torch.tensor([0.0, math.log(3)]))  # lambda = 1/4
    prepared = made.prepare(0)
    factors = made.setup.method.factors()
    assert factors is not None
    assert made.setup.space is not None
    named = {
        letter: dict(zip(names, factors[letter].tolist(), strict=True))
        for letter, names in made.setup.space.factors().items()
    }
    chosen = [objectives_of(made)[index] for index in prepared.batch.sampled]
    weights = softmax({k.key: named["A"][k.key] + named["O"][k.output] for k in chosen})
    segments = prepared.batch.segments[2:]
    texts = [segment.examples for segment in segments]
    expected = [0.75 * count / 24 * weights[k.key] for k, count in zip(chosen, texts, strict=True)]
    coefficients_S = made.setup.method.request(prepared.sampled).coefficients_S
    assert len(set(texts)) > 1
    assert coefficients_S.tolist() == pytest.approx([0.0, 0.25, *expected], rel=1e-5)
    # Outputs share the batch: the same tokens, corrupted alike.
    batches: dict[tuple[str, ...], list[list[int]]] = {}
    for k, segment in zip(chosen, segments, strict=True):
        if k.transform != "no-op":  # whose queries denoising alone has
            batches.setdefault(k.stages[:3], []).append(segment.ids_T.tolist())
    assert sum(len(shared) == 2 for shared in batches.values()) == 6  # three transforms of two representations
    assert all(ids == shared[0] for shared in batches.values() for ids in shared)


# visibility: published. (semantics section 2.5)


@pytest.mark.parametrize("visibility", ["sound", "published"])
def test_padding_counts_in_losses_as_published_alone(tiny: dict[str, Any], visibility: str) -> None:
    """Replace the tokens at padding: the loss changes only for objectives that see padding."""
    settings = (f"objectives.visibility={visibility}", "method=static", "n=all", "batch.auxiliary=92")
    made = stepper(tiny_config(tiny, *NO_DROPOUT, *settings), torch.float64)
    prepared = made.prepare(0)
    (piece,) = prepared.pieces
    padding_RL = piece.inputs.texts_RL < 0
    assert padding_RL.any()
    ids_RL = torch.where(padding_RL, piece.inputs.ids_RL.max(), piece.inputs.ids_RL)
    other = replace(piece, inputs=replace(piece.inputs, ids_RL=ids_RL))
    with torch.no_grad():
        changed_S = (made.losses(piece) - made.losses(other)).abs() > 1e-9
    representations = [segment.representation for segment in prepared.batch.segments]
    assert set(representations) == {None, "bidirectional", "left-to-right", "right-to-left", "random-factorized"}
    for representation, changed in zip(representations, changed_S.tolist(), strict=True):
        if visibility == "sound" or representation in (None, "left-to-right"):
            assert not changed
        elif representation in ("bidirectional", "random-factorized"):
            assert changed


# labels: published. (semantics section 2.6)


def test_labels_of_no_op_are_its_own_tokens_at_15_percent_of_the_places(tiny: dict[str, Any]) -> None:
    """floor(0.15 m + u) of a text's m tokens, one at least: within 5 deviations, sqrt(texts) / 2 labels, of the sum."""
    settings = ("objectives.labels=published", "objectives.legality=published", "method=static", "n=all")
    made = stepper(tiny_config(tiny, *settings, "batch.auxiliary=960"))
    batch = made.prepare(0).batch
    found = {}
    for index, segment in zip(batch.sampled, batch.segments[2:], strict=True):
        k = objectives_of(made)[index]
        if (k.transform, k.output) != ("no-op", "denoise"):
            continue
        found[k.representation] = segment
        assert (segment.ids_T[segment.labelled_M] == segment.targets_M).all()
        real_E = segment.lengths_E - 2
        assert int(segment.lengths_E.sum()) == len(segment.ids_T), "no queries"
        expected = float(np.maximum(0.15 * real_E, 1).sum())
        assert abs(len(segment.labelled_M) - expected) < 5 * math.sqrt(segment.examples) / 2
    assert set(found) == {"bidirectional", "left-to-right", "right-to-left", "random-factorized"}
    sound = stepper(tiny_config(tiny, "method=static", "n=all")).prepare(0).batch
    (queries,) = (s for s in sound.segments[2:] if s.name == "end-task/no-op/random-factorized/denoise")
    assert not (queries.ids_T[queries.labelled_M] == queries.targets_M).any(), "in sound labels they are queried"


# heads: per_objective. (semantics section 4)


def test_every_objective_has_a_decoder_of_its_own(tiny: dict[str, Any]) -> None:
    made = stepper(tiny_config(tiny, "objectives.heads=per_objective", "n=all"))
    assert set(made.setup.head_of) == {"end-task", *(k.key for k in objectives_of(made))}
    token_heads = [head for head in made.setup.head_of.values() if isinstance(head, TokenHead)]
    assert len(token_heads) == sum(k.output == "denoise" for k in objectives_of(made)) == 15
    table = made.setup.encoder.get_parameter("body.embeddings.word_embeddings.weight")
    for head in token_heads:
        assert isinstance(head.decoder, OwnDecoder)
        assert torch.equal(head.decoder.weight, table), "a copy at the start"
    assert len({head.decoder.weight.data_ptr() for head in token_heads} | {table.data_ptr()}) == 16
    shared = stepper(tiny_config(tiny, "n=all"))
    assert [type(h.decoder) for h in shared.setup.head_of.values() if isinstance(h, TokenHead)] == [TiedDecoder]


@pytest.mark.parametrize("algorithm", ["sgd", "adamw"])
def test_training_a_decoder_leaves_the_table_and_the_others_alone(tiny: dict[str, Any], algorithm: str) -> None:
    """One sampled objective: the heads of others stay, bit for bit; of the table only rows that were read change."""
    decay = () if algorithm == "adamw" else (SGD,)
    settings = ("objectives.heads=per_objective", "method=static", "n=1", "optim.body_weight_decay=0.0", *decay)
    made = stepper(tiny_config(tiny, *settings), torch.float64)
    table = made.setup.encoder.get_parameter("body.embeddings.word_embeddings.weight")
    heads = made.setup.head_of
    number = next(step for step in range(50) if isinstance(sampled_head(made, step), TokenHead))
    prepared = made.prepare(number)
    (segment,) = prepared.batch.segments[2:]
    before = {name: [p.detach().clone() for p in head.parameters()] for name, head in heads.items()}
    table_before = table.detach().clone()
    made.step(prepared)
    for name, head in heads.items():
        same = all(torch.equal(p, q) for p, q in zip(head.parameters(), before[name], strict=True))
        assert same == (name not in ("end-task", segment.head))
    decoder = heads[segment.head].decoder
    assert isinstance(decoder, OwnDecoder)
    assert (decoder.weight != table_before).any(1).all(), "each entry of the vocabulary has a gradient as decoder"
    read = torch.zeros(len(table), dtype=torch.bool)
    read[torch.cat([piece.inputs.ids_RL.flatten() for piece in prepared.pieces])] = True
    moved = (table != table_before).any(1)
    assert not read.all()
    assert not (moved & ~read).any()
    assert moved.any()


def sampled_head(made: Stepper, step: int) -> nn.Module:
    (index,) = made.prepare(step).sampled.objectives
    return made.setup.head_of[objectives_of(made)[index].key]


# dev_sample: published. (semantics section 3)


@pytest.mark.parametrize("dev_sample", ["sound", "published"])
def test_the_dev_head_is_fitted_on_train_or_on_dev(
    tiny: dict[str, Any], dev_sample: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are those of the split's texts, in eval mode; the dev batch never has train texts."""
    made = stepper(tiny_config(tiny, f"method.dev_sample={dev_sample}", "batch.dev=40"), torch.float64)
    seen: list[tuple[Tensor, Tensor]] = []
    fit = step_module.fit_dev_head

    def watched(features_EH: Tensor, labels_E: Tensor, *more: Any) -> nn.Module:
        seen.append((features_EH.clone(), labels_E.clone()))
        return fit(features_EH, labels_E, *more)

    monkeypatch.setattr(step_module, "fit_dev_head", watched)
    domain, readings = made.setup.domain, source_of(made).schedule
    prepared = made.prepare(2)
    made.setup.encoder.eval()
    (piece,) = domain.end_task_pieces("train" if dev_sample == "published" else "dev", readings.dev_head(2), 1000)
    with torch.no_grad():
        features_EH, labels_E = domain.features(piece)
    made.step(prepared)
    ((found_EH, found_E),) = seen
    torch.testing.assert_close(found_EH, features_EH)
    assert torch.equal(found_E, labels_E)
    assert len(found_E) == 8
    dev = prepared.batch.segments[0]
    # Dev has 40 texts, the head 8.
    assert dev.examples == (40 if dev_sample == "published" else 32)
    ids, lengths = source_of(made).task.dev.tokens.take(readings.dev_batch(2))
    assert (dev.ids_T == ids).all()
    assert (dev.lengths_E == lengths).all()


# auxiliary_score: published. (semantics section 3)


@pytest.mark.parametrize("score", ["cosine", "dot"])
@pytest.mark.parametrize("engine", ["segments", "loop"])
def test_the_joint_score_is_of_label_counts_and_clipped_gradients(
    tiny: dict[str, Any], score: str, engine: str
) -> None:
    """a_X moves by sopt_lr s_X: s_X of v and sum_k (labels of k) min(1, 10 / ||g_k||) g_k, each g from autograd."""
    method = f"method={{auxiliary_score: published, score: {score}, sopt_lr: 1.0, meta_every: 1}}"
    settings = (*NO_DROPOUT, method, "objectives.heads=per_objective", f"gradients.engine={engine}")
    made = stepper(tiny_config(tiny, *settings), torch.float64)
    for head in made.setup.head_of.values():
        if isinstance(head, TokenHead):
            head.norm.weight.data.mul_(40.0)  # some gradients exceed 10
    prepared = made.prepare(0)
    made._fit_dev_head(prepared)
    made.setup.encoder.train()
    losses = [made.losses(piece) for piece in prepared.pieces]
    losses_S = torch.stack(losses).sum(0)
    body = list(made.setup.encoder.parameters())
    rows = []
    for loss in losses_S:
        parts = torch.autograd.grad(loss, body, retain_graph=True, allow_unused=True)
        each = [torch.zeros_like(p) if g is None else g for p, g in zip(body, parts, strict=True)]
        rows.append(torch.cat([g.flatten() for g in each]))
    v_P, objectives_nP = rows[0], torch.stack(rows[2:])
    norms_n = objectives_nP.norm(dim=1)
    assert norms_n.min() < 10 < norms_n.max()
    counts = [s.examples if s.classes_E is not None else len(s.labelled_M) for s in prepared.batch.segments[2:]]
    assert len(set(counts)) > 1
    joint_P = torch.tensor(counts, dtype=torch.float64) * (10 / norms_n).clamp(max=1.0) @ objectives_nP
    expected = v_P @ joint_P
    if score == "cosine":
        expected = expected / v_P.norm() / joint_P.norm()
    made.step(prepared)
    assert isinstance(made.setup.method, Aang)
    found = made.setup.method.weighting.lambda_logits_2
    assert float(found[1]) == pytest.approx(float(expected), rel=1e-5)


def test_all_of_them_together_end_a_run(tiny: dict[str, Any]) -> None:
    """The row's name lists the switches, and the coefficients do not sum to 1."""
    switches = [f"objectives.{name}=published" for name in ("legality", "allocation", "visibility", "labels")]
    switches += ["objectives.heads=per_objective", "optim.clipping=published"]
    switches += ["method.dev_sample=published", "method.auxiliary_score=published", "schedule.steps=4", "n=all"]
    record = run_cell(tiny_config(tiny, *switches))
    assert record.result.status == "done", record.result.error
    assert record.result.row == "aang-td (published) n=all"
    assert len(record.weights[-1].weights) == 24
    assert sum(record.weights[-1].weights.values()) < 0.99
