"""Neural-LM text: written once, by a model whose perplexity on held-out domain text is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data import data_fingerprint, load_end_task, neural_lm
from aang_ray.data import neural_lm as causal
from aang_ray.data.neural_lm import CausalModel, NeuralText, neural_fingerprint, neural_text
from aang_ray.data.pretrained import locate_model
from aang_ray.errors import UserError
from tests.data.conftest import TRAIN, ids, rows_of

SENTENCES = [f"the {adjective} {noun} was {verb}" for adjective in ("good", "bad", "dull") for noun in ("film", "plot")
             for verb in ("seen", "made", "liked", "cut")]  # fmt: skip


def domain(count: int, seed: int = 0) -> list[str]:
    """Random sentences, of which there are 3 * 2 * 4 = 24 different ones."""
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
    """Its held-out perplexity comes near the lowest possible one, and it writes sentences of the domain."""
    monkeypatch.setattr(causal, "WIDTH", 48)
    monkeypatch.setattr(causal, "LAYERS", 2)
    written = neural_text(DataConfig(neural_lm="trained", neural_lm_passages=40), domain(600))
    # A sentence is 5 words and the end, 24 equally likely sentences: 24^(1/6) = 1.70 is the least perplexity
    # if every word is one token.
    assert 1.6 < written.perplexity < 2.2
    # Half of 5 %: the other half chose the epoch.
    assert written.held_out == 15
    assert sum(passage in SENTENCES for passage in written.passages) >= 30


@pytest.mark.parametrize(("count", "choosing", "measured"), [(20, 1, 1), (60, 1, 2), (600, 15, 15), (12_000, 250, 250)])
def test_the_recorded_perplexity_is_of_passages_used_for_nothing_else(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, count: int, choosing: int, measured: int
) -> None:
    given: list[list[str]] = []

    def train_small(passages: Sequence[str], held_out: Sequence[str], seed: int, on_step: object) -> CausalModel:
        given.extend((list(passages), list(held_out)))
        return causal.load_causal(locate_model(str(model_folder), "data.neural_lm", "model"))

    monkeypatch.setattr(causal, "train_small", train_small)
    passages = [f"{'good ' * (1 + i % 7)}{'film ' * (i % 5)}{i}" for i in range(count)]
    written = neural_text(DataConfig(neural_lm="trained", neural_lm_passages=1), passages)
    learned, chose = given
    rest = sorted(set(passages) - set(learned) - set(chose))
    assert (len(chose), len(rest), written.held_out) == (choosing, measured, measured)
    assert len(learned) + len(chose) + len(rest) == count
    model = train_small([], [], 0, None)
    assert written.perplexity == pytest.approx(causal.perplexity(model, rest), rel=1e-5)
    assert written.perplexity != pytest.approx(causal.perplexity(model, learned), rel=1e-5)
    assert written.perplexity != pytest.approx(causal.perplexity(model, chose), rel=1e-5)


def test_a_given_model_is_measured_on_passages_that_prompt_nothing(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No epoch has to be chosen: all held-out passages are measured."""
    prompts: list[str] = []
    generate = causal.generate

    def generating(model: CausalModel, count: int, domain: Sequence[str], length: int, seed: int) -> Iterator[str]:
        prompts.extend(domain)
        return generate(model, count, domain, length, seed)

    monkeypatch.setattr(causal, "generate", generating)
    passages = [f"{'good ' * (1 + i % 7)}{'film ' * (i % 5)}{i}" for i in range(100)]
    written = neural_text(DataConfig(neural_lm=str(model_folder), neural_lm_passages=1), passages)
    held_out = sorted(set(passages) - set(prompts))
    assert written.held_out == len(held_out) == 5
    model = causal.load_causal(locate_model(str(model_folder), "data.neural_lm", "model"))
    assert written.perplexity == pytest.approx(causal.perplexity(model, held_out), rel=1e-5)
    assert written.perplexity != pytest.approx(causal.perplexity(model, prompts), rel=1e-5)


