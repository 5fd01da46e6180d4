"""All workers get through a part of a step, or none does; and all have the same parameters, or the run ends."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType

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


def check_same(workers: Workers, step: int, named: Iterable[tuple[str, Tensor]], learned: Sequence[Tensor]) -> None:
    """Refuse to go on where workers hold different parameters, method states or steps.

    Waits for the device.

    Raises:
        RunFailure: naming the first parameter that differs.
    """
    if workers.size == 1:
        return
    names, tensors = zip(*named, strict=True)
    names = ("the step", *names, *(f"the method's state {number}" for number in range(len(learned))))
    sums = torch.stack([_checksum(tensor) for tensor in (*tensors, *learned)]).tolist()
    values = [step, *sums]
    largest, smallest = workers.max_host(values), workers.max_host([-value for value in values])
    different = [name for name, most, least in zip(names, largest, smallest, strict=True) if most != -least]
    if different:
        raise RunFailure(
            f"step {step}: the workers of this run differ in {different[0]} (and {len(different) - 1} more); "
            "they must run the same version on the same kind of device and read the same checkpoint"
        )


def parameters_of(body: nn.Module, heads: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """All parameters by their qualified names."""
    for root, module in (("encoder", body), ("heads", heads)):
        for name, parameter in module.named_parameters():
            yield f"{root}.{name}", parameter


def _checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as integers: any single change moves it."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(words).sum(dtype=torch.int64)
