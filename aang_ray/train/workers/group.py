"""The processes that train one run together: their messages, their agreement, and what they share out.

Tensors go over the device's network (NCCL on GPUs, gloo on CPUs). What only the host must know (a signal, a failure)
goes over a gloo group of its own, so that it never waits for a device.

- `Workers`: sums, broadcasts and small messages between hosts; `Traffic` counts the bytes of a step.
- `Agreement`, `check_same`: all workers get through a step or none does, and all have the same parameters.
- `Sharded`, `gathered`: each worker keeps a part of the optimiser's state, and scores a part of a split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from datetime import timedelta
from inspect import signature
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from aang_ray.errors import RunFailure, UserError
from aang_ray.train.evaluate import Predictions

TIMEOUT = timedelta(minutes=10)
"""How long a worker waits for the others: longer than any step, evaluation or checkpoint takes."""
TEXT_BYTES = 1024
"""Length to which a message between hosts is cut."""


class WorkerLost(RuntimeError):
    """Another worker of the run ended or cannot be reached; nothing is wrong with this worker or with the run."""


@contextmanager
def raising_worker_lost() -> Iterator[None]:
    """Raise `WorkerLost` for an error of communication inside the block; which worker is gone is not known."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise WorkerLost(f"another worker of this run ended or cannot be reached ({reason})") from error


@dataclass(frozen=True)
class Workers:
    """The group of processes that this one belongs to. Every method does nothing in a process alone.

    All workers must make the same calls in the same order. Every call that waits for the others raises `WorkerLost`
    if one of them has ended or cannot be reached.
    """

    rank: int = 0
    size: int = 1
    tensors: dist.ProcessGroup | None = None
    """Sends tensors on the device."""
    control: dist.ProcessGroup | None = None
    """Sends messages between hosts."""
    timeout: timedelta = TIMEOUT
    _groups: dict[tuple[int, ...], dist.ProcessGroup] = field(default_factory=dict, repr=False)

    @classmethod
    def alone(cls) -> Workers:
        """Return the group of a process that trains alone."""
        return cls()

    @classmethod
    def connect(cls, rank: int, size: int, device: torch.device, timeout: timedelta = TIMEOUT) -> Workers:
        """Return the group of all processes of `torch.distributed`, whose default group must exist already.

        Args:
            rank: Number of this process.
            size: How many processes there are.
            device: Where this process keeps its tensors.
            timeout: How long to wait for another process before it counts as lost.
        """
        if size == 1:
            return cls.alone()
        with raising_worker_lost():
            tensors = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=timeout)
            control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(rank, size, tensors, control, timeout)

    @property
    def first(self) -> bool:
        """Whether this worker writes files for all."""
        return self.rank == 0

    def sum_(self, tensor: Tensor, members: Sequence[int] | None = None) -> None:
        """Replace a tensor by its sum over all workers, or over `members`, of which this one must be one."""
        if self.size > 1:
            with raising_worker_lost():
                dist.all_reduce(tensor, group=self.tensors if members is None else self._groups[tuple(members)])

    def sum_later(self, tensor: Tensor) -> Pending:
        """Begin to replace a tensor by its sum over all workers; other work can go on meanwhile."""
        if self.size == 1:
            return Pending(None)
        with raising_worker_lost():
            return Pending(dist.all_reduce(tensor, group=self.tensors, async_op=True))

    def broadcast_(self, tensor: Tensor, source: int = 0) -> None:
        """Replace a tensor on the device by that of the worker `source`."""
        if self.size > 1:
            with raising_worker_lost():
                dist.broadcast(tensor, source, group=self.tensors)

    def sum_in_host_(self, tensor: Tensor) -> None:
        """Replace a tensor in host memory by its sum over all workers."""
        if self.size > 1:
            with raising_worker_lost():
                dist.all_reduce(tensor, group=self.control)

    def join(self, members: Sequence[int]) -> None:
        """Make the sub-group of these ranks if it does not exist yet. All workers must call it, members or not."""
        key = tuple(members)
        if key not in self._groups:
            with raising_worker_lost():
                group = dist.new_group(list(key), timeout=self.timeout, backend=dist.get_backend(self.tensors))
            assert isinstance(group, dist.ProcessGroup) or self.rank not in key
            self._groups[key] = group

    def max_host(self, values: Sequence[int]) -> list[int]:
        """Return, element by element, the largest of all workers' numbers."""
        if self.size == 1:
            return list(values)
        gathered = torch.tensor(values, dtype=torch.int64)
        with raising_worker_lost():
            dist.all_reduce(gathered, dist.ReduceOp.MAX, group=self.control)
        return [int(value) for value in gathered]

    def any_host(self, flag: bool) -> bool:
        """Return whether the flag is true on any worker."""
        return bool(self.max_host([int(flag)])[0])

    def sum_host(self, values: Sequence[float]) -> list[float]:
        """Return, element by element, the sum of all workers' numbers."""
        if self.size == 1:
            return list(values)
        gathered = torch.tensor(values, dtype=torch.float64)
        with raising_worker_lost():
            dist.all_reduce(gathered, group=self.control)
        return [float(value) for value in gathered]

    def text_of(self, text: str, source: int) -> str:
        """Return the text of the worker `source`, cut to `TEXT_BYTES`."""
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
        """Return when every worker has made this call."""
        self.any_host(False)


