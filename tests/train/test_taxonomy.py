"""Every primitive through whole steps: the single pass, the loop, packed rows, accumulation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.train.running import parameters, run_steps, tiny_config

NO_DROPOUT = ("encoder.dropout=0", "encoder.head_dropout=0")
SPACE = """
blocks:
  - data: [end-task]
    transform: [mask, noised-embeddings, deletion, span-mask]
    representation: [bidirectional, right-to-left]
    output: [denoise, tf-idf]
  - data: [in-domain]
    transform: [no-op, replace]
    representation: [left-to-right, random-factorized]
    output: [next-token, tf, capitalisation, real-synthetic]
  - data: [end-task]
    transform: [deletion, replace]
    representation: [random-factorized]
    output: [end-task, capitalisation]
"""


@pytest.fixture(scope="module")
def everything(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The small run with a space of all transforms and outputs."""
    path = tmp_path_factory.mktemp("space") / "everything.yaml"
    path.write_text(SPACE)
    return {**tiny, "space": str(path), "n": "all", "batch": {**tiny["batch"], "auxiliary": 60}}


@pytest.mark.parametrize("other", ["gradients.engine=loop", "batch.micro=7"])
def test_single_pass_loop_and_accumulation_take_the_same_way(everything: dict[str, Any], other: str) -> None:
    one, two = (
        run_steps(tiny_config(everything, *NO_DROPOUT, "method.aux_lr=1.0", *settings), 5, torch.float64)
        for settings in ((), (other,))
    )
    torch.testing.assert_close(parameters(one), parameters(two), rtol=1e-6, atol=1e-9)
    factors = [made.setup.method.factors() for made in (one, two)]
    for letter, values in (factors[0] or {}).items():
        torch.testing.assert_close(torch.from_numpy(values), torch.from_numpy((factors[1] or {})[letter]))
