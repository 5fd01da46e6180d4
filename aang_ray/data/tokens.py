"""Texts as tokens in Arrow IPC files: written once, memory-mapped by every reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aang_ray.data.pretrained import Located, first_line, require_on_hub
from aang_ray.data.read import Texts
from aang_ray.data.tasks import Ragged
from aang_ray.errors import UserError

_BATCH = 1000
# A bar for less than this is gone before it is read.
_LONG = 20_000


@dataclass(frozen=True)
class Tokenised:
    """Tokens of N texts, and how many of the texts were cut to the limit."""

    ragged: Ragged
    truncated: int


def tokenise(texts: Texts, tokenizer: Any, max_tokens: int, what: str) -> Tokenised:
    """Tokens of each text or pair, special tokens included, at most `max_tokens` of them.

    Of a pair the longer text is cut first.
    """
    pieces: list[npt.NDArray[np.int32]] = []
    capitals: list[npt.NDArray[np.bool_]] = []
    lengths: list[int] = []
    truncated = 0
    for batch in _with_progress(texts, what):
        pair = None if batch.second is None else list(batch.second)
        encoded = tokenizer(list(batch.first), pair, truncation=True, max_length=max_tokens).encodings
        truncated += sum(bool(e.overflowing) for e in encoded)
        lengths.extend(len(e.ids) for e in encoded)
        pieces.extend(np.array(e.ids, dtype=np.int32) for e in encoded)
        capitals.extend(_capitals(e, batch, number) for number, e in enumerate(encoded))
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    upper = np.concatenate(capitals) if capitals else np.empty(0, dtype=np.bool_)
    return Tokenised(Ragged(values, offsets, upper), truncated)


def _capitals(encoded: Any, texts: Texts, number: int) -> npt.NDArray[np.bool_]:
    """Whether each token's first letter in the raw text is upper-case; False for special tokens and without letters."""
    sides = (texts.first[number], "" if texts.second is None else texts.second[number])
    spans = zip(encoded.sequence_ids, encoded.offsets, strict=True)
    return np.array([side is not None and _capital(sides[side][start:end]) for side, (start, end) in spans], np.bool_)


def _capital(surface: str) -> bool:
    return next((letter for letter in surface if letter.isalpha()), "").isupper()


def write_tokens(path: Path, ragged: Ragged, columns: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
    """One record batch of `tokens`, a list of int32 with 64-bit offsets, and any further columns of N values.

    `capitals` is a list of bytes beside them, where the tokens have it.
    """
    offsets = pa.array(ragged.offsets)
    arrays = {"tokens": pa.LargeListArray.from_arrays(offsets, pa.array(ragged.values))}
    if ragged.capitals is not None:
        arrays["capitals"] = pa.LargeListArray.from_arrays(offsets, pa.array(ragged.capitals.view(np.uint8)))
    arrays |= {name: pa.array(values) for name, values in (columns or {}).items()}
    batch = pa.record_batch(list(arrays.values()), names=list(arrays))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_tokens(path: Path) -> tuple[Ragged, dict[str, npt.NDArray[Any]]]:
    """The tokens as views of the mapped file, without a copy, and the further columns."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    tokens = batch.column("tokens")
    if len(tokens):
        capitals = None
        if "capitals" in batch.schema.names:
            capitals = batch.column("capitals").values.to_numpy().view(np.bool_)
        ragged = Ragged(tokens.values.to_numpy(), tokens.offsets.to_numpy(), capitals)
    else:
        ragged = Ragged(np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.int64))
    others = [name for name in batch.schema.names if name not in {"tokens", "capitals"}]
    return ragged, {name: batch.column(name).to_numpy(zero_copy_only=False) for name in others}


def _with_progress(texts: Texts, what: str) -> Iterator[Texts]:
    """Batches of the texts, with a bar on stderr where there are many and it is a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    starts = range(0, len(texts), _BATCH)
    silent = len(texts) < _LONG or not console.is_terminal
    for start in track(starts, f"tokenising {what}", console=console, transient=True, disable=silent):
        yield texts.take(range(start, min(start + _BATCH, len(texts))))


# --- data.tokenizer: A pretrained encoder's tokenizer, and the few facts about it that the rest of the program needs.


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
