"""Tests that need a GPU: the same runs as on a CPU, and no wait for the device within a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aang_ray.train.run import run_cell
from tests.train.running import parameters, run_steps, stepper, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine; make test-gpu on one"),
]


@pytest.mark.parametrize("method", ["finetune", "static", "aang"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_end(tiny: dict[str, Any], method: str, precision: str) -> None:
    settings = (f"method={method}", f"precision={precision}", "resources.device=cuda")
    assert run_cell(tiny_config(tiny, *settings)).result.status == "done"


def test_the_cpu_and_the_gpu_take_the_same_way(tiny: dict[str, Any]) -> None:
    settings = ("encoder.dropout=0.0", "encoder.head_dropout=0.0")
    on_cpu = run_steps(tiny_config(tiny, *settings), 5, torch.float64)
    on_gpu = run_steps(tiny_config(tiny, *settings, "resources.device=cuda"), 5, torch.float64)
    torch.testing.assert_close(parameters(on_gpu).cpu(), parameters(on_cpu), rtol=1e-6, atol=1e-9)


def test_a_step_does_not_wait_for_the_device(tiny: dict[str, Any]) -> None:
    made = stepper(tiny_config(tiny, "resources.device=cuda"))
    made.step(made.prepare(0))  # first use of kernels and allocators may wait
    prepared = made.prepare(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.step(prepared)
    finally:
        torch.cuda.set_sync_debug_mode("default")
