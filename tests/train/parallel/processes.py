"""Run a function in W processes that can reach each other, without Ray."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

from aang_ray.train.parallel.workers import Workers

SECONDS = 60


def together(size: int, folder: Path, work: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
    """What `work(workers, *arguments)` returns, or the exception that it raises, in each of `size` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.spawn(_worker, (size, folder, seconds, work, arguments), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _worker(
    rank: int, size: int, folder: Path, seconds: float, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=size, timeout=limit)
    try:
        result = work(Workers.from_environment(torch.device("cpu"), limit), *arguments)
    except Exception as error:  # noqa: BLE001 - what was raised is what a test asks for
        traceback.print_exc()
        result = error
    torch.save(result, folder / f"{rank}.pt")
