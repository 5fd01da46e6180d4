"""All workers get through a part of a step, or none does; and all have the same parameters, or the run ends."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from aang_ray.errors import RunFailure, UserError
from aang_ray.train.parallel.workers import WorkerLost, Workers

_RUN, _USER, _OTHER = 1, 2, 3


class Agreement:
    """While entered, an error of one worker ends the step for all; afterwards `flags` are those of any worker.

    A failure of the run (`RunFailure`, `UserError`) is raised by all. After any other error, which its worker raises
    itself, the others raise `WorkerLost`.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.flags: list[bool] = []
        """Set by the worker inside the block; afterwards true where any worker's is."""

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, WorkerLost) or not (error is None or isinstance(error, Exception)):
            return  # there is nobody to agree with
        workers = self._workers
        kinds = [0] * workers.size
        kinds[workers.rank] = _kind(error)
        found = workers.max_host([*kinds, *map(int, self.flags)])
        failed = [rank for rank in range(workers.size) if found[rank]]
        if not failed:
            self.flags = [bool(flag) for flag in found[workers.size :]]
            return
        text = workers.text_of(f"{error}", failed[0])
        if error is None:
            raise _failure(found[failed[0]], text, failed[0])


def _kind(error: BaseException | None) -> int:
    if error is None:
        return 0
    return _RUN if isinstance(error, RunFailure) else _USER if isinstance(error, UserError) else _OTHER


def _failure(kind: int, text: str, rank: int) -> Exception:
    if kind == _OTHER:
        return WorkerLost(f"worker {rank} of this run failed: {text}")
    return RunFailure(text) if kind == _RUN else UserError(text)


def check_same(workers: Workers, steps: int, named: Mapping[str, Tensor]) -> None:
    """Refuse to go on where workers differ in a tensor, or in how many steps they have made; waits for the device.

    Raises:
        RunFailure: naming the first that differs.
    """
    sums = [steps, *(int(_checksum(tensor)) for tensor in named.values())]
    largest, least = workers.max_host(sums), workers.max_host([-value for value in sums])
    names = ("the number of steps", *named)
    different = [name for name, most, negative in zip(names, largest, least, strict=True) if most != -negative]
    if different:
        raise RunFailure(
            f"after step {steps} the workers of this run differ in {different[0]} and {len(different) - 1} more: they "
            "need the same version, the same kind of device and checkpoints that all of them can read"
        )


def held(body: nn.Module, heads: nn.Module, method: Mapping[str, Any]) -> dict[str, Tensor]:
    """What all workers must hold alike, by name."""
    return {
        **{f"encoder.{name}": parameter for name, parameter in body.named_parameters()},
        **{f"heads.{name}": parameter for name, parameter in heads.named_parameters()},
        **{f"method.{name}": value for name, value in method.items() if isinstance(value, Tensor)},
    }


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as whole numbers: a change of any one entry changes it."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(words).sum(dtype=torch.int64)
