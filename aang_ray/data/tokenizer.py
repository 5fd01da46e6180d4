"""A pretrained encoder's tokenizer, and the few facts about it that the rest of the program needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aang_ray.data.hub import first_line, require_on_hub
from aang_ray.data.pretrained import Located
from aang_ray.errors import UserError

# Families whose first position id is the padding id + 1: that many positions are not for tokens.
_OFFSET_FAMILIES = frozenset(
    {
        "camembert",
        "data2vec-text",
        "ibert",
        "longformer",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
# Tokenizers without a limit say 1e30.
_NO_LIMIT = 1_000_000
# Longest text of an encoder that states no limit at all.
_DEFAULT_TOKENS = 512


@dataclass(frozen=True)
class TokenizerFacts:
    """Ids and limits of a tokenizer with its encoder."""

    vocab_size: int
    """Ids run from 0 to `vocab_size` - 1."""
    pad: int
    mask: int
    first: int
    """The token that opens every text (CLS or BOS)."""
    last: int
    """The token that closes every text (SEP or EOS)."""
    special_ids: tuple[int, ...]
    """All special ids, ascending: never corrupted, never labels, never drawn as replacements."""
    max_tokens: int
    """Longest text that the encoder takes, special tokens included."""


def load_tokenizer(located: Located) -> Any:
    """The encoder's fast Hugging Face tokenizer.

    Raises:
        UserError: where it cannot be loaded or has no fast version.
    """
    from transformers import AutoTokenizer

    _require_reachable(located)
    try:
        tokenizer = AutoTokenizer.from_pretrained(located.source, revision=located.revision or "main")
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"encoder.name: no tokenizer could be loaded from {located.source}: {first_line(error)}"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"encoder.name: {located.source} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def tokenizer_facts(located: Located, tokenizer: Any) -> TokenizerFacts:
    """Ids and limits of a tokenizer with its encoder.

    The limit is the smaller of the tokenizer's own and the encoder's number of positions, less those
    that RoBERTa-like families keep for padding.

    Raises:
        UserError: for a tokenizer without a mask, padding, first or last token, or larger than the
            encoder's vocabulary.
    """
    config = _model_config(located)
    rows = config.get("vocab_size")
    if isinstance(rows, int) and len(tokenizer) > rows:
        raise UserError(
            f"encoder.name: the tokenizer of {located.source} has {len(tokenizer)} tokens, its encoder embeds {rows}"
        )
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}
    return TokenizerFacts(
        vocab_size=len(tokenizer),
        pad=_required(located, "padding token", tokenizer.pad_token_id),
        mask=_required(located, "mask token, which masked objectives need", tokenizer.mask_token_id),
        first=_required(located, "first token (CLS or BOS)", tokenizer.cls_token_id, tokenizer.bos_token_id),
        last=_required(located, "last token (SEP or EOS)", tokenizer.sep_token_id, tokenizer.eos_token_id),
        special_ids=tuple(sorted(special)),
        max_tokens=_max_tokens(int(min(tokenizer.model_max_length, _NO_LIMIT)), config),
    )


def _max_tokens(tokenizer_limit: int, config: dict[str, Any]) -> int:
    limits = [tokenizer_limit] if 0 < tokenizer_limit < _NO_LIMIT else []
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        offset = (config.get("pad_token_id") or 0) + 1 if config.get("model_type") in _OFFSET_FAMILIES else 0
        limits.append(positions - offset)
    return min(limits, default=_DEFAULT_TOKENS)


def _model_config(located: Located) -> dict[str, Any]:
    """The encoder's configuration with its family's defaults: `config.json` may leave out what is default."""
    from transformers import AutoConfig

    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(
            located.source, revision=located.revision or "main"
        ).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"encoder.name: no configuration could be loaded from {located.source}: {first_line(error)}"
        ) from error
    return config


def _required(located: Located, what: str, *ids: int | None) -> int:
    found = next((index for index in ids if index is not None), None)
    if found is None:
        raise UserError(
            f"encoder.name: the tokenizer of {located.source} has no {what}; choose a masked-language-model encoder"
        )
    return found


def _require_reachable(located: Located) -> None:
    if located.local:
        return
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(located.source, "config.json", revision=located.revision)
    if not isinstance(cached, str):
        require_on_hub("model", located.source, located.revision, "give a folder or package:NAME as encoder.name")
