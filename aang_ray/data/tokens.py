"""Texts as tokens in Arrow IPC files: written once, memory-mapped by every reader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from aang_ray.data.task import Ragged
from aang_ray.data.texts import Texts

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
