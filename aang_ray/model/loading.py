"""From a folder or a name on the Hub to an encoder that obeys its visibility."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING, AutoConfig
from transformers.utils import logging as transformers_logging

from aang_ray.data.pretrained import encoder_fingerprint
from aang_ray.errors import UserError
from aang_ray.model.checkpoint_head import masked_lm_head
from aang_ray.model.encoder import Encoder
from aang_ray.model.heads import MaskedLMHead
from aang_ray.model.leak import check_no_leak
from aang_ray.model.pooling import checkpoint_pooling

if TYPE_CHECKING:
    from aang_ray.config import EncoderConfig
    from aang_ray.data.pretrained import Located


_obedient: set[tuple[str, int | None]] = set()
"""Encoders, by content and depth, that passed the leak test in this process: it takes longer than reading them."""


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder, and what its checkpoint brings along for heads."""

    encoder: Encoder
    mlm_head: MaskedLMHead | None
    """The checkpoint's own masked-LM head, where it has one."""


def load_encoder(config: EncoderConfig, located: Located) -> LoadedEncoder:
    """The pretrained encoder, in fp32, on the CPU, in train mode; it passed the leak test.

    Weights come from safetensors files alone, and code that a checkpoint brings is not run. Of a
    checkpoint with more layers than `config.layers` the first ones are read.

    Raises:
        UserError: the checkpoint cannot be read, lacks weights of the body, has fewer layers than
            asked for, or is of a family whose attention cannot be restricted.
    """
    with _quiet():
        settings = _settings(config, located)
        model, missing = _read(settings, located)
    body: Any = model.base_model
    # Missing names carry the prefix of the body's place in the model, in which heads stand beside it.
    inside = "" if body is model else f"{model.base_model_prefix}."
    absent = sorted(name for name in missing if name.startswith(inside))
    if absent:
        raise UserError(f"encoder.name: {config.name} lacks {len(absent)} weights of the encoder, {absent[0]} first")
    pooling = checkpoint_pooling(located) if config.pooling == "auto" else config.pooling
    encoder = Encoder(body, pooling)
    content = (encoder_fingerprint(located), config.layers)
    if content not in _obedient:
        check_no_leak(encoder)
        _obedient.add(content)
    return LoadedEncoder(encoder.train(), None if body is model else masked_lm_head(model, missing))


def _settings(config: EncoderConfig, located: Located) -> Any:
    """The checkpoint's configuration with our depth and dropout."""
    try:
        settings: Any = AutoConfig.from_pretrained(located.source, revision=located.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(located, error) from error
    if settings.is_encoder_decoder or type(settings) not in MODEL_MAPPING:
        raise UserError(f"encoder.name: {config.name} is of type {settings.model_type!r}, which is no text encoder")
    if config.layers is not None:
        _cut(settings, config.layers, config.name)
    if config.dropout is not None:
        for key, value in settings.to_dict().items():
            if "dropout" in key and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(settings, key, config.dropout)
    return settings


def _cut(settings: Any, layers: int, name: str) -> None:
    depth = getattr(settings, "num_hidden_layers", None)
    if depth is None:
        raise UserError(
            f"encoder.layers: the layers of {name} ({settings.model_type!r}) cannot be counted; leave it null"
        )
    if layers > depth:
        raise UserError(f"encoder.layers: {name} has {depth} layers, {layers} were asked for")
    if getattr(settings, "layer_types", None) is not None:
        settings.layer_types = settings.layer_types[:layers]
    settings.num_hidden_layers = layers


def _read(settings: Any, located: Located) -> tuple[Any, frozenset[str]]:
    """The model, with its masked-LM head where the family has one, and the names that the checkpoint lacks."""
    family = MODEL_FOR_MASKED_LM_MAPPING if type(settings) in MODEL_FOR_MASKED_LM_MAPPING else MODEL_MAPPING
    choices: Any = family[type(settings)]
    model_class = choices[0] if isinstance(choices, tuple) else choices
    # Masked-LM models have no pooler; of a bare one nothing would read it, and weight decay would move it.
    takes = inspect.signature(model_class.__init__).parameters
    without_pooler = {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}
    try:
        model, info = model_class.from_pretrained(
            located.source,
            revision=located.revision,
            config=settings,
            dtype=torch.float32,
            use_safetensors=True,
            attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
            output_loading_info=True,
            **without_pooler,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _unreadable(located, error) from error
    return model, frozenset(info["missing_keys"])


def _unreadable(located: Located, error: Exception) -> UserError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UserError(f"encoder.name: cannot read a pretrained encoder with safetensors from {located.source}: {reason}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without reports of weights that are left out on purpose, and without progress bars."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
