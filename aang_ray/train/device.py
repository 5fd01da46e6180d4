"""Choice of device and precision for a run, and of the number of examples in a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from aang_ray.config.run import RunConfig
from aang_ray.errors import RunFailure, UserError

ACTIVATION_SHARE = 0.5
"""Share of the free memory that activations may take; the backward pass needs the rest for gradients and buffers."""


@dataclass(frozen=True)
class Compute:
    """Device and precision of a run."""

    device: torch.device
    precision: str
    """`fp32`, `medium` (fp32 with reduced-precision matrix products) or `bf16` (autocast)."""

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context with bf16 matrix products if the precision is bf16; parameters stay fp32."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    @property
    def device_name(self) -> str:
        """The device as the store names it: the GPU's name, or the number of CPU threads."""
        if self.device.type == "cuda":
            return f"cuda ({torch.cuda.get_device_name(self.device)})"
        return f"cpu ({torch.get_num_threads()} threads)"


def choose_compute(config: RunConfig) -> Compute:
    """Choose device and precision of a run, and set PyTorch's threads and matmul precision.

    `auto` chooses CUDA if there is a GPU, and bf16 if the device supports it natively, else fp32.

    Raises:
        UserError: A GPU is asked for and there is none.
    """
    wanted = config.resources.device
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("resources.device: cuda was asked for and this machine has no usable GPU; use auto or cpu")
    kind = "cuda" if wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available()) else "cpu"
    if config.resources.threads is not None:
        torch.set_num_threads(config.resources.threads)
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if _has_native_bf16(kind) else "fp32"
    torch.set_float32_matmul_precision("medium" if precision == "medium" else "highest")
    return Compute(torch.device(kind), precision)


def _has_native_bf16(kind: str) -> bool:
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


class MicroBatch:
    """The largest number of examples in one forward pass: `wanted`, at most the number of a whole step, `texts`.

    With `auto` (None) it is estimated once from the activation memory of one example, and halved whenever a step runs
    out of memory. Accumulation over pieces does not change the result.
    """

    def __init__(self, wanted: int | None, texts: int) -> None:
        self.fixed = wanted is not None
        self.texts = min(wanted, texts) if wanted is not None else texts

    def fit(self, bytes_per_text: float, free: int) -> None:
        """Lower the number so that activations should fit into `free` bytes, unless the user has set it."""
        if not self.fixed:
            self.texts = max(1, min(self.texts, int(ACTIVATION_SHARE * free / max(bytes_per_text, 1.0))))

    def halve(self) -> None:
        """Halve the number of examples.

        Raises:
            RunFailure: The number is 1 or set by the user; the message says what to lower.
        """
        if self.fixed or self.texts == 1:
            raise RunFailure(
                f"out of memory with {self.texts} texts in a forward pass: lower batch.micro, data.max_tokens, "
                "batch.auxiliary, n or encoder.layers, or set gradients.checkpointing=true"
            )
        self.texts = max(1, self.texts // 2)


def activation_bytes(forward: Callable[[], object]) -> int:
    """Return the bytes that a forward pass keeps for its backward pass; shared storage counts once."""
    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        # Without detach, a saved output would refer to its own graph node, and graph and model would never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        forward()
    return sum(seen.values())


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that memory ran out, on a GPU or on the CPU."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
