"""The processes that train one run together, and the few messages that they may send each other.

Tensors go over the device's own network (NCCL on GPUs, gloo on CPUs); what the host alone must know (a signal, a
failure) goes over a gloo group, so that it never waits for a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist

TIMEOUT = timedelta(minutes=10)
"""How long a worker waits for the others: longer than any step, evaluation or checkpoint takes."""
TEXT_BYTES = 1024


class WorkerLost(RuntimeError):
    """Another worker of the run ended or can no longer be reached: nothing is wrong with this one or with the run."""


@dataclass(frozen=True)
class Workers:
    """Rank and size of the group that this process belongs to; every method is a no-op for a process alone.

    Collective calls must be made by all workers in the same order.

    Raises:
        WorkerLost: from every call that waits for the others.
    """

    rank: int = 0
    size: int = 1
    tensors: dist.ProcessGroup | None = None
    """For tensors on the device."""
    control: dist.ProcessGroup | None = None
    """For messages between hosts."""
    timeout: timedelta = TIMEOUT
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict, repr=False)

    @classmethod
    def alone(cls) -> Workers:
        """The only process of its run."""
        return cls()

    @classmethod
    def from_environment(cls, device: torch.device, timeout: timedelta = TIMEOUT) -> Workers:
        """All processes of the initialised default group of `torch.distributed`; alone where there is none."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls.alone()
        with losing():
            tensors = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=timeout)
            control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), tensors, control, timeout)

    @property
    def first(self) -> bool:
        """Whether this worker reports and writes for all."""
        return self.rank == 0

    def sum_(self, tensor: Tensor, members: Sequence[int] | None = None) -> None:
        """Replace a tensor by its sum over all workers, or over `members`, of which this one must be one."""
        if self.size > 1:
            with losing():
                dist.all_reduce(tensor, group=self.tensors if members is None else self._groups[tuple(members)])

    def sum_later(self, tensor: Tensor) -> Pending:
        """Begin to replace a tensor by its sum over all workers, while other work goes on."""
        if self.size == 1:
            return Pending(None)
        with losing():
            return Pending(dist.all_reduce(tensor, group=self.tensors, async_op=True))

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        """Replace a tensor, on the device, by that of one worker."""
        if self.size > 1:
            with losing():
                dist.broadcast(tensor, source, group=self.tensors)

    def sum_in_host_(self, tensor: Tensor) -> None:
        """Replace a tensor in host memory by its sum over all workers."""
        if self.size > 1:
            with losing():
                dist.all_reduce(tensor, group=self.control)

    def join(self, members: Sequence[int]) -> None:
        """Make the sub-group of these ranks where it does not exist yet; called by all workers."""
        key = tuple(members)
        if key not in self._groups:
            with losing():
                group = dist.new_group(list(key), timeout=self.timeout, backend=dist.get_backend(self.tensors))
            assert isinstance(group, dist.ProcessGroup) or self.rank not in key
            self._groups[key] = group

    def max_host(self, values: Sequence[int]) -> list[int]:
        """Element by element the largest of all workers' host numbers."""
        if self.size == 1:
            return list(values)
        gathered = torch.tensor(values, dtype=torch.int64)
        with losing():
            dist.all_reduce(gathered, dist.ReduceOp.MAX, group=self.control)
        return [int(value) for value in gathered]

    def any_host(self, flag: bool) -> bool:
        """Whether any worker says so."""
        return bool(self.max_host([int(flag)])[0])

    def sum_host(self, values: Sequence[float]) -> list[float]:
        """Element by element the sum of all workers' host numbers."""
        if self.size == 1:
            return list(values)
        gathered = torch.tensor(values, dtype=torch.float64)
        with losing():
            dist.all_reduce(gathered, group=self.control)
        return [float(value) for value in gathered]

    def text_of(self, text: str, source: int) -> str:
        """One worker's text (its first kilobyte), known to all."""
        if self.size == 1:
            return text
        encoded = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
        if self.rank == source:
            raw = text.encode()[:TEXT_BYTES]
            encoded[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else encoded[:0]
        with losing():
            dist.broadcast(encoded, source, group=self.control)
        return bytes(encoded.tolist()).rstrip(b"\0").decode(errors="ignore")

    def wait_for_all(self) -> None:
        """Return when every worker has come here."""
        self.any_host(False)


class Pending:
    """A sum that is on its way."""

    def __init__(self, work: dist.Work | None) -> None:
        self._work = work

    def wait(self) -> None:
        """Let what follows on the device (on a CPU: this thread) wait for the sum.

        Raises:
            WorkerLost: where it will never come.
        """
        if self._work is not None:
            with losing():
                self._work.wait()


@contextmanager
def losing() -> Iterator[None]:
    """An error of communication says that another worker is gone; which one, the network does not know."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise WorkerLost(f"another worker of this run ended or cannot be reached ({reason})") from error
