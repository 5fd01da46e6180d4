"""Small random encoders of the seven families that are supported by name."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from aang_ray.model.encoder import Encoder, Pooling

VOCAB = 97
FAMILIES = ("bert", "roberta", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert")

# A large initializer range: at 0.02 tokens hardly influence each other, and tests would see nothing.
_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
_CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {"max_position_embeddings": 40}),
    "roberta": ("Roberta", {"max_position_embeddings": 42, "type_vocab_size": 1}),
    "distilbert": ("DistilBert", {"max_position_embeddings": 40, "hidden_dim": 48}),
    "electra": ("Electra", {"max_position_embeddings": 40, "embedding_size": 16}),
    "mpnet": ("MPNet", {"max_position_embeddings": 42}),
    "deberta-v2": (
        "DebertaV2",
        {
            "max_position_embeddings": 40,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
    # Layer 0 attends to all; the others to 2 places on either side.
    "modernbert": (
        "ModernBert",
        {
            "max_position_embeddings": 40,
            "local_attention": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "cls_token_id": 1,
            "eos_token_id": 2,
            "sep_token_id": 2,
        },
    ),
}
_DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "dropout",
    "attention_dropout",
    "embedding_dropout",
    "mlp_dropout",
)


def small_config(family: str, layers: int = 3, dropout: float = 0.0, **changes: Any) -> PreTrainedConfig:
    """The configuration of a small encoder of the family."""
    name, own = _CLASSES[family]
    config = getattr(transformers, f"{name}Config")(**{**_SHARED, "num_hidden_layers": layers, **own, **changes})
    for key in _DROPOUTS:
        if hasattr(config, key):
            setattr(config, key, dropout)
    return config


def small_model(
    family: str, kind: str, layers: int = 3, dropout: float = 0.0, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """A random model of the family; `kind` is `Model`, `ForMaskedLM`, ..."""
    name, _ = _CLASSES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(transformers, f"{name}{kind}")(small_config(family, layers, dropout, **changes))


def small_encoder(
    family: str,
    layers: int = 3,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    pooling: Pooling = "first",
) -> Encoder:
    """A random encoder of the family, in train mode; the same seed gives the same weights."""
    body = small_model(family, "Model", layers, dropout, seed)
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    return Encoder(body.to(dtype), pooling).train()
