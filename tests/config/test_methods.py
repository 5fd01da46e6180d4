"""Every method by name: its row, its settings, what does not go with it."""

from __future__ import annotations

import pytest

from aang_ray.config import load_config
from aang_ray.errors import UserError


@pytest.mark.parametrize(
    ("method", "row"),
    [
        ("mt_tartan", "mt_tartan-td n=6"),
        ("pcgrad", "pcgrad-td n=6"),
        ("{name: cagrad, c: 0.2}", "cagrad-td n=6"),
        ("nash_mtl", "nash_mtl-td n=6"),
        ("imtl_g", "imtl_g-td n=6"),
        ("{name: aligned_mtl, scale_mode: rmse}", "aligned_mtl-td n=6"),
        ("upgrad", "upgrad-td n=6"),
        ("random", "random-td n=6"),
        ("{name: dwa, epoch_steps: 10}", "dwa-td n=6"),
        ("{name: cosine_gating, mode: weigh}", "cosine_gating-td n=6"),
        ("gradnorm", "gradnorm-td n=6"),
    ],
)
def test_row_names(method: str, row: str) -> None:
    assert load_config(None, [f"method={method}"]).row_name == row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method={name: cagrad, cc: 0.2}"], "unknown key method.cc; did you mean method.c?"),
        (["method={name: tapt, dapt_steps: 2}"], "unknown key method.dapt_steps; did you mean method.tapt_steps?"),
        (["method={name: finetune, lr: 2}"], "unknown key method.lr; allowed: name"),
        (["method={name: cagrad, c: -1}"], "method.c: must be greater than or equal to 0, got -1"),
        (["method={name: pcgrad, lr: 1}"], "unknown key method.lr"),
        (["method={name: upgrad, preference: equal}"], "method.preference: 'equal' is not allowed, use 'uniform' or"),
        (["method={name: graddrop, end_task_leak: 2}"], "method.end_task_leak"),
        (["method=upgrd"], "did you mean upgrad?"),
        (["method=upgrad", "optim.clipping=published"], "optim.clipping: published clips each term of a weighted sum"),
        (
            ["method=cosine_gating", "optim.clipping=published"],
            "the update of cosine_gating is not a weighted sum; use sound",
        ),
    ],
)
def test_what_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_losses_go_with_published_clipping() -> None:
    for name in ("static", "random", "uncertainty", "dwa", "gradnorm", "mt_tartan"):
        load_config(None, [f"method={name}", "optim.clipping=published"])


def test_settings_of_a_method_are_part_of_its_name() -> None:
    cells = {
        load_config(None, [f"method={method}"]).cell
        for method in ("cagrad", "{name: cagrad, c: 0.2}", "upgrad", "{name: upgrad, preference: static}", "pcgrad")
    }
    assert len(cells) == 5
