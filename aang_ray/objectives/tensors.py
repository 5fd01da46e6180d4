"""Tensors of a batch on their way to the device."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

Part = TypeVar("Part", bound=Any)
"""A frozen dataclass; fields that are tensors take part."""


def moved(part: Part, device: torch.device) -> Part:
    """The same tensors on a device; the copy does not block where the memory is pinned."""
    return _replaced(part, {name: value.to(device, non_blocking=True) for name, value in _tensors(part).items()})


def pinned(part: Part) -> Part:
    """The same tensors in page-locked memory."""
    return _replaced(part, {name: value.pin_memory() for name, value in _tensors(part).items()})


def _tensors(part: Any) -> dict[str, Tensor]:
    values = {f.name: getattr(part, f.name) for f in fields(part)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _replaced(part: Part, tensors: dict[str, Any]) -> Part:
    result: Part = replace(part, **tensors)
    return result