class Pending:
    """A sum that has begun."""

    def __init__(self, work: dist.Work | None) -> None:
        self._work = work

    def wait(self) -> None:
        """Let the device (on a CPU: this thread) wait for the sum before it does anything else."""
        if self._work is not None:
            with raising_worker_lost():
                self._work.wait()


@dataclass
class Traffic:
    """Bytes of the tensors that one worker sums up with the others, or sends them, in one step.

    A ring moves 2 (W - 1) / W times the bytes of a sum in and out of each of W workers.
    """

    body: int = 0
    """The body's update."""
    heads: int = 0
    """The update of the heads that some worker used."""
    scalars: int = 0
    """Losses, inner products and norms."""
    rows: int = 0
    """Rows of a tied table that several workers looked up, for the norm of the joint gradient."""
    parts: int = 0
    """Gradients of segments that several workers share, summed among these."""
    separate: int = 0
    """Gradients of all segments, for methods that ask for them."""
    parameters: int = 0
    """Updated parameters, sent by the worker that has their optimiser state (`sharded`)."""
    control: int = 0
    """Messages between hosts."""

    @property
    def total(self) -> int:
        return sum(astuple(self))


# What an error of a worker was, as a number that can be sent.
_NONE, _RUN, _USER, _OTHER = range(4)


class Agreement:
    """Context manager: an error of one worker inside the block ends the step on all; else `flags` become those of any.

    A failure of the run (`RunFailure`, `UserError`) is raised on all workers. After any other error, which the worker
    itself raises, the others raise `WorkerLost`.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.flags: list[bool] = []
        """Set inside the block, as many on every worker; afterwards each is true if it was on any worker."""

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, WorkerLost) or not (error is None or isinstance(error, Exception)):
            return  # the others cannot be asked, or this process is told to end
        workers = self._workers
        kinds = [_NONE] * workers.size
        if error is not None:
            kinds[workers.rank] = (
                _RUN if isinstance(error, RunFailure) else _USER if isinstance(error, UserError) else _OTHER
            )
        found = workers.max_host([*kinds, *map(int, self.flags)])
        failed = next((rank for rank in range(workers.size) if found[rank] != _NONE), None)
        if failed is None:
            self.flags = [bool(flag) for flag in found[workers.size :]]
            return
        text = workers.text_of(f"{error}", failed)
        if error is not None:
            return  # its own error is raised
        if found[failed] == _OTHER:
            raise WorkerLost(f"worker {failed} of this run failed: {text}")
        raise RunFailure(text) if found[failed] == _RUN else UserError(text)


def check_same(workers: Workers, steps: int, named: Mapping[str, Tensor]) -> None:
    """Make sure that all workers have made as many steps and have the same tensors; waits for the device.

    Args:
        workers: The workers of the run.
        steps: How many steps this worker has made.
        named: This worker's tensors by name; they are compared by checksums.

    Raises:
        RunFailure: If they differ; it names the first difference.
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


def replicated(body: nn.Module, heads: nn.Module, method: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that must be the same on all workers, by name."""
    return {
        **{f"encoder.{name}": parameter for name, parameter in body.named_parameters()},
        **{f"heads.{name}": parameter for name, parameter in heads.named_parameters()},
        **{f"method.{name}": value for name, value in method.items() if isinstance(value, Tensor)},
    }


def _checksum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's entries, their bits read as integers: a change of any one entry changes it."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(words).sum(dtype=torch.int64)


class Sharded(ZeroRedundancyOptimizer):
    """ZeRO-1: each worker keeps the optimiser's state of its share of the parameters (Rajbhandari et al. 2020).

    After a step every worker sends the others the parameters that it updated.

    Args:
        plain: An optimiser that has not made a step; its groups, rates and settings are taken over.
        workers: The workers of the run.
    """

    def __init__(self, plain: Optimizer, workers: Workers) -> None:
        known = signature(type(plain)).parameters  # `defaults` also has entries that are no arguments
        defaults = {name: value for name, value in plain.defaults.items() if name in known}
        super().__init__(
            [dict(group) for group in plain.param_groups], type(plain), process_group=workers.tensors, **defaults
        )
        self._workers = workers
        self.bytes = sum(p.nbytes for group in self.param_groups for p in group["params"])
        """How many bytes the workers send each other in a step: every parameter once."""

    def step(self, closure: Any = None, **settings: Any) -> Any:
        with raising_worker_lost():
            return super().step(closure, **settings)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of an unsharded optimiser on the first worker, nothing on the others; all must call it."""
        with raising_worker_lost():
            self.consolidate_state_dict(to=0)
        if not self._workers.first:
            return {}
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this worker's share of a state, whether it was sharded when it was saved or not."""
        # PyTorch deletes the other workers' part from the dictionary that it is given.
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
        for parameter, state in self.optim.state.items():
            step = state.get("step")
            if isinstance(step, torch.Tensor) and self.optim.defaults.get("fused"):
                state["step"] = step.to(parameter.device)


def gathered(workers: Workers, own: Predictions, classes: int) -> Predictions:
    """Return a whole split's predictions in the split's order; all workers get the same to the last bit.

    Args:
        workers: The workers of the run; worker r predicts the examples r, r + W, r + 2 W, ...
        own: This worker's predictions.
        classes: Number of classes.
    """
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
