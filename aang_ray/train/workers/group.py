"""The processes that train one run together, and the few messages that they may send each other.

Tensors go over the device's own network (NCCL on GPUs, gloo on CPUs); what the host alone must know (a signal, a
failure) goes over a gloo group, so that it never waits for a device.
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
        with losing():
            tensors = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo", timeout=timeout)
            control = dist.new_group(backend="gloo", timeout=timeout)
        return cls(rank, size, tensors, control, timeout)

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


# --- train.parallel.traffic: How many bytes a step hands to the network.


@dataclass
class Traffic:
    """Bytes of the tensors that one worker summed up with the others, or sent them, in one step.

    A sum over W workers by a ring moves 2 (W - 1) / W times these bytes in and out of each of them.
    """

    body: int = 0
    """The body's update: its parameters, once."""
    heads: int = 0
    """The heads that some worker used."""
    scalars: int = 0
    """Losses, inner products and norms."""
    rows: int = 0
    """Rows of a tied table that several workers looked up, for the norm of the joint gradient."""
    parts: int = 0
    """Gradients of segments that several workers share, summed among these."""
    separate: int = 0
    """Gradients of all segments, for methods that ask for them."""
    parameters: int = 0
    """Updated parameters, sent by whoever has their optimiser state (`sharded`)."""
    control: int = 0
    """Messages between hosts."""

    @property
    def total(self) -> int:
        return sum(astuple(self))


# --- train.parallel.agreement: All workers get through a part of a step, or none does; and all have the same parameters, or the run ends.


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


# --- train.parallel.sharded: ZeRO-1: each worker keeps the optimiser's state of its share of the parameters alone (Rajbhandari et al. 2020).


class Sharded(ZeroRedundancyOptimizer):
    """PyTorch's optimiser of shards; after its step every worker sends the parameters that it updated."""

    def __init__(self, plain: Optimizer, workers: Workers) -> None:
        """Takes groups, rates and settings of an optimiser that has not made a step."""
        known = signature(type(plain)).parameters  # some defaults are no settings
        defaults = {name: value for name, value in plain.defaults.items() if name in known}
        super().__init__(
            [dict(group) for group in plain.param_groups], type(plain), process_group=workers.tensors, **defaults
        )
        self._workers = workers
        self.bytes = sum(p.nbytes for group in self.param_groups for p in group["params"])
        """What the workers send each other in a step: every parameter once."""

    def step(self, closure: Any = None, **settings: Any) -> Any:
        with losing():
            return super().step(closure, **settings)

    def state_dict(self) -> dict[str, Any]:
        """As an optimiser that is not sharded has it, on the first worker; called by all. Nothing on the others."""
        with losing():
            self.consolidate_state_dict(to=0)
        if not self._workers.first:
            return {}
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this worker's share of a state, sharded or not when it was saved."""
        # The original forgets what is not its own in the dictionary that it is given.
        super().load_state_dict({**state_dict, "state": dict(state_dict["state"])})
        for parameter, state in self.optim.state.items():
            step = state.get("step")
            if isinstance(step, torch.Tensor) and self.optim.defaults.get("fused"):
                state["step"] = step.to(parameter.device)


# --- train.parallel.scoring: A split is scored by all workers together: worker r predicts the examples r, r + W, r + 2 W, ...


def gathered(workers: Workers, own: Predictions, classes: int) -> Predictions:
    """The whole split's predictions in the split's order, from each worker's own; the same on all to the last bit."""
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
