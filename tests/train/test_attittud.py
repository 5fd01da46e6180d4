"""ATTITTUD in whole steps and runs: special cases, the examples that it uses, and resuming after a stop."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aang_ray.methods.attittud import Attittud
from aang_ray.train.control import Interrupted
from aang_ray.train.run import run_cell
from aang_ray.train.step import Stepper
from tests.train.running import parameters, run_steps, stepper, tiny_config
from tests.train.test_checkpoint import numbers

SMALL = "rank: 3, refresh_every: 2, subspace_examples: 12, primary_examples: 8"


def attittud(*etas: float, more: str = SMALL) -> str:
    perp, plus, minus = etas
    return f"method={{name: attittud, eta_perp: {perp}, eta_plus: {plus}, eta_minus: {minus}, {more}}}"


def test_all_ones_is_static_multitask(tiny: dict[str, Any]) -> None:
    """With dropout, whose random state the estimate of V and p must not change, and with the tied decoder's part."""
    static = run_steps(tiny_config(tiny, "method=static"), 4, torch.float64)
    ones = run_steps(tiny_config(tiny, attittud(1, 1, 1)), 4, torch.float64)
    torch.testing.assert_close(parameters(ones), parameters(static), rtol=1e-6, atol=1e-9)
    flipped = run_steps(tiny_config(tiny, attittud(1, 1, -1)), 4, torch.float64)
    assert float((parameters(flipped) - parameters(static)).norm()) > 1e-4


def test_all_zeros_leave_the_end_tasks_gradient(tiny: dict[str, Any]) -> None:
    made = stepper(tiny_config(tiny, attittud(0, 0, 0), "encoder.dropout=0", "encoder.head_dropout=0"), torch.float64)
    prepared = made.prepare(0)
    body = list(made.setup.encoder.parameters())
    loss = made.losses(prepared.pieces[0])[1]
    found = torch.autograd.grad(loss, body, allow_unused=True)
    parts = [torch.zeros_like(p) if g is None else g for p, g in zip(body, found, strict=True)]
    direction_P = made.setup.method.direction(prepared.sampled, made._gradients(prepared))
    assert direction_P is not None
    torch.testing.assert_close(direction_P, 0.5 * torch.cat([part.flatten() for part in parts]), rtol=1e-9, atol=1e-12)


def test_the_examples_are_fresh_and_the_two_sets_disjoint(tiny: dict[str, Any]) -> None:
    made = stepper(tiny_config(tiny, attittud(1, 1, -1)))
    seen: list[tuple[int, ...]] = []
    take = made.setup.domain.end_task_pieces

    def watched(split: str, examples: Any, micro: int) -> Any:
        assert split == "train"
        seen.append(tuple(examples.tolist()))
        return take(split, examples, micro)

    made.setup.domain.end_task_pieces = watched  # type: ignore[method-assign]
    for step in (0, 1, 2, 0):
        made.prepare(step)
    assert [len(examples) for examples in seen] == [12, 8, 0, 8, 12, 8, 12, 8]
    assert not set(seen[0]) & set(seen[1])
    assert len({seen[place] for place in (1, 3, 5)}) == 3
    assert seen[:2] == seen[-2:]


def seen(made: Stepper) -> tuple[Tensor, Tensor]:
    """V and p estimated from the first step's examples, with the model in train mode as in a step."""
    method = made.setup.method
    assert isinstance(method, Attittud)
    made.setup.encoder.train()
    made._gradients(made.prepare(0))
    assert made.setup.encoder.training
    assert method._basis_PK is not None
    assert method._primary_K is not None
    return method._basis_PK, method._primary_K


def test_dropout_and_pieces_do_not_change_what_it_sees(tiny: dict[str, Any]) -> None:
    """At the same parameters: twice, and in pieces of at most five texts."""
    made = stepper(tiny_config(tiny, attittud(1, 1, -1)), torch.float64)
    in_pieces = stepper(tiny_config(tiny, attittud(1, 1, -1), "batch.micro=5"), torch.float64)
    basis_PK, primary_K = seen(made)
    assert [torch.equal(*pair) for pair in zip(seen(made), (basis_PK, primary_K), strict=True)] == [True, True]
    other_PK, other_K = seen(in_pieces)
    # A singular direction is one up to its sign.
    torch.testing.assert_close((other_PK.t() @ basis_PK).abs(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(other_K.abs(), primary_K.abs())


def test_recomputed_activations_change_nothing(tiny: dict[str, Any]) -> None:
    plain = stepper(tiny_config(tiny, attittud(1, 1, -1)), torch.float64)
    recomputed = stepper(tiny_config(tiny, attittud(1, 1, -1), "gradients.checkpointing=true"), torch.float64)
    for one, other in zip(seen(plain), seen(recomputed), strict=True):
        torch.testing.assert_close(one.abs(), other.abs())


@pytest.mark.parametrize("basis", ["sound", "published"])
def test_a_run_goes_on_between_two_estimates_as_if_it_had_not_stopped(
    tiny: dict[str, Any], tmp_path: Path, basis: str
) -> None:
    more = f"rank: 3, refresh_every: 4, subspace_examples: 12, primary_examples: 8, basis: {basis}"
    config = tiny_config(tiny, attittud(1, 1, -1, more=more), "n=3", "schedule.steps=5", "schedule.eval_every=3")
    plain = run_cell(config)
    assert plain.result.status == "done", plain.result.error
    with pytest.raises(Interrupted):
        run_cell(config, checkpoints=tmp_path, on_evaluation=lambda *_: signal.raise_signal(signal.SIGTERM))
    assert numbers(run_cell(config, checkpoints=tmp_path)) == numbers(plain)
    shares = plain.weights[-1].health
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
    assert plain.result.row == ("attittud-td n=3" if basis == "sound" else "attittud-td (published: basis) n=3")


def test_too_little_memory_is_one_line(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from aang_ray.errors import UserError
    from aang_ray.gradients import engine as memory

    made = stepper(tiny_config(tiny, attittud(1, 1, -1)))
    monkeypatch.setattr(memory, "free_memory", lambda _: 10)
    with pytest.raises(UserError, match=r"9 gradients of \d+ parameters need \d+ bytes.*lower method.rank"):
        made.step(made.prepare(0))
