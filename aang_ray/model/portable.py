"""A text classifier for Transformers: any encoder, pooling by the first token or the mean, and a head with one layer.

An exported model that no class of Transformers can hold brings a copy of this file, so it imports nothing of this
project.

Shape suffixes: B texts, L tokens, H hidden size, C classes.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class PooledClassifierConfig(PreTrainedConfig):  # type: ignore[misc]
    """The configuration of the encoder, and of what follows it.

    Args:
        encoder: That of the encoder.
        pooling: `first` or `mean`.
        head_dropout: Dropout of the head.
        first_position: Position id of a text's first token.
    """

    # Not that of the encoder: then Transformers would load a class of its own, with a random head, where it must not
    # run the code of this folder.
    model_type = "pooled-text-classifier"
    sub_configs: ClassVar[dict[str, Any]] = {"encoder": AutoConfig}

    def __init__(
        self,
        encoder: PreTrainedConfig | dict[str, Any] | None = None,
        pooling: str = "first",
        head_dropout: float = 0.0,
        first_position: int = 0,
        **others: Any,
    ) -> None:
        settings = dict(encoder) if isinstance(encoder, dict) else None
        self.encoder = encoder if settings is None else AutoConfig.for_model(settings.pop("model_type"), **settings)
        self.pooling = pooling
        self.head_dropout = head_dropout
        self.first_position = first_position
        super().__init__(**others)


class PooledClassifier(PreTrainedModel):  # type: ignore[misc]
    """Logits of texts: encoder, pooling, Linear, Tanh, Dropout, Linear."""

    config_class = PooledClassifierConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: PooledClassifierConfig) -> None:
        super().__init__(config)
        settings: Any = config.encoder
        classes: Any = MODEL_MAPPING[type(settings)]
        family = classes[0] if isinstance(classes, tuple) else classes
        without_pooler = "add_pooling_layer" in inspect.signature(family.__init__).parameters
        self.encoder = family._from_config(settings, **({"add_pooling_layer": False} if without_pooler else {}))
        self.takes = frozenset(inspect.signature(self.encoder.forward).parameters)
        self.dense = nn.Linear(settings.hidden_size, settings.hidden_size)
        self.dropout = nn.Dropout(config.head_dropout)
        self.out_proj = nn.Linear(settings.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> SequenceClassifierOutput:
        """Return the logits [B, C] of texts or pairs, and with `labels` [B] the mean cross-entropy."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # By the mask: a model that finds its padding by the token's id counts wrong where a text has this token.
        position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0) + self.config.first_position
        ids = {"position_ids": position_ids, "token_type_ids": token_type_ids}
        others |= {name: value for name, value in ids.items() if name in self.takes and value is not None}
        output = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **others)
        pooled_BH = pool(output.last_hidden_state, attention_mask, self.config.pooling)
        logits_BC = self.out_proj(self.dropout(torch.tanh(self.dense(pooled_BH))))
        loss = None if labels is None else nn.functional.cross_entropy(logits_BC, labels)
        return SequenceClassifierOutput(
            loss=loss, logits=logits_BC, hidden_states=output.hidden_states, attentions=output.attentions
        )


def pool(hidden_BLH: Tensor, mask_BL: Tensor, pooling: str) -> Tensor:
    """Return each text's vector, [B, H]: the hidden state of its first token, or the mean over its tokens."""
    if pooling == "first":
        first_B = mask_BL.long().argmax(dim=1)  # not 0 where padding stands on the left
        return hidden_BLH[torch.arange(len(first_B), device=first_B.device), first_B]
    # Half-precision numbers are summed in fp32.
    mask_BL1 = mask_BL.unsqueeze(-1).to(torch.promote_types(hidden_BLH.dtype, torch.float32))
    mean_BH: Tensor = (hidden_BLH * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1).clamp(min=1)
    return mean_BH.to(hidden_BLH.dtype)
