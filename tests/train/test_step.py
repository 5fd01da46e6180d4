"""Settings that must not change a step's result, and settings that must."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from aang_ray.config.run import RunConfig
from aang_ray.objectives import batch
from aang_ray.objectives import packing as lay_out
from aang_ray.train.text import TextDomain
from tests.train.running import parameters, run_steps, stepper, tiny_config

NO_DROPOUT = ("encoder.dropout=0.0", "encoder.head_dropout=0.0")


def close(one: RunConfig, other: RunConfig, steps: int = 6) -> None:
    a, b = run_steps(one, steps, torch.float64), run_steps(other, steps, torch.float64)
    torch.testing.assert_close(parameters(a), parameters(b), rtol=1e-6, atol=1e-9)
    factors_a, factors_b = a.setup.method.factors(), b.setup.method.factors()
    for letter in factors_a or {}:
        assert factors_b is not None
        np.testing.assert_allclose((factors_a or {})[letter], factors_b[letter], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["finetune", "static", "aang"])
@pytest.mark.parametrize("micro", [5, 16])
def test_accumulation_does_not_change_the_result(tiny: dict[str, Any], method: str, micro: int) -> None:
    settings = (*NO_DROPOUT, f"method={method}")
    close(tiny_config(tiny, *settings), tiny_config(tiny, *settings, f"batch.micro={micro}"))


def test_the_loop_and_the_single_pass_take_the_same_way(tiny: dict[str, Any]) -> None:
    settings = (*NO_DROPOUT, "method.aux_lr=1.0")
    close(tiny_config(tiny, *settings), tiny_config(tiny, *settings, "gradients.engine=loop"), steps=20)


def test_in_fp32_too_within_a_stated_tolerance(tiny: dict[str, Any]) -> None:
    """1e-5 absolute after 20 steps, on factors of about 0.5 and parameters of about 1; 3e-7 was measured."""
    settings = (*NO_DROPOUT, "method.aux_lr=1.0")
    one = run_steps(tiny_config(tiny, *settings), 20)
    other = run_steps(tiny_config(tiny, *settings, "gradients.engine=loop"), 20)
    torch.testing.assert_close(parameters(one), parameters(other), rtol=0, atol=1e-5)
    weightings = [vars(made.setup.method)["weighting"] for made in (one, other)]
    torch.testing.assert_close(weightings[0].flat_F, weightings[1].flat_F, rtol=0, atol=1e-5)
    torch.testing.assert_close(weightings[0].lambda_, weightings[1].lambda_, rtol=0, atol=1e-5)
    assert weightings[0].flat_F.abs().max() > 0.1


@pytest.mark.parametrize("settings", [[], ["encoder.adapter.rank=2"]])
def test_both_rates_zero_is_static_multitask(tiny: dict[str, Any], settings: list[str]) -> None:
    frozen = run_steps(tiny_config(tiny, "method={name: aang, aux_lr: 0, sopt_lr: 0}", *settings), 4)
    static = run_steps(tiny_config(tiny, "method=static", *settings), 4)
    assert torch.equal(parameters(frozen), parameters(static))
    assert not frozen.prepare(0).batch.segments[0].examples  # no dev batch
    assert frozen.prepare(0).dev_head is None  # no dev head


def test_padding_never_matters(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(tiny, *NO_DROPOUT)
    packed = run_steps(config, 3, torch.float64)
    for module, name, value in (
        (lay_out, "SHORTEST_ROW", 200),
        (lay_out, "ROWS_MULTIPLE", 3),
        (batch, "LABELS_MULTIPLE", 50),
        (batch, "TEXTS_MULTIPLE", 7),
    ):
        monkeypatch.setattr(module, name, value)
    wide = run_steps(config, 3, torch.float64)
    torch.testing.assert_close(parameters(packed), parameters(wide), rtol=1e-6, atol=1e-9)


def test_batches_are_a_function_of_seed_and_step(tiny: dict[str, Any]) -> None:
    made, again = stepper(tiny_config(tiny)), stepper(tiny_config(tiny, "method=static"))
    later = made.prepare(7)
    for step in (0, 7):
        one, other = made.prepare(step), again.prepare(step)
        assert one.sampled.objectives == other.sampled.objectives
        for a, b in zip(one.batch.segments[1:], other.batch.segments[1:], strict=True):
            assert (a.ids_T == b.ids_T).all()
            assert (a.ranks_T == b.ranks_T).all()
    assert (later.batch.segments[2].ids_T == made.prepare(7).batch.segments[2].ids_T).all()
    other_seed = stepper(tiny_config(tiny, "seed=1")).prepare(7)
    assert not np.array_equal(other_seed.batch.segments[1].ids_T, later.batch.segments[1].ids_T)


def test_the_dev_batch_and_the_dev_heads_examples_are_disjoint(tiny: dict[str, Any]) -> None:
    for settings in ((), ("method.head_refit_every=4",), ("batch.dev_head=30", "batch.dev=30")):
        domain = stepper(tiny_config(tiny, *settings)).setup.domain
        assert isinstance(domain, TextDomain)
        for step in range(9):
            head = set(domain.source.schedule.dev_head(step).tolist())
            dev = set(domain.source.schedule.dev_batch(step).tolist())
            assert not head & dev
            assert dev


@pytest.mark.parametrize("settings", [(), ("n=all",), ("batch.micro=8",), ("gradients.engine=loop",)])
def test_steps_leave_nothing_behind(tiny: dict[str, Any], settings: tuple[str, ...]) -> None:
    """A reference cycle through C++ would keep a graph alive that garbage collection cannot free."""
    made = stepper(tiny_config(tiny, *settings))
    counts = []
    for step in range(12):
        made.step(made.prepare(step))
        if step >= 3:
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert counts[-1] - counts[0] < 100


def test_out_of_memory_halves_the_piece_and_keeps_the_result(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aang_ray.train import text as module

    config = tiny_config(tiny, *NO_DROPOUT)
    expected = run_steps(config, 3, torch.float64)
    original = module.segment_losses

    def limited(encoder: Any, heads: Any, piece: Any) -> Any:
        if len(piece.inputs.lengths_E) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(encoder, heads, piece)

    monkeypatch.setattr(module, "segment_losses", limited)
    small = run_steps(config, 3, torch.float64)
    assert small.micro.texts == 12
    torch.testing.assert_close(parameters(expected), parameters(small), rtol=1e-6, atol=1e-9)


def test_class_weights_are_those_of_cross_entropy(tiny: dict[str, Any]) -> None:
    made = stepper(tiny_config(tiny, "method=finetune", *NO_DROPOUT))
    object.__setattr__(made.setup.task, "class_weights", np.array([0.3, 1.7], dtype=np.float32))
    prepared = made.prepare(0)
    loss = made.losses(prepared.pieces[0])[1]
    piece = prepared.pieces[0]
    encoder, head = made.setup.encoder, made.setup.head_of["end-task"]
    logits = head(encoder.pool(encoder(piece.inputs), piece.inputs))
    expected = torch.nn.functional.cross_entropy(logits, piece.pooled[0].label_K, weight=torch.tensor([0.3, 1.7]))
    torch.testing.assert_close(loss, expected)


def test_a_segments_loss_is_that_of_a_padded_batch_of_its_own(tiny: dict[str, Any]) -> None:
    """Every objective's loss in the packed step equals the loss of the same texts one per row."""
    made = stepper(tiny_config(tiny, *NO_DROPOUT, "n=all", "batch.auxiliary=92"), torch.float64)
    prepared = made.prepare(3)
    made._fit_dev_head(prepared)
    together = made.losses(prepared.pieces[0])
    for number, segment in enumerate(prepared.batch.segments):
        texts = []
        for text in range(segment.examples):
            alone = [s.part(0, 0) for s in prepared.batch.segments]
            alone[number] = segment.part(text, text + 1)
            texts.append(made.losses(batch.collate(alone, 0))[number])
        torch.testing.assert_close(together[number], torch.stack(texts).sum())
