"""Encoders without pretraining: shape, tokenizer, and what decides their names."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data import encoder_fingerprint, load_end_task, load_tokenizer, tokenizer_facts
from aang_ray.data.random_encoder import frequent_pieces, locate_encoder, shape_of
from aang_ray.errors import UserError
from tests.data.conftest import rows_of

RANDOM = EncoderConfig(name="random:2x32")


def test_the_tokenizer_knows_the_words_of_train_and_not_those_of_test(folder: Callable[..., Path]) -> None:
    rows = rows_of(("wonderful film", "pos"), ("wonderful plot", "pos"), ("awful plot", "neg"), ("awful film", "neg"))
    held_out = rows_of(("zzz", "pos"), ("zzz", "neg"))
    path = folder(train=rows, dev=held_out, test=held_out)
    (path / "domain.txt").write_text("Scenery scenery\nscenery\n")
    located = locate_encoder(DataConfig(task=str(path)), RANDOM)
    tokenizer = load_tokenizer(located)
    assert {"wonderful", "awful", "film", "scenery"} <= tokenizer.get_vocab().keys()
    assert not any("z" in token for token in tokenizer.get_vocab())
    facts = tokenizer_facts(located, tokenizer)
    assert (facts.max_tokens, facts.vocab_size) == (256, len(tokenizer))
    (encoded,) = tokenizer(["wonderful FILM"], ["plot"]).encodings
    assert encoded.tokens == ["[CLS]", "wonderful", "film", "[SEP]", "plot", "[SEP]"]
    assert encoded.type_ids == [0, 0, 0, 0, 1, 1]
    config = json.loads((Path(located.source) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]) == (2, 32, 2)


def test_words_endings_and_characters_by_frequency() -> None:
    """Characters: b 7, a 5, c 4. `##bc` ends abbc twice and bbc once; `##bbc` and `abbc` occur twice: by alphabet."""
    pieces = frequent_pieces({"abbc": 2, "bbc": 1, "cb": 1, "a": 3})
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert pieces[5:11] == ["b", "a", "c", "##b", "##a", "##c"]
    assert pieces[11:] == ["##bc", "##bbc", "abbc"]


def test_a_task_is_loaded_with_it(folder: Callable[..., Path]) -> None:
    task = load_end_task(DataConfig(task=str(folder())), RANDOM)
    assert len(task.train) == 4
    assert task.train.tokens.lengths.min() >= 3


def test_the_name_depends_on_shape_and_texts_alone(folder: Callable[..., Path]) -> None:
    def print_of(path: Path, name: str = "random:2x32", **data: int) -> str:
        return encoder_fingerprint(locate_encoder(DataConfig(task=str(path), **data), EncoderConfig(name=name)))

    one, two = folder("one"), folder("two")
    assert print_of(one) == print_of(two)
    assert print_of(one, "random:1x32") != print_of(one)
    rows = rows_of(("another good film another", "pos"), ("a bad film", "neg"))
    assert print_of(folder("three", train=rows, dev=rows, test=rows)) != print_of(one)


def test_tokenizers_are_the_same_in_every_process(folder: Callable[..., Path], tmp_path: Path) -> None:
    """Many words with equal counts, for which hash tables of two processes have different orders."""
    rows = rows_of(*((f"w{i}x{i % 7} q{i % 13}b{i}", "pos" if i % 2 else "neg") for i in range(300)))
    path = folder("many", train=rows, dev=rows[:2], test=rows[:2])
    program = (
        "import sys; from aang_ray.config import *; from aang_ray.data import encoder_fingerprint;"
        "from aang_ray.data.random_encoder import locate_encoder;"
        "print(encoder_fingerprint(locate_encoder(DataConfig(task=sys.argv[1]), EncoderConfig(name='random:1x16'))))"
    )
    prints = set()
    for number in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            env={"AANG_CACHE": str(tmp_path / f"cache-{number}"), "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        prints.add(done.stdout)
    assert len(prints) == 1


@pytest.mark.parametrize("name", ["random:", "random:4", "random:0x64", "random:2x20", "random:2x160", "random:axb"])
def test_other_shapes_are_one_line(name: str) -> None:
    with pytest.raises(UserError, match=rf"encoder.name: {name} is not random:LAYERSxHIDDEN, such as random:4x256"):
        shape_of(name)


def test_it_has_no_revision(folder: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"encoder.revision: only encoders on the Hub have revisions"):
        locate_encoder(DataConfig(task=str(folder())), EncoderConfig(name="random:2x32", revision="main"))
