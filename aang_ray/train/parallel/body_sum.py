"""The sum of the body's gradients over the workers, on its way while the backward pass goes on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from aang_ray.train.parallel.workers import Pending, Workers

BUCKET_BYTES = 25 * 2**20
"""Large enough for the network's full rate, small enough to begin early; PyTorch's own choice for data parallelism."""

Bucket = tuple[nn.Parameter, ...]


def buckets_of(parameters: Iterable[nn.Parameter], limit: int = BUCKET_BYTES) -> tuple[Bucket, ...]:
    """Parameters in reverse order, the order in which a backward pass completes them, about `limit` bytes together."""
    buckets: list[Bucket] = []
    bucket: list[nn.Parameter] = []
    room = limit
    for parameter in reversed(list(parameters)):
        size = parameter.numel() * parameter.element_size()
        if bucket and size > room:
            buckets.append(tuple(bucket))
            bucket, room = [], limit
        bucket.append(parameter)
        room -= size
    return (*buckets, tuple(bucket)) if bucket else tuple(buckets)


class BodySum:
    """One step's sums, bucket by bucket, in the same order on every worker.

    A bucket leaves when all its parameters are complete and the one before it has left. `.grad` is then a view of
    the bucket's buffer; where a worker has no gradient, zeros are sent.
    """

    def __init__(self, buckets: Sequence[Bucket], workers: Workers) -> None:
        self.buckets, self._workers = buckets, workers
        self._bucket_of = {p: number for number, bucket in enumerate(buckets) for p in bucket}
        self._waits_for = [len(bucket) for bucket in buckets]
        self._sent: list[Pending] = []
        self.bytes = 0
        self.touched: dict[nn.Parameter, bool] = {}
        """Whether this worker has a gradient, of every parameter that was sent."""

    def complete(self, parameter: nn.Parameter) -> None:
        """A parameter's `.grad` will not change any more."""
        self._waits_for[self._bucket_of[parameter]] -= 1
        while len(self._sent) < len(self.buckets) and self._waits_for[len(self._sent)] == 0:
            self._send(self.buckets[len(self._sent)])

    def complete_all(self) -> None:
        """No parameter's `.grad` will change any more."""
        for bucket in self.buckets[len(self._sent) :]:
            self._send(bucket)

    def wait(self) -> None:
        """Let what follows wait for all sums."""
        for pending in self._sent:
            pending.wait()

    @torch.no_grad()
    def _send(self, bucket: Bucket) -> None:
        flat = flattened(bucket)
        self.touched.update({p: p.grad is not None for p in bucket})
        view_gradients(bucket, flat)
        self.bytes += flat.nbytes
        self._sent.append(self._workers.sum_later(flat))


def flattened(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The gradients of parameters of one type end to end, zeros where there is none."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])


def view_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Let `.grad` of parameters be views of a vector of all of them."""
    start = 0
    for parameter in parameters:
        parameter.grad = flat[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
