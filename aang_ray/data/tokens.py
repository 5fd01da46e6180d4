"""The encoder's tokenizer, and texts as tokens: made once, kept in Arrow IPC files, memory-mapped by every reader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aang_ray.config import DataConfig
from aang_ray.data.pretrained import Located, from_pretrained, require_on_hub
from aang_ray.data.read import Texts
from aang_ray.data.tasks import Ragged
from aang_ray.errors import UserError

_BATCH = 1000
# With fewer texts a progress bar would be gone before anybody reads it.
_BAR_FROM = 20_000
# Model families whose first position id is the padding id + 1: that many positions are not for tokens.
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
# Tokenizers without a limit report 1e30.
_NO_LIMIT = 1_000_000
# Longest text if neither the tokenizer nor the encoder states a limit.
_DEFAULT_TOKENS = 512


@dataclass(frozen=True)
class TokenizerFacts:
    """Ids and limits of a tokenizer and its encoder; `first` and `last` are CLS and SEP, or BOS and EOS."""

    vocab_size: int
    pad: int
    mask: int
    first: int
    last: int
    special_ids: tuple[int, ...]
    """All special ids, ascending."""
    max_tokens: int
    """Longest text that the encoder takes, special tokens included."""


def load_tokenizer(located: Located) -> Any:
    """Load the fast Hugging Face tokenizer of an encoder.

    Raises:
        UserError: if it cannot be loaded or has no fast version.
    """
    from transformers import AutoTokenizer

    if not located.local:
        import huggingface_hub

        cached = huggingface_hub.try_to_load_from_cache(located.source, "config.json", revision=located.revision)
        if not isinstance(cached, str):
            require_on_hub("model", located.source, located.revision, "encoder.name", "give a folder or package:NAME")
    tokenizer = from_pretrained(AutoTokenizer, located, "encoder.name", "tokenizer")
    if not tokenizer.is_fast:
        raise UserError(f"encoder.name: {located.source} has no fast tokenizer (tokenizer.json)")
    return tokenizer


def tokenizer_facts(located: Located, tokenizer: Any) -> TokenizerFacts:
    """Return the ids and limits of a tokenizer and its encoder.

    Raises:
        UserError: if the tokenizer lacks a mask, padding, first or last token, or has more tokens than the encoder
            embeds.
    """
    config = _model_config(located)
    rows = config.get("vocab_size")
    if isinstance(rows, int) and len(tokenizer) > rows:
        raise UserError(
            f"encoder.name: the tokenizer of {located.source} has {len(tokenizer)} tokens, its encoder embeds {rows}"
        )
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(index for index, token in added.items() if token.special)}

    def required(what: str, *ids: int | None) -> int:
        found = next((index for index in ids if index is not None), None)
        if found is None:
            lacks = f"the tokenizer of {located.source} has no {what}"
            raise UserError(f"encoder.name: {lacks}; choose a masked-language-model encoder")
        return found

    limits = [limit for limit in (int(min(tokenizer.model_max_length, _NO_LIMIT)),) if 0 < limit < _NO_LIMIT]
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and positions > 0:
        offset = (config.get("pad_token_id") or 0) + 1 if config.get("model_type") in _OFFSET_FAMILIES else 0
        limits.append(positions - offset)
    return TokenizerFacts(
        vocab_size=len(tokenizer),
        pad=required("padding token", tokenizer.pad_token_id),
        mask=required("mask token, which masked objectives need", tokenizer.mask_token_id),
        first=required("first token (CLS or BOS)", tokenizer.cls_token_id, tokenizer.bos_token_id),
        last=required("last token (SEP or EOS)", tokenizer.sep_token_id, tokenizer.eos_token_id),
        special_ids=tuple(sorted(special)),
        max_tokens=min(limits, default=_DEFAULT_TOKENS),
    )


@lru_cache(maxsize=16)
def reads_token_types(located: Located) -> bool:
    """Return whether the encoder tells the second text of a pair from the first by the tokens' types, as BERT does."""
    if _model_config(located).get("type_vocab_size", 0) < 2:
        return False
    (encoded,) = load_tokenizer(located)(["a"], ["b"]).encodings
    return any(encoded.type_ids)


def _model_config(located: Located) -> dict[str, Any]:
    """Return the encoder's configuration, filled with its family's defaults, which `config.json` may leave out."""
    from transformers import AutoConfig

    return dict(from_pretrained(AutoConfig, located, "encoder.name", "configuration").to_dict())


