"""The gradient leak test: no output may depend on a token that it must not see (semantics section 8).

For every position i and every input j that i must not see, the derivative of i's output with respect
to j's embedding has to be exactly 0, through all layers; and some visible token other than i itself
has to matter, or nothing was tested.

Shape suffixes: R rows (one representation each), L columns, W width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from aang_ray.errors import UserError
from aang_ray.model.encoder import Encoder
from aang_ray.model.inputs import TokenInputs

# A row holds a text of five tokens, one of four, and two columns of padding.
_LENGTHS = (5, 4)
_COLUMNS = 11
# Ranks, and key ranks where they differ, of the longer text; the shorter one takes its beginning. -9 and 9:
# the first token is seen by all and sees itself alone, or sees all and is seen by nobody (semantics section 2.5).
_RANKS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "bidirectional": ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    "left-to-right": ((-9, 2, 4, 6, 8), (-9, 2, 4, 6, 8)),
    "right-to-left": ((-9, 8, 6, 4, 2), (-9, 8, 6, 4, 2)),
    "random-factorized": ((-9, 6, 2, 8, 4), (-9, 6, 2, 8, 4)),
    "random-factorized (first token last)": ((9, 6, 2, 8, 4), (9, 6, 2, 8, 4)),
    "random-factorized (with queries)": ((-9, 4, 2, 3, 1), (-9, 4, 2, 9, 9)),
}


def check_no_leak(encoder: Encoder) -> None:
    """Refuse an encoder whose attention does not obey the visibility that it is given.

    Runs in eval mode on a few random tokens; leaves mode, random state and gradients as they were.

    Raises:
        UserError: names the encoder's type and the representation that leaked.
    """
    table = encoder.word_embeddings
    inputs = _probe(encoder.vocab_size).to(table.weight.device)
    with _eval_mode(encoder), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        try:
            influence_RLL = _influence(encoder, table, inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"encoder of type {encoder.model_type!r} cannot be told who sees whom: {error}") from error
    visible_RLL = inputs.visibility_RLL()
    self_LL = torch.eye(_COLUMNS, dtype=torch.bool, device=visible_RLL.device)
    leaks_R = ((influence_RLL != 0) & ~visible_RLL).flatten(1).any(1).tolist()
    context_RL = (visible_RLL & ~self_LL).any(2)
    used_RL = ((influence_RLL != 0) & visible_RLL & ~self_LL).any(2)
    deaf_R = (context_RL & ~used_RL & (inputs.texts_RL >= 0)).any(1).tolist()
    for name, leaks, deaf in zip(_RANKS, leaks_R, deaf_R, strict=True):
        if leaks:
            raise UserError(
                f"encoder of type {encoder.model_type!r} does not obey its attention mask: under {name} visibility "
                "an output depends on a token that it must not see"
            )
        if deaf:
            raise UserError(
                f"encoder of type {encoder.model_type!r} ignores its context: under {name} visibility "
                "an output depends on no token but its own"
            )


def _probe(vocab_size: int) -> TokenInputs:
    """One row a representation, each with the same two packed texts and padding."""
    rows = len(_RANKS)
    padding = _COLUMNS - sum(_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    ranks, key_ranks = (
        torch.tensor([order[k] + order[k][: _LENGTHS[1]] + (0,) * padding for order in _RANKS.values()]) for k in (0, 1)
    )
    firsts = [row * _COLUMNS + start for row in range(rows) for start in (0, _LENGTHS[0])]
    positions = [*range(_LENGTHS[0]), *range(_LENGTHS[1]), *[0] * padding]
    return TokenInputs(
        ids_RL=torch.randint(vocab_size, (rows, _COLUMNS), generator=generator),
        positions_RL=torch.tensor(positions).expand(rows, -1).contiguous(),
        ranks_RL=ranks.int(),
        key_ranks_RL=key_ranks.int(),
        texts_RL=torch.tensor([_texts(row, padding) for row in range(rows)], dtype=torch.int32),
        first_E=torch.tensor(firsts),
        lengths_E=torch.tensor(_LENGTHS * rows),
    )


def _texts(row: int, padding: int) -> Sequence[int]:
    return [2 * row] * _LENGTHS[0] + [2 * row + 1] * _LENGTHS[1] + [-1] * padding


def _influence(encoder: Encoder, table: nn.Embedding, inputs: TokenInputs) -> Tensor:
    """Largest derivative of a random projection of output i with respect to embedding j: [R, L, L]."""
    seen: list[Tensor] = []

    def capture(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    handle = table.register_forward_hook(capture)
    try:
        with torch.autocast(inputs.ids_RL.device.type, enabled=False):
            hidden_RLH = encoder(inputs)
    finally:
        handle.remove()
    projected_RL = hidden_RLH @ torch.randn(encoder.hidden_size, dtype=hidden_RLH.dtype, device=hidden_RLH.device)
    columns = []
    for column in range(_COLUMNS):
        # Rows do not touch each other, so that one backward pass serves the column in all of them.
        (gradient_RLW,) = torch.autograd.grad(projected_RL[:, column].sum(), seen[0], retain_graph=True)
        columns.append(gradient_RLW.abs().amax(2))
    return torch.stack(columns, dim=1)


@contextmanager
def _eval_mode(encoder: Encoder) -> Iterator[None]:
    training = {name: module.training for name, module in encoder.named_modules()}
    encoder.eval()
    try:
        yield
    finally:
        for name, module in encoder.named_modules():
            module.training = training[name]
