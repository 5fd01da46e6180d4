"""The body: a pretrained encoder whose attention follows a given visibility, and pooling of texts into vectors.

Shape suffixes: R rows, L columns, T = R * L positions, E texts, H hidden size, W width of the embeddings, N noised
tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from aang_ray.errors import UserError
from aang_ray.model.attention import TokenInputs, adapter_for, position_offset
from aang_ray.model.training_attention import use_training_attention

Pooling = Literal["first", "mean"]


@contextmanager
def noised(table: nn.Embedding, inputs: TokenInputs) -> Iterator[None]:
    """Add the inputs' noise, a constant, to the embeddings that the table returns inside the block."""
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


class Encoder(nn.Module):
    """A transformer encoder without heads: theta of docs/semantics.md, section 1.

    Args:
        body: a Hugging Face model that returns `last_hidden_state` and uses every parameter in its forward.
        pooling: how texts become vectors, see `pool`.

    Raises:
        UserError: if the visibility of this family cannot be set.
    """

    def __init__(self, body: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        settings: Any = body.config
        self.body = body
        self.pooling = pooling
        self.model_type: str = settings.model_type
        self.hidden_size: int = settings.hidden_size
        self.vocab_size: int = self.word_embeddings.num_embeddings
        self.max_tokens: int = settings.max_position_embeddings - position_offset(body)
        """Maximum number of tokens of a text, including special tokens."""
        self.initializer_range: float = getattr(settings, "initializer_range", 0.02)
        """Standard deviation of the family's weight initialisation."""
        self._adapter = adapter_for(body)
        use_training_attention(body)

    @property
    def word_embeddings(self) -> nn.Embedding:
        """The token embedding table, whose width may differ from the hidden size."""
        body: Any = self.body
        table = body.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def positions_given(self) -> bool:
        """Whether tokens may be in any order in their row, because only position ids determine positions."""
        return self._adapter.positions_given

    def forward(self, inputs: TokenInputs) -> Tensor:
        with noised(self.word_embeddings, inputs):
            return self._adapter(self.body, inputs)

    def pool(self, hidden_RLH: Tensor, inputs: TokenInputs) -> Tensor:
        """Return each text's vector, [E, H]: the hidden state of its first token, or the mean over its tokens."""
        flat_TH = hidden_RLH.flatten(0, 1)
        if self.pooling == "first":
            return flat_TH.index_select(0, inputs.first_E)
        texts = inputs.lengths_E.shape[0]
        # Padding is summed into an extra row, which is dropped. Half-precision numbers are summed in fp32.
        owner_T = torch.where(inputs.texts_RL < 0, texts, inputs.texts_RL).flatten().long()
        flat_TH = flat_TH.to(torch.promote_types(flat_TH.dtype, torch.float32))
        sums_EH = flat_TH.new_zeros(texts + 1, self.hidden_size).index_add(0, owner_T, flat_TH)[:texts]
        return sums_EH / inputs.lengths_E.unsqueeze(1)

    def enable_checkpointing(self) -> None:
        """Let layers recompute activations in the backward pass; a `UserError` if the family does not allow it."""
        body: Any = self.body
        if not body.supports_gradient_checkpointing:
            raise UserError(f"gradients.checkpointing: encoders of type {self.model_type!r} do not support it")
        body.gradient_checkpointing_enable({"use_reentrant": False})
