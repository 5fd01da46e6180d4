"""What the steps' losses were since the last evaluation, and whether they are still numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aang_ray.errors import RunFailure


class LossLog:
    """Keeps each step's losses on the device and reads them every `check_every` steps.

    Reading waits for the device, so a GPU is read at evaluations, a CPU at every step.
    """

    def __init__(self, check_every: int) -> None:
        self.check_every = check_every
        self._unread: list[tuple[int, Sequence[str], Tensor]] = []
        self._last: dict[str, float] = {}
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, step: int, names: Sequence[str], losses_S: Tensor) -> None:
        """Losses of a step's segments; a segment without a name is left out.

        Raises:
            RunFailure: for a loss that is not finite.
        """
        self._unread.append((step, names, losses_S.detach()))
        if len(self._unread) >= self.check_every:
            self.read()

    def read(self) -> None:
        """Bring the kept losses to the host and check them.

        Raises:
            RunFailure: naming the step, the objective and its last finite loss.
        """
        if not self._unread:
            return
        flat = torch.cat([losses_S for _, _, losses_S in self._unread]).tolist()
        start = 0
        for step, names, losses_S in self._unread:
            for name, value in zip(names, flat[start : start + len(losses_S)], strict=True):
                if name:
                    self._take(step, name, value)
            start += len(losses_S)
        self._unread.clear()

    def means(self) -> dict[str, float]:
        """Mean loss by name since the last call."""
        self.read()
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums.clear()
        return means

    def state_dict(self) -> dict[str, Any]:
        """Everything read so far, as plain numbers.

        Raises:
            RunFailure: for a loss that is not finite.
        """
        self.read()
        return {"last": dict(self._last), "sums": {name: list(sums) for name, sums in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._last = dict(state["last"])
        self._sums = {name: (total, count) for name, (total, count) in state["sums"].items()}

    def _take(self, step: int, name: str, value: float) -> None:
        if not math.isfinite(value):
            last = self._last.get(name)
            before = "it had none before" if last is None else f"its last finite loss was {last:.4g}"
            raise RunFailure(
                f"step {step}: the loss of {name} is {value}, {before}; lower optim.body_lr, "
                "optim.head_lr or a rate of the method's own, or set precision=fp32"
            )
        self._last[name] = value
        total, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (total + value, count + 1)
