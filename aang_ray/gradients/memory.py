"""Whether the gradients that a step wants to keep apart fit into memory."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
from torch import nn

from aang_ray.errors import UserError


def check_memory(body: Sequence[nn.Parameter], segments: int, lower: str = "n or encoder.layers") -> None:
    """Refuse a step that would hold S gradients of P entries where S * P * itemsize exceeds the free memory.

    Raises:
        UserError: names the bytes needed and free, and what to lower.
    """
    dtype = torch.promote_types(body[0].dtype, torch.float32)
    entries = sum(parameter.numel() for parameter in body)
    needed = segments * entries * dtype.itemsize
    free = _free(body[0].device)
    if needed > free:
        raise UserError(
            f"{segments} gradients of {entries} parameters need {needed} bytes, {free} are free on "
            f"{body[0].device.type}: lower {lower}"
        )


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
