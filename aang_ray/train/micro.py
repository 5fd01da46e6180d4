"""How many texts fit into one forward pass.

`batch.micro: auto` estimates it once from the memory that one text's activations take, and halves it
whenever a step still runs out. Accumulation does not change the result.
"""

from __future__ import annotations

from collections.abc import Callable

import psutil
import torch

from aang_ray.errors import RunFailure

SHARE = 0.5
"""Share of the free memory that activations may take: gradients and buffers of the backward pass need theirs."""


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def activation_bytes(forward: Callable[[], object]) -> int:
    """Bytes that a forward pass keeps for its backward pass, each storage counted once."""
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return (
            tensor.detach()
        )  # an output that leads back to its own node would keep the graph, and the model, for ever

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


class MicroBatch:
    """The most texts in one piece; halves when a step runs out of memory."""

    def __init__(self, wanted: int | None, texts: int) -> None:
        self.fixed = wanted is not None
        self.texts = min(wanted, texts) if wanted is not None else texts

    def fit(self, bytes_per_text: float, free: int) -> None:
        """Start with what should fit; nothing to do where the user has said."""
        if not self.fixed:
            self.texts = max(1, min(self.texts, int(SHARE * free / max(bytes_per_text, 1.0))))

    def halve(self) -> None:
        """Take half as many texts.

        Raises:
            RunFailure: if that is not possible, naming what to lower.
        """
        if self.fixed or self.texts == 1:
            raise RunFailure(
                f"out of memory with {self.texts} texts in a forward pass: lower batch.micro, data.max_tokens, "
                "batch.auxiliary, n or encoder.layers, or set gradients.checkpointing=true"
            )
        self.texts = max(1, self.texts // 2)
