"""Which tokens begin with an upper-case letter, from the raw text, whatever the tokenizer makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from aang_ray.data.read import Texts
from aang_ray.data.tokens import read_tokens, tokenise, write_tokens

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


def test_a_lower_casing_tokenizer_does_not_hide_them() -> None:
    # [CLS] The Paris ##ian , café 3rd McDonald [SEP]: a word's second piece has its own first letter, digits and
    # commas have none, "3rd" begins with the letter r, and CAFÉ's first letter is C.
    (row,) = capitals(Texts(["The Parisian, CAFÉ 3rd McDonald"]))
    assert row == [False, True, True, False, False, True, False, True, False]
    assert capitals(Texts(["The the"]), lowercase=False) == [[False, True, False, False]]


def test_pairs_and_cut_texts() -> None:
    both = Texts(["the Paris", "Paris " * 40], ["Paris the", "the " * 40])
    first, second = capitals(both, limit=12)
    assert first == [False, False, True, False, True, False, False]
    assert len(second) == 12
    assert second == [False, *[True] * second.count(True), *[False] * (11 - second.count(True))]


def test_they_are_kept_beside_the_tokens_without_a_copy(tmp_path: Path) -> None:
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
def test_texts_without_letters(text: str) -> None:
    assert not any(capitals(Texts([text]))[0])
