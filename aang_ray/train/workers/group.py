"""The group of processes that train one run together, and their communication.

Tensors are sent with the device's backend (NCCL on GPUs, gloo on CPUs). Messages between hosts (signals, failures) use
a separate gloo group, so that they never wait for a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from aang_ray.errors import RunFailure, UserError
from aang_ray.train.evaluate import Predictions

TIMEOUT = timedelta(minutes=10)
"""Maximum time that a worker waits for the others: longer than any step, evaluation or checkpoint."""
TEXT_BYTES = 1024
"""Maximum length of a text message between hosts; longer texts are cut."""


class WorkerLost(RuntimeError):
    """Another worker of the run ended or cannot be reached; nothing is wrong with this worker or with the run."""


@contextmanager
def raising_worker_lost() -> Iterator[None]:
    """Raise `WorkerLost` for a communication error inside the block."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise WorkerLost(f"another worker of this run ended or cannot be reached ({reason})") from error


@dataclass(frozen=True)
class Workers:
    """The group of workers that this process belongs to. With a single worker, no method communicates.

    All workers must make the same calls in the same order. A call that waits for the others raises `WorkerLost` if one
    of them has ended or cannot be reached.
    """

    rank: int = 0
    size: int = 1
    tensors: dist.ProcessGroup | None = None
    """Group for tensors on the device."""
    control: dist.ProcessGroup | None = None
    """Group for messages between hosts."""
    timeout: timedelta = TIMEOUT
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict, repr=False)

    @classmethod
    def connect(cls, rank: int, size: int, device: torch.device, timeout: timedelta = TIMEOUT) -> Workers:
        """Return the group of all processes of `torch.distributed`, whose default group must exist already."""
        if size == 1:
            return cls()
        with raising_worker_lost():
            tensors = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=timeout)
            control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(rank, size, tensors, control, timeout)

    @property
    def first(self) -> bool:
        """Whether this is the worker that writes files."""
        return self.rank == 0

    def sum_(self, tensor: Tensor, members: Sequence[int] | None = None) -> None:
        """Replace a tensor on the device by its sum over all workers, or over the sub-group `members` (see `join`)."""
        if self.size > 1:
            with raising_worker_lost():
                dist.all_reduce(tensor, group=self.tensors if members is None else self._groups[tuple(members)])

    def sum_later(self, tensor: Tensor) -> Pending:
        """Begin to replace a tensor by its sum over all workers; `Pending.wait` completes it."""
        if self.size == 1:
            return Pending(None)
        with raising_worker_lost():
            return Pending(dist.all_reduce(tensor, group=self.tensors, async_op=True))

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        """Replace a tensor on the device by the tensor of worker `source`."""
        if self.size > 1:
            with raising_worker_lost():
                dist.broadcast(tensor, source, group=self.tensors)

    def sum_in_host_(self, tensor: Tensor) -> None:
        """Replace a tensor in host memory by its sum over all workers."""
        if self.size > 1:
            with raising_worker_lost():
                dist.all_reduce(tensor, group=self.control)

    def join(self, members: Sequence[int]) -> None:
        """Make the sub-group of these ranks if it does not exist yet. All workers must call this, also non-members."""
        key = tuple(members)
        if key not in self._groups:
            with raising_worker_lost():
                group = dist.new_group(list(key), timeout=self.timeout, backend=dist.get_backend(self.tensors))
            assert isinstance(group, dist.ProcessGroup) or self.rank not in key
            self._groups[key] = group

    def max_host(self, values: Sequence[int]) -> list[int]:
        """Return the element-wise maximum of all workers' numbers."""
        return self._reduced(torch.tensor(values, dtype=torch.int64), dist.ReduceOp.MAX)

    def sum_host(self, values: Sequence[float]) -> list[float]:
        """Return the element-wise sum of all workers' numbers."""
        return self._reduced(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.SUM)

    def _reduced(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> list[Any]:
        if self.size > 1:
            with raising_worker_lost():
                dist.all_reduce(values, operation, group=self.control)
        return values.tolist()

    def text_of(self, text: str, source: int) -> str:
        """Return the text that worker `source` passes, cut to `TEXT_BYTES`."""
        if self.size == 1:
            return text
        encoded = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
        if self.rank == source:
            raw = text.encode()[:TEXT_BYTES]
            encoded[: len(raw)] = torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else encoded[:0]
        with raising_worker_lost():
            dist.broadcast(encoded, source, group=self.control)
        return bytes(encoded.tolist()).rstrip(b"\0").decode(errors="ignore")

    def wait_for_all(self) -> None:
        self.max_host([0])


class Pending:
    """An asynchronous sum over all workers."""

    def __init__(self, work: dist.Work | None) -> None:
        self._work = work

    def wait(self) -> None:
        """Make later work on the device wait for the sum; on a CPU, wait for it in this thread."""
        if self._work is not None:
            with raising_worker_lost():
                self._work.wait()


_NONE, _RUN, _USER, _OTHER = range(4)
"""Kinds of a worker's error, as numbers that can be sent."""


@contextmanager
def agreed(workers: Workers) -> Iterator[list[bool]]:
    """End the block with an error on all workers if there is an error on one.

    `RunFailure` and `UserError` are raised on all workers. For any other error, the worker itself raises it and the
    others raise `WorkerLost`. The block may fill the yielded list with flags, equally many on every worker, each of
    which then becomes the "or" over all workers.
    """
    flags: list[bool] = []
    error, kinds = None, [_NONE] * workers.size
    try:
        yield flags
    except WorkerLost:
        raise  # the others cannot be reached
    except Exception as found:  # noqa: BLE001 (raised again below)
        error = found
        kinds[workers.rank] = (
            _RUN if isinstance(found, RunFailure) else _USER if isinstance(found, UserError) else _OTHER
        )
    largest = workers.max_host([*kinds, *map(int, flags)])
    failed = next((rank for rank in range(workers.size) if largest[rank] != _NONE), None)
    if failed is None:
        flags[:] = map(bool, largest[workers.size :])
        return
    text = workers.text_of(f"{error}", failed)
    if error is not None:
        raise error
    if largest[failed] == _OTHER:
        raise WorkerLost(f"worker {failed} of this run failed: {text}")
    raise RunFailure(text) if largest[failed] == _RUN else UserError(text)


def check_same(workers: Workers, steps: int, named: Mapping[str, Tensor]) -> None:
    """Check that all workers have made the same number of steps and have the same tensors, compared by checksums.

    Raises:
        RunFailure: They differ; the message names the first difference.
    """
    # Sums of the entries' bits, read as integers: changing any single entry changes the sum.
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = (tensor.detach().contiguous().view(words[tensor.element_size()]) for tensor in named.values())
    sums = [steps, *(int(word.sum(dtype=torch.int64)) for word in bits)]
    largest, least = workers.max_host(sums), workers.max_host([-value for value in sums])
    names = ("the number of steps", *named)
    different = [name for name, most, negative in zip(names, largest, least, strict=True) if most != -negative]
    if different:
        raise RunFailure(
            f"after step {steps} the workers of this run differ in {different[0]} and {len(different) - 1} more: they "
            "need the same version, the same kind of device and checkpoints that all of them can read"
        )


def gathered(workers: Workers, own: Predictions, classes: int) -> Predictions:
    """Return a whole split's predictions in its order on all workers; worker r predicts the examples r, r + W, ..."""
    if workers.size == 1:
        return own
    examples = round(workers.sum_host([len(own.labels_E)])[0])
    logits_EC = torch.zeros(examples, classes)
    labels_E = torch.zeros(examples, dtype=torch.int64)
    if len(own.labels_E):
        logits_EC[workers.rank :: workers.size] = own.logits_EC
        labels_E[workers.rank :: workers.size] = torch.from_numpy(own.labels_E)
    workers.sum_in_host_(logits_EC)
    workers.sum_in_host_(labels_E)
    return Predictions(logits_EC, labels_E.numpy())
