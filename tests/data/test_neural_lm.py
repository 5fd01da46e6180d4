"""Neural-LM text: written once, by a model whose fit to the domain is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data import causal, data_fingerprint, load_end_task, neural_lm
from aang_ray.data.neural_lm import neural_text
from aang_ray.data.pretrained import locate_model
from aang_ray.errors import UserError
from tests.data.conftest import rows_of, write_jsonl

SENTENCES = [f"the {adjective} {noun} was {verb}" for adjective in ("good", "bad", "dull") for noun in ("film", "plot")
             for verb in ("seen", "made", "liked", "cut")]  # fmt: skip


def domain(count: int, seed: int = 0) -> list[str]:
    """Sentences of three choices with 3 * 2 * 4 = 24 outcomes."""
    order = np.random.default_rng(seed)
    return [SENTENCES[i] for i in order.integers(len(SENTENCES), size=count)]


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A causal model of 5 words with random parameters."""
    folder = tmp_path / "causal"
    words = Tokenizer(WordLevel({"[UNK]": 0, "good": 1, "bad": 2, "film": 3, "</s>": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=160, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    return folder


def test_a_small_model_learns_the_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its held-out perplexity comes near the domain's own, and what it writes is of the domain."""
    monkeypatch.setattr(causal, "WIDTH", 48)
    monkeypatch.setattr(causal, "LAYERS", 2)
    written = neural_text(DataConfig(neural_lm="trained", neural_lm_passages=40), domain(600))
    # A sentence is 5 words and the end, 24 equally likely sentences: 24^(1/6) = 1.70 is the least perplexity
    # if every word is one token.
    assert 1.6 < written.perplexity < 2.2
    assert written.held_out == 30
    assert sum(passage in SENTENCES for passage in written.passages) >= 30


def test_it_is_written_once(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(neural_lm=str(model_folder), neural_lm_passages=10)
    first = neural_text(data, domain(30))
    monkeypatch.setattr(neural_lm, "_make", lambda *_: pytest.fail("written again"))
    assert neural_text(data, domain(30)) == first
    assert set(" ".join(first.passages).split()) <= {"good", "bad", "film", "[UNK]"}


def test_perplexity_is_that_of_the_model_s_own_loss(model_folder: Path) -> None:
    loaded = causal.load_causal(locate_model(str(model_folder), "data.neural_lm", "model"))
    passage = "good film bad bad film"
    ids = torch.tensor([[1, 3, 2, 2, 3, 4]])
    with torch.no_grad():
        expected = math.exp(loaded.model(input_ids=ids, labels=ids).loss)
    assert causal.perplexity(loaded, [passage]) == pytest.approx(expected, rel=1e-5)
    # Padding beside longer passages changes nothing: the mean over both passages' tokens.
    both = causal.perplexity(loaded, [passage, "good"])
    other = causal.perplexity(loaded, ["good"])
    assert math.log(both) == pytest.approx((5 * math.log(expected) + math.log(other)) / 6, rel=1e-5)


def test_it_becomes_a_corpus(
    encoder: EncoderConfig, folder: Callable[..., Path], model_folder: Path, tmp_path: Path
) -> None:
    path = folder(train=rows_of(*((text, ("neg", "pos")[i % 2]) for i, text in enumerate(domain(40)))))
    plain = DataConfig(task=str(path))
    data = plain.model_copy(update={"neural_lm": str(model_folder), "neural_lm_passages": 8})
    task = load_end_task(data, encoder)
    assert 0 < len(task.corpora["neural_lm"]) <= 8
    assert task.manifest["neural_lm"]["perplexity"] > 1
    assert data_fingerprint(data) != data_fingerprint(plain)
    assert "neural_lm" not in load_end_task(plain, encoder).corpora


def test_what_cannot_be_is_said(encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path) -> None:
    few = DataConfig(task=str(folder()), neural_lm="trained")
    with pytest.raises(UserError, match=r"data\.neural_lm: \d+ passages of domain text are too few, 20 are needed"):
        load_end_task(few, encoder)
    with pytest.raises(UserError, match=r"data\.neural_lm: there is no folder \./nothing"):
        data_fingerprint(few.model_copy(update={"neural_lm": "./nothing"}))
    with pytest.raises(UserError, match=r"data\.neural_lm: no causal language model could be loaded from"):
        neural_text(DataConfig(neural_lm=encoder.name), domain(30))


@pytest.mark.parametrize("kind", ["masked", "headless", "short"])
def test_a_model_of_another_kind_is_refused(model_folder: Path, kind: str) -> None:
    """Transformers loads an encoder as a causal model, too, with a new head where it has none."""
    if kind == "short":
        GPT2LMHeadModel(GPT2Config(vocab_size=5, n_positions=64, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
            model_folder
        )
    else:
        config = BertConfig(
            vocab_size=5, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
        model = BertForMaskedLM(config) if kind == "masked" else BertModel(config, add_pooling_layer=False)
        model.save_pretrained(model_folder)
    message = r"takes 64 positions, 132 are needed" if kind == "short" else r"holds no causal language model"
    with pytest.raises(UserError, match=rf"data\.neural_lm: .* {message}"):
        neural_text(DataConfig(neural_lm=str(model_folder), neural_lm_passages=4), domain(30))


def test_an_external_task(encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path) -> None:
    other = tmp_path / "topics"
    other.mkdir()
    for split in ("train", "dev", "test"):
        write_jsonl(other / f"{split}.jsonl", rows_of(("a film", "x"), ("dull plot", "y"), ("the actor", "z")))
    plain = DataConfig(task=str(folder()))
    data = plain.model_copy(update={"external": (str(other),)})
    task = load_end_task(data, encoder)
    assert task.external["topics"].label_names == ("x", "y", "z")
    assert task.external["topics"].train.labels.tolist() == [0, 1, 2]
    assert data_fingerprint(data) != data_fingerprint(plain)
    for name, message in (
        (str(tmp_path / "nothing"), r"data\.external: there is no file or folder"),
        ("digits", r"data\.external: digits is a task of images"),
    ):
        with pytest.raises(UserError, match=message):
            data_fingerprint(plain.model_copy(update={"external": (name,)}))
    with pytest.raises(UserError, match=r"data\.external: two data sets are called topics"):
        load_end_task(plain.model_copy(update={"external": (str(other), str(other))}), encoder)


def test_what_the_end_task_is_tested_on_is_taken_out_of_an_external_task(
    encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The same texts, split in another way: their labels would be those of dev and test."""
    path = folder()
    other = tmp_path / "again"
    other.mkdir()
    for split in ("dev", "test"):
        write_jsonl(other / f"{split}.jsonl", rows_of(("a film", "x"), ("dull plot", "y")))
    rows = (("the actor", "y"), ("Bad plot", "y"), ("a film", "x"), ("dull scene", "x"))
    write_jsonl(other / "train.jsonl", rows_of(*rows))
    data = DataConfig(task=str(path), external=(str(other),))
    train = load_end_task(data, encoder).external["again"].train
    whole = load_end_task(DataConfig(task=str(other)), encoder).train
    assert train.labels.tolist() == [1, 0]
    assert [train.tokens[i].tolist() for i in range(2)] == [whole.tokens[i].tolist() for i in (0, 2)]
    write_jsonl(other / "train.jsonl", rows_of(("bad plot", "y"), ("very good", "x")))
    with pytest.raises(UserError, match=r"data\.external: all train texts of again are dev or test texts"):
        load_end_task(data, encoder)
