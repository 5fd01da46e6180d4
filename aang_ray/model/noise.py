"""Noise on input embeddings, whatever the family does with them next.

Shape suffixes: R rows, L columns, W width of the embeddings, N noised tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from aang_ray.model.inputs import TokenInputs


@contextmanager
def noised(table: nn.Embedding, inputs: TokenInputs) -> Iterator[None]:
    """What the table looks up inside the block gets the inputs' noise, where they have some.

    A constant is added, so that the gradient of the table is as without.
    """
    noised_N, noise_NW = inputs.noised_N, inputs.noise_NW
    if noised_N is None or noise_NW is None:
        yield
        return

    def add(_module: nn.Module, _args: object, looked_up_RLW: Tensor) -> Tensor:
        flat_TW = looked_up_RLW.flatten(0, 1)
        return flat_TW.index_add(0, noised_N, noise_NW.to(flat_TW.dtype)).view_as(looked_up_RLW)

    handle = table.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
