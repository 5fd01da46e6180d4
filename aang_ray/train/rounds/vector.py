"""All trained parameters of body and heads as one vector. Shape suffix: Q its entries."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ParameterVector:
    """Reads and writes the parameters that are trained; names are those of `modules.named_parameters()`."""

    def __init__(self, body: nn.Module, heads: nn.Module) -> None:
        self.modules = nn.ModuleDict({"body": body, "heads": heads})
        self._named = {name: p for name, p in self.modules.named_parameters() if p.requires_grad}

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self._named.values())

    def read(self) -> Tensor:
        """A copy, [Q]."""
        return torch.cat([p.detach().flatten() for p in self._named.values()])

    @torch.no_grad()
    def write(self, vector_Q: Tensor) -> None:
        """Give the parameters the vector's values."""
        for name, part in self.split(vector_Q).items():
            self._named[name].copy_(part)

    def split(self, vector_Q: Tensor) -> dict[str, Tensor]:
        """Views of a vector by name, each in its parameter's shape."""
        parts = torch.split(vector_Q, [p.numel() for p in self._named.values()])
        return {name: part.view_as(p) for (name, p), part in zip(self._named.items(), parts, strict=True)}