def test_held_out_text_chooses_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out text has reversed sentences: they grow less likely while the training text grows likelier."""
    monkeypatch.setattr(causal, "WIDTH", 32)
    monkeypatch.setattr(causal, "LAYERS", 1)
    passages, held_out = domain(300), [" ".join(reversed(sentence.split())) for sentence in SENTENCES]
    measured: list[tuple[Sequence[str], float]] = []
    perplexity, steps = causal.perplexity, [(0, 0)]

    def measuring(model: CausalModel, of: Sequence[str]) -> float:
        measured.append((of, perplexity(model, of)))
        return measured[-1][1]

    monkeypatch.setattr(causal, "perplexity", measuring)
    trained = causal.train_small(passages, held_out, 0, lambda done, most: steps.append((done, most)))
    assert all(list(of) == held_out for of, _ in measured)
    values = [value for _, value in measured]
    assert 2 <= len(values) < causal.MOST_EPOCHS
    assert steps[-1][0] < steps[-1][1]
    assert min(values) < values[-1]
    assert perplexity(trained, held_out) == pytest.approx(min(values), rel=1e-4)


def test_the_text_is_written_once(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(neural_lm=str(model_folder), neural_lm_passages=10)
    first = neural_text(data, domain(30))
    monkeypatch.setattr(neural_lm, "_make", lambda *_: pytest.fail("written again"))
    assert neural_text(data, domain(30)) == first
    assert set(" ".join(first.passages).split()) <= {"good", "bad", "film", "[UNK]"}


def test_the_recipe_of_training_is_in_the_fingerprint_of_the_trained_model_only(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, given = (DataConfig(neural_lm=name) for name in ("trained", str(model_folder)))
    before = neural_fingerprint(trained), neural_fingerprint(given)
    monkeypatch.setattr(neural_lm, "TRAINED_RECIPE", neural_lm.TRAINED_RECIPE + 1)
    assert neural_fingerprint(trained) != before[0]
    assert neural_fingerprint(given) == before[1]


def test_perplexity_agrees_with_the_loss_of_transformers(model_folder: Path) -> None:
    loaded = causal.load_causal(locate_model(str(model_folder), "data.neural_lm", "model"))
    passage = "good film bad bad film"
    ids = torch.tensor([[1, 3, 2, 2, 3, 4]])
    with torch.no_grad():
        expected = math.exp(loaded.model(input_ids=ids, labels=ids).loss)
    assert causal.perplexity(loaded, [passage]) == pytest.approx(expected, rel=1e-5)
    # Padding changes nothing: the mean is over the tokens of both passages.
    both = causal.perplexity(loaded, [passage, "good"])
    other = causal.perplexity(loaded, ["good"])
    assert math.log(both) == pytest.approx((5 * math.log(expected) + math.log(other)) / 6, rel=1e-5)


def test_the_text_becomes_a_corpus(
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


def test_dev_and_test_texts_are_neither_learned_from_nor_kept(
    encoder: EncoderConfig, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[str] = []

    def written(_: DataConfig, passages: Sequence[str]) -> NeuralText:
        learned.extend(passages)
        return NeuralText(["Dull  SCENE", "the actor", "very good", "BAD plot"], "none", 2.0, 1)

    monkeypatch.setattr(neural_lm, "neural_text", written)
    path = folder()
    (path / "domain.txt").write_text("the scene\nBright  actor\nvery GOOD\n")
    task = load_end_task(DataConfig(task=str(path), neural_lm="trained"), encoder)
    # Of the generated passages "dull scene" is in test, "bad plot" in both, "very good" in dev.
    (only,) = (task.corpora["neural_lm"][i].tolist() for i in range(len(task.corpora["neural_lm"])))
    assert only == ids("the actor")
    assert task.manifest["corpora"]["neural_lm"] == {"passages": 1, "left_out": 3}
    # Of the in-domain text "bright actor" is in test and "very good" in dev; train is not filtered.
    assert learned == [*(str(row["text"]) for row in TRAIN), "the scene"]


def test_errors(encoder: EncoderConfig, folder: Callable[..., Path], tmp_path: Path) -> None:
    few = DataConfig(task=str(folder()), neural_lm="trained")
    with pytest.raises(UserError, match=r"data\.neural_lm: \d+ passages of domain text are too few, 20 are needed"):
        load_end_task(few, encoder)
    with pytest.raises(UserError, match=r"data\.neural_lm: there is no folder \./nothing"):
        data_fingerprint(few.model_copy(update={"neural_lm": "./nothing"}))
    with pytest.raises(UserError, match=r"data\.neural_lm: no causal language model could be loaded from"):
        neural_text(DataConfig(neural_lm=encoder.name), domain(30))


@pytest.mark.parametrize("kind", ["masked", "headless", "short"])
def test_a_model_of_another_kind_is_refused(model_folder: Path, kind: str) -> None:
    """Transformers also loads an encoder as a causal model, and gives it a new head if it has none."""
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
