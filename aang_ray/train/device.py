"""Device and precision of a run, chosen from what the machine has, and stated."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import psutil
import torch

from aang_ray.config.run import RunConfig
from aang_ray.errors import RunFailure, UserError


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes."""

    device: torch.device
    precision: str
    """`fp32`, `medium` (fp32 with reduced-precision matrix products) or `bf16` (autocast)."""

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 matrix products where the precision says so; parameters and statistics stay fp32."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @property
    def device_name(self) -> str:
        """For the store: the kind of device, and of GPU its name."""
        if self.device.type == "cuda":
            return f"cuda ({torch.cuda.get_device_name(self.device)})"
        return f"cpu ({torch.get_num_threads()} threads)"


def choose_compute(config: RunConfig) -> Compute:
    """Device and precision of a configuration; sets PyTorch's threads and matmul precision.

    `auto`: CUDA if there is a GPU; bf16 where the device multiplies it natively, else fp32.

    Raises:
        UserError: for a GPU that is not there.
    """
    wanted = config.resources.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("resources.device: cuda was asked for and this machine has no usable GPU; use auto or cpu")
    kind = "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"
    if config.resources.threads is not None:
        torch.set_num_threads(config.resources.threads)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if _native_bf16(kind) else "fp32"
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    return Compute(torch.device(kind), precision)


def _native_bf16(kind: str) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


# --- train.micro: How many texts fit into one forward pass.
#
# `batch.micro: auto` estimates it once from the memory that one text's activations take, and halves it
# whenever a step still runs out. Accumulation does not change the result.


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