def token_limit(data: DataConfig, facts: TokenizerFacts) -> int:
    """Return the longest text in tokens: `data.max_tokens`, or what the encoder takes.

    Raises:
        UserError: if the encoder does not take texts of the configured length.
    """
    if data.max_tokens is None:
        return facts.max_tokens
    if not 8 <= data.max_tokens <= facts.max_tokens:
        raise UserError(
            f"data.max_tokens: {data.max_tokens} is not possible, this encoder takes 8 to {facts.max_tokens}"
        )
    return data.max_tokens


def tokenise(texts: Texts, tokenizer: Any, max_tokens: int, what: str) -> tuple[Ragged, int]:
    """Return texts or pairs as tokens, special tokens included, and how many were cut; `what` is for the progress bar.

    Of a pair that is too long the longer text is cut.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    silent = len(texts) < _BAR_FROM or not console.is_terminal
    starts = range(0, len(texts), _BATCH)
    pieces: list[npt.NDArray[np.int32]] = []
    capitals: list[npt.NDArray[np.bool_]] = []
    types: list[npt.NDArray[np.int8]] = []
    truncated = 0
    for start in track(starts, f"tokenising {what}", console=console, transient=True, disable=silent):
        batch = texts.take(range(start, min(start + _BATCH, len(texts))))
        pair = None if batch.second is None else list(batch.second)
        encoded = tokenizer(list(batch.first), pair, truncation=True, max_length=max_tokens).encodings
        truncated += sum(bool(e.overflowing) for e in encoded)
        pieces.extend(np.array(e.ids, dtype=np.int32) for e in encoded)
        capitals.extend(_capitals(e, batch, number) for number, e in enumerate(encoded))
        if pair is not None:
            types.extend(np.array(e.type_ids, dtype=np.int8) for e in encoded)
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(piece) for piece in pieces], out=offsets[1:])
    # The empty arrays allow for no texts at all.
    values = np.concatenate([np.empty(0, dtype=np.int32), *pieces])
    types_T = np.concatenate([np.empty(0, dtype=np.int8), *types])
    capitals_T = np.concatenate([np.empty(0, dtype=np.bool_), *capitals])
    return Ragged(values, offsets, capitals_T, types_T if types_T.any() else None), truncated


def _capitals(encoded: Any, texts: Texts, number: int) -> npt.NDArray[np.bool_]:
    """Return whether the first letter, if any, of each token of text `number` is upper-case in the raw text."""
    sides = (texts.first[number], "" if texts.second is None else texts.second[number])
    spans = zip(encoded.sequence_ids, encoded.offsets, strict=True)
    surfaces = ("" if side is None else sides[side][start:end] for side, (start, end) in spans)
    return np.array([next(filter(str.isalpha, surface), "").isupper() for surface in surfaces], np.bool_)


def write_tokens(path: Path, ragged: Ragged, columns: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
    """Write tokens as one Arrow record batch, with further columns by name."""
    offsets = pa.array(ragged.offsets)
    arrays = {"tokens": pa.LargeListArray.from_arrays(offsets, pa.array(ragged.values))}
    if ragged.capitals is not None:
        arrays["capitals"] = pa.LargeListArray.from_arrays(offsets, pa.array(ragged.capitals.view(np.uint8)))
    if ragged.types is not None:
        arrays["types"] = pa.LargeListArray.from_arrays(offsets, pa.array(ragged.types))
    arrays |= {name: pa.array(values) for name, values in (columns or {}).items()}
    batch = pa.record_batch(list(arrays.values()), names=list(arrays))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_tokens(path: Path) -> tuple[Ragged, dict[str, npt.NDArray[Any]]]:
    """Return the tokens of a file as views of the mapped file, without a copy, and its further columns."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    tokens = batch.column("tokens")
    if len(tokens):
        capitals = types = None
        if "capitals" in batch.schema.names:
            capitals = batch.column("capitals").values.to_numpy().view(np.bool_)
        if "types" in batch.schema.names:
            types = batch.column("types").values.to_numpy()
        ragged = Ragged(tokens.values.to_numpy(), tokens.offsets.to_numpy(), capitals, types)
    else:
        ragged = Ragged(np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.int64))
    others = [name for name in batch.schema.names if name not in {"tokens", "capitals", "types"}]
    return ragged, {name: batch.column(name).to_numpy(zero_copy_only=False) for name in others}
