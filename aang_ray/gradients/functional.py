"""Call a computation at other parameters than those that its modules hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.func import functional_call

A = TypeVar("A")


def called_at(
    parameters: Mapping[str, Tensor], modules: nn.Module, function: Callable[[A], Tensor], argument: A
) -> Any:
    """`function(argument)` with the modules' parameters replaced for the time of the call.

    `function` may hold the modules in any way: while it runs they hold the tensors of `parameters`, named as in
    `modules.named_parameters()`, and what it computes is differentiable with respect to those.
    """
    named = {f"modules_.{name}": value for name, value in parameters.items()}
    return functional_call(_Closure(modules, function), named, (argument,))


class _Closure(nn.Module):
    """Makes a function a module, so that `functional_call` finds the parameters to replace."""

    def __init__(self, modules: nn.Module, function: Callable[[A], Tensor]) -> None:
        super().__init__()
        self.modules_ = modules
        self._function: Callable[[Any], Tensor] = function

    def forward(self, argument: Any) -> Tensor:
        return self._function(argument)
