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
    lengths: list[int] = []
    truncated = 0
    for batch in _with_progress(texts, what):
        pair = None if batch.second is None else list(batch.second)
        encoded = tokenizer(list(batch.first), pair, truncation=True, max_length=max_tokens).encodings
        truncated += sum(bool(e.overflowing) for e in encoded)
        lengths.extend(len(e.ids) for e in encoded)
        pieces.extend(np.array(e.ids, dtype=np.int32) for e in encoded)
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int32)
    return Tokenised(Ragged(values, offsets), truncated)


def write_tokens(path: Path, ragged: Ragged, columns: Mapping[str, npt.NDArray[Any]] | None = None) -> None:
    """One record batch of `tokens`, a list of int32 with 64-bit offsets, and any further columns of N values."""
    tokens = pa.LargeListArray.from_arrays(pa.array(ragged.offsets), pa.array(ragged.values))
    arrays = {"tokens": tokens} | {name: pa.array(values) for name, values in (columns or {}).items()}
    batch = pa.record_batch(list(arrays.values()), names=list(arrays))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_tokens(path: Path) -> tuple[Ragged, dict[str, npt.NDArray[Any]]]:
    """The tokens as views of the mapped file, without a copy, and the further columns."""
    with pa.memory_map(str(path)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
    tokens = batch.column("tokens")
    if len(tokens):
        ragged = Ragged(tokens.values.to_numpy(), tokens.offsets.to_numpy())
    else:
        ragged = Ragged(np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.int64))
    others = [name for name in batch.schema.names if name != "tokens"]
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
