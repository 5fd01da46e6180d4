"""Device and precision of a run, chosen from what the machine has, and stated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError


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
