"""Tokens on disk and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aang_ray.config import EncoderConfig
from aang_ray.data import load_tokenizer, locate
from aang_ray.data.read import Texts
from aang_ray.data.tasks import Ragged
from aang_ray.data.tokens import read_tokens, tokenise, write_tokens

sequences = st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=12), max_size=20)


def ragged(values: list[list[int]]) -> Ragged:
    flat = np.array([v for row in values for v in row], dtype=np.int32)
    return Ragged(flat, np.cumsum([0, *(len(row) for row in values)], dtype=np.int64))


@given(sequences)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_what_is_written_is_read(tmp_path: Path, values: list[list[int]]) -> None:
    path = tmp_path / "x.arrow"
    path.unlink(missing_ok=True)
    labels = np.arange(len(values))
    write_tokens(path, ragged(values), {"label": labels})
    found, columns = read_tokens(path)
    assert len(found) == len(values)
    assert [found[i].tolist() for i in range(len(found))] == values
    assert columns["label"].tolist() == labels.tolist()
    assert (found.values.dtype.name, found.offsets.dtype.name) == ("int32", "int64")


@given(sequences.filter(len), st.data())
def test_take_is_indexing(values: list[list[int]], data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, len(values) - 1)))
    flat, lengths = ragged(values).take(np.array(indices, dtype=np.int64))
    assert flat.tolist() == [v for i in indices for v in values[i]]
    assert lengths.tolist() == [len(values[i]) for i in indices]


def test_reading_maps_and_does_not_copy(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    write_tokens(path, Ragged(np.arange(2_000_000, dtype=np.int32), np.arange(0, 2_000_001, 100, dtype=np.int64)))
    before = pa.total_allocated_bytes()
    found, _ = read_tokens(path)
    assert pa.total_allocated_bytes() - before < 100_000
    assert not found.values.flags.owndata
    assert not found.values.flags.writeable
    assert found[19_999].tolist() == list(range(1_999_900, 2_000_000))


def test_texts_are_cut_to_the_limit_and_counted(encoder: EncoderConfig) -> None:
    tokenizer = load_tokenizer(locate(encoder))
    tokens, truncated = tokenise(Texts(["good film", "a " * 20, "unheard"]), tokenizer, 8, "x")
    assert [tokens[i].tolist() for i in range(3)] == [[2, 5, 7, 3], [2, 12, 12, 12, 12, 12, 12, 3], [2, 1, 3]]
    assert truncated == 1


def test_the_longer_text_of_a_pair_is_cut(encoder: EncoderConfig) -> None:
    tokenizer = load_tokenizer(locate(encoder))
    tokens, truncated = tokenise(Texts(["good " * 9], ["bad"]), tokenizer, 8, "x")
    assert tokens[0].tolist() == [2, 5, 5, 5, 5, 3, 6, 3]
    assert truncated == 1


@pytest.mark.parametrize("count", [0, 1, 2500])
def test_batches_keep_the_order(encoder: EncoderConfig, count: int) -> None:
    tokenizer = load_tokenizer(locate(encoder))
    tokens, truncated = tokenise(Texts([f"{'good ' * (i % 5)}bad" for i in range(count)]), tokenizer, 16, "x")
    assert tokens.lengths.tolist() == [i % 5 + 3 for i in range(count)]
    assert truncated == 0
