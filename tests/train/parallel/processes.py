"""Run a function in W processes that can reach each other, without Ray."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import multiprocessing

from aang_ray.train.workers.group import Workers

SECONDS = 120
"""How long a worker waits for another: far more than any step takes, on a busy machine, too."""
# One process imports everything, and all workers are copies of it.
multiprocessing.set_forkserver_preload(["aang_ray.train.run", "tests.train.parallel.processes"])


def together(
    size: int, folder: Path, work: Callable[..., Any], *arguments: Any, seconds: float = SECONDS, limit: float = 300
) -> list[Any]:
    """Run `work(workers, *arguments)` in `size` processes; return each one's result, its exception, or None.

    None: the process died. After `limit` seconds all processes are ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    members = [
        context.Process(target=_worker, args=(rank, size, folder, seconds, work, arguments), daemon=True)
        for rank in range(size)
    ]
    for member in members:
        member.start()
    end = time.monotonic() + limit
    for member in members:
        member.join(max(0.0, end - time.monotonic()))
    for member in members:
        member.kill()
        member.join()
    files = [folder / f"{rank}.pt" for rank in range(size)]
    return [torch.load(file, weights_only=False) if file.exists() else None for file in files]


def _worker(
    rank: int, size: int, folder: Path, seconds: float, work: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=seconds)
    dist.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=size, timeout=limit)
    try:
        result = work(Workers.connect(rank, size, torch.device("cpu"), limit), *arguments)
    except Exception as error:  # noqa: BLE001 - what was raised is what a test asks for
        traceback.print_exc()
        result = error
    torch.save(result, folder / f"{rank}.pt")
