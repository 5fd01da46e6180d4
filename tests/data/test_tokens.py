"""Tokens of texts, which of them begin with an upper-case letter, and token files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

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
def test_written_tokens_are_read_back(tmp_path: Path, values: list[list[int]]) -> None:
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


def test_the_two_texts_of_a_pair_have_types(encoder: EncoderConfig, tmp_path: Path) -> None:
    """A BERT-like tokenizer counts [CLS], the first text and its [SEP] as 0, and the rest as 1."""
    tokenizer = load_tokenizer(locate(encoder))
    tokens, _ = tokenise(Texts(["good film", "bad"], ["plot", "good plot"]), tokenizer, 16, "x")
    assert tokens.types is not None
    assert tokens.types.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 1]
    write_tokens(tmp_path / "pairs.arrow", tokens)
    read, columns = read_tokens(tmp_path / "pairs.arrow")
    assert columns == {}
    assert (types := read.take_types(np.array([1]))) is not None
    assert types.tolist() == [0, 0, 0, 1, 1, 1]
    single, _ = tokenise(Texts(["good film"]), tokenizer, 16, "x")
    assert single.types is None


@pytest.mark.parametrize("count", [0, 1, 2500])
def test_batches_keep_the_order(encoder: EncoderConfig, count: int) -> None:
    tokenizer = load_tokenizer(locate(encoder))
    tokens, truncated = tokenise(Texts([f"{'good ' * (i % 5)}bad" for i in range(count)]), tokenizer, 16, "x")
    assert tokens.lengths.tolist() == [i % 5 + 3 for i in range(count)]
    assert truncated == 0


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "paris",
    "##ian",
    "mcdonald",
    "café",
    "3rd",
    ",",
    "The",
    "Paris",
]


def tokenizer(lowercase: bool) -> Any:
    """A word-piece tokenizer of a few words."""
    inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")


def capitals(texts: Texts, lowercase: bool = True, limit: int = 32) -> list[list[bool]]:
    ragged, _ = tokenise(texts, tokenizer(lowercase), limit, "test")
    found = [ragged.take_capitals(np.array([i])) for i in range(len(texts))]
    assert all(value is not None for value in found)
    return [value.tolist() for value in found if value is not None]


def test_capitals_do_not_depend_on_a_lower_casing_tokenizer() -> None:
    # [CLS] The Paris ##ian , café 3rd McDonald [SEP]: a word's second piece has its own first letter, digits and
    # commas have none, "3rd" begins with the letter r, and CAFÉ's first letter is C.
    (row,) = capitals(Texts(["The Parisian, CAFÉ 3rd McDonald"]))
    assert row == [False, True, True, False, False, True, False, True, False]
    assert capitals(Texts(["The the"]), lowercase=False) == [[False, True, False, False]]


def test_capitals_of_pairs_and_cut_texts() -> None:
    both = Texts(["the Paris", "Paris " * 40], ["Paris the", "the " * 40])
    first, second = capitals(both, limit=12)
    assert first == [False, False, True, False, True, False, False]
    assert len(second) == 12
    assert second == [False, *[True] * second.count(True), *[False] * (11 - second.count(True))]


def test_capitals_are_mapped_without_a_copy(tmp_path: Path) -> None:
    ragged, _ = tokenise(Texts(["The paris", "paris The the"]), tokenizer(True), 32, "test")
    write_tokens(tmp_path / "x.arrow", ragged, {"label": np.array([0, 1])})
    found, columns = read_tokens(tmp_path / "x.arrow")
    assert set(columns) == {"label"}
    assert found.capitals is not None
    assert ragged.capitals is not None
    assert found.capitals.tolist() == ragged.capitals.tolist()
    assert not found.capitals.flags.writeable
    for chosen in ([1], [1, 0]):
        ids, lengths = found.take(np.array(chosen))
        upper = found.take_capitals(np.array(chosen))
        assert upper is not None
        assert len(upper) == len(ids) == lengths.sum()


@pytest.mark.parametrize("text", ["", "  ", "3 , 4"])
def test_texts_without_letters_have_no_capitals(text: str) -> None:
    assert not any(capitals(Texts([text]))[0])
