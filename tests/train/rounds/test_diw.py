"""DIW's rounds on a text model, with scores as the example wants them. (semantics section 7)"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from aang_ray.methods.diw import Diw
from aang_ray.train.rounds.diw import DiwStepper
from tests.train.rounds.running import PLAIN, config_of, rounds, take

DIW = "diw, round_steps: 2, tries: 3"


def scripted(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, scores: Iterable[float], *settings: str
) -> DiwStepper:
    """Scores on dev in the order in which they are asked for."""
    script = iter(scores)
    monkeypatch.setattr(DiwStepper, "_score", lambda _: next(script))
    made = rounds(config_of(tiny, DIW, *PLAIN, *settings))
    assert isinstance(made, DiwStepper)
    return made


def method_of(made: DiwStepper) -> Diw:
    assert isinstance(made.setup.method, Diw)
    return made.setup.method


def test_rounds_are_tried_again_until_dev_improves(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of two steps alone beside the end task's two, then tries of two steps.

    Round 1: alone 0.5, 0.7, 0.4, together 0.6: over, w = 1 + 0.1 (-0.1, 0.1, -0.2) = (0.99, 1.01, 0.98).
    Round 2: alone 0.6, 0.6, 0.6, together 0.5, so w = (1.00, 1.02, 0.99), and again 0.7: over, better than 0.6,
    w = (0.99, 1.01, 0.98).
    """
    made = scripted(tiny, monkeypatch, [0.5, 0.7, 0.4, 0.6, 0.6, 0.6, 0.6, 0.5, 0.7], "schedule.steps=18")
    start_Q = made.vector.read()
    take(made, 6)
    assert torch.equal(made.vector.read(), start_Q), "the tries begin where the tasks began"
    assert not made.evaluates_after(6)
    take(made, 8, first=6)
    assert made.evaluates_after(8)
    assert not made.ends_after(8)
    assert method_of(made).weights(made.tasks.objectives) == pytest.approx([0.99, 1.01, 0.98])
    start_Q = made.vector.read()
    take(made, 16, first=8)
    assert torch.equal(made.vector.read(), start_Q), "the first try was taken back"
    assert not made.evaluates_after(16)
    assert method_of(made).weights(made.tasks.objectives) == pytest.approx([1.0, 1.02, 0.99])
    take(made, 18, first=16)
    assert made.evaluates_after(18)
    assert made.ends_after(18)
    assert method_of(made).weights(made.tasks.objectives) == pytest.approx([0.99, 1.01, 0.98])
    assert not torch.equal(made.vector.read(), start_Q)


def test_after_so_many_tries_the_last_one_stands(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted(tiny, monkeypatch, [0.5, 0.5, 0.5, 0.9, *[0.5] * 6], "schedule.steps=40")
    take(made, 8)
    for step in range(8, 20):
        made.step(made.prepare(step))
        assert made.evaluates_after(step + 1) == (step + 1 == 20)
    assert method_of(made).last_score == 0.5


def test_no_try_is_begun_that_the_run_has_no_steps_for(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted(tiny, monkeypatch, [0.5, 0.5, 0.5, 0.9, 0.5, 0.5, 0.5, 0.5], "schedule.steps=17")
    take(made, 16)
    assert made.evaluates_after(16)
    assert made.ends_after(16)


def test_tries_see_the_same_batches_and_rounds_others(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = scripted(tiny, monkeypatch, [0.5, 0.5, 0.5, 0.9, *[0.5] * 6], "schedule.steps=40")
    ids: dict[int, bytes] = {}
    for step in range(20):
        prepared = made.prepare(step)
        ids[step] = b"".join(segment.ids_T.tobytes() for segment in prepared.batch.segments)
        assert prepared.batch.segments[1].texts == (16 if step in (0, 1, 8, 9) or step % 8 >= 6 or step >= 14 else 0)
        made.step(prepared)
    assert ids[14] == ids[16] == ids[18]
    assert ids[15] == ids[17] == ids[19]
    assert len({ids[step] for step in (6, 7, 14, 15)}) == 4


def test_one_worker_trains_a_try_as_static_multitask_does(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At w = 1 the loss is the mean of the tasks'."""
    made = scripted(tiny, monkeypatch, [0.5] * 4, "schedule.steps=8")
    take(made, 6)
    prepared = made.prepare(6)
    assert method_of(made).request(prepared.sampled).coefficients_S.tolist() == pytest.approx([0.0, *[1 / 3] * 3])
    assert [segment.texts for segment in prepared.batch.segments] == [0, 16, 12, 12]
    losses_S = made.step(prepared).losses_S
    assert (losses_S[1:] > 0).all()
