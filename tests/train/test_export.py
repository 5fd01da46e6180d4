"""An exported model makes the same predictions as the run's own model, with and without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError
from aang_ray.model.heads import end_task_head
from aang_ray.model.portable import pool
from aang_ray.store import CellRecord, ResultRow, Scores
from aang_ray.train import export as export_module
from aang_ray.train.export import load_classifier
from aang_ray.train.model_card import ModelFacts, model_card, with_seeds
from aang_ray.train.run import run_cell
from tests.model.families import FAMILIES, small_model
from tests.train.conftest import FILLER, WORDS
from tests.train.running import tiny_config

SPECIAL = {
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "fairseq": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "modernbert": ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"],
}
"""Special tokens by their ids. Families of fairseq count positions from the id of the padding, 1."""
OWN_CLASS = {"bert": "BertFor", "roberta": "RobertaFor", "mpnet": "MPNetFor"}
"""Families whose own class holds the model, if texts are pooled by their first token."""

ELSEWHERE = """
import json, sys
sys.modules["aang_ray"] = None  # any import of it fails
import torch
from transformers import pipeline
from transformers.utils import logging
logging.disable_progress_bar()
torch.set_num_threads(1)
made = {}
for folder, own_code, texts in json.load(sys.stdin):
    trust = {"trust_remote_code": True} if own_code else {}
    classify = pipeline("text-classification", folder, device="cpu", **trust)
    lists = classify(texts, truncation=True, top_k=None, batch_size=7)
    made[folder] = [type(classify.model).__name__, [{one["label"]: one["score"] for one in found} for found in lists]]
assert not any(name.startswith("aang_ray.") for name in sys.modules)
json.dump(made, sys.stdout)
"""


@dataclass(frozen=True)
class Exported:
    """A run's export, and what the run itself predicted for its test split."""

    folder: Path
    texts: list[Any]
    labels: list[str]
    probabilities: npt.NDArray[np.float32]


def write_family(folder: Path, family: str) -> Path:
    """Write a small random encoder with a word-level tokenizer of the family's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = SPECIAL[
        "fairseq" if family in ("roberta", "mpnet") else "modernbert" if family == "modernbert" else "bert"
    ]
    words = [*special, *FILLER, *WORDS["good"], *WORDS["bad"]]
    first, last, pad, unknown, mask = (
        next(token for token in special if token.strip("[]<>").lower() in names)
        for names in (("cls", "s"), ("sep", "/s"), ("pad",), ("unk",), ("mask",))
    )
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    second = 0 if special == SPECIAL["fairseq"] else 1
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:{second} {last}:{second}",
        special_tokens=[(token, words.index(token)) for token in (first, last)],
    )
    named = {"pad_token": pad, "unk_token": unknown, "cls_token": first, "sep_token": last, "mask_token": mask}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=40, **named).save_pretrained(folder)
    small_model(family, "Model").save_pretrained(folder)
    return folder


def texts_of(task: Path, split: str = "test") -> list[Any]:
    rows = [json.loads(line) for line in (task / f"{split}.jsonl").read_text().splitlines()]
    return [(row["text"], row["other"]) if "other" in row else row["text"] for row in rows]


def exported(config: RunConfig, folder: Path) -> Exported:
    record = run_cell(config, export=folder)
    assert record.predictions is not None
    rows = record.predictions.filter(pc.field("split") == "test").sort_by("position")
    found = rows.column("probabilities").to_pylist(maps_as_pydicts="strict")
    probabilities = np.array([[line["bad"], line["good"]] for line in found], dtype=np.float32)
    labels = [max(line, key=lambda label: line[label]) for line in found]
    return Exported(folder, texts_of(Path(config.data.task)), labels, probabilities)


def elsewhere(*models: Exported, own_code: list[bool]) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Return class and probabilities of each model in a new interpreter that cannot import this package."""
    asked = [
        (
            str(model.folder),
            own,
            [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in model.texts],
        )
        for model, own in zip(models, own_code, strict=True)
    ]
    place = {"HF_MODULES_CACHE": str(models[0].folder.parent / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ELSEWHERE]
    result = subprocess.run(
        command,
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
        cwd=models[0].folder.parent,
        env={**os.environ, **place},
    )
    assert result.returncode == 0, result.stderr
    assert "is not supported for" not in result.stderr
    answers = json.loads(result.stdout).values()
    return [(kind, np.array([[line["bad"], line["good"]] for line in lines], np.float32)) for kind, lines in answers]


def test_every_family_without_this_package(tiny: dict[str, Any], tmp_path: Path) -> None:
    models, kinds = [], []
    for family in FAMILIES:
        encoder = write_family(tmp_path / family, family)
        for pooling in ("first", "mean"):
            settings = [f"encoder.name={encoder}", f"encoder.pooling={pooling}", "encoder.layers=2"]
            config = tiny_config(tiny, "method=finetune", "schedule.steps=6", "data.max_tokens=12", *settings)
            models.append(exported(config, tmp_path / f"{family}-{pooling}"))
            kinds.append(OWN_CLASS.get(family, "") if pooling == "first" else "")
    check_all(models, kinds)


def check_all(models: list[Exported], kinds: list[str]) -> None:
    """Check models in a new interpreter and here; `kinds` are the family's own classes, empty for our own code."""
    answers = elsewhere(*models, own_code=[not kind for kind in kinds])
    for model, kind, (found, probabilities) in zip(models, kinds, answers, strict=True):
        assert found == (f"{kind}SequenceClassification" if kind else "PooledClassifier")
        np.testing.assert_allclose(probabilities, model.probabilities, atol=1e-5, err_msg=str(model.folder))
        assert [("bad", "good")[index] for index in probabilities.argmax(axis=1)] == model.labels
        assert probabilities.std() > 1e-3, "the texts must differ"
        assert (model.folder / export_module.CODE).is_file() == (not kind)
        labels, ours = load_classifier(model.folder).predict(model.texts)
        assert labels == model.labels
        np.testing.assert_array_equal(ours, model.probabilities)
        if not kind:  # who does not run the folder's code gets no other model
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                AutoModelForSequenceClassification.from_pretrained(model.folder, trust_remote_code=False)


def test_a_family_with_its_own_head_needs_no_code(tiny: dict[str, Any], tmp_path: Path) -> None:
    kinds = {
        "distilbert": "DistilBertFor",
        "electra": "ElectraFor",
        "deberta-v2": "DebertaV2For",
        "modernbert": "ModernBertFor",
        "roberta": "RobertaFor",
    }
    models = []
    for family in kinds:
        encoder = write_family(tmp_path / family, family)
        settings = [f"encoder.name={encoder}", "encoder.pooling=first", "encoder.head=native", "schedule.steps=4"]
        models.append(exported(tiny_config(tiny, "method=finetune", *settings), tmp_path / f"{family}-model"))
    check_all(models, list(kinds.values()))


def test_heads_that_a_family_does_not_have(tiny: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"native goes with encoder\.pooling: first, not with mean"):
        run_cell(tiny_config(tiny, "method=finetune", "encoder.head=native", "encoder.pooling=mean"))
    with pytest.raises(UserError, match="native is not known for encoders of type albert, only for bert"):
        end_task_head("native", transformers.AlbertConfig(), "first", 2, 0.1)


def test_adapters_are_merged_and_stand_beside(tiny: dict[str, Any], tmp_path: Path) -> None:
    from peft import PeftModel

    models = []
    places = [("bert", "first"), ("distilbert", "mean"), ("deberta-v2", "first"), ("modernbert", "mean")]
    for family, pooling in places:
        encoder = write_family(tmp_path / family, family)
        settings = [f"encoder.name={encoder}", f"encoder.pooling={pooling}", "optim.body_lr=0.01", "precision=fp32"]
        adapter = "encoder.adapter={rank: 3, alpha: 12, targets: all-linear}"
        config = tiny_config(tiny, "method=static", "schedule.steps=6", "data.max_tokens=12", adapter, *settings)
        models.append(exported(config, tmp_path / f"{family}-{pooling}"))
    answers = elsewhere(*models, own_code=[place != ("bert", "first") for place in places])
    for model, (_, probabilities), (family, _) in zip(models, answers, places, strict=True):
        np.testing.assert_allclose(probabilities, model.probabilities, atol=1e-5, err_msg=family)
        labels, ours = load_classifier(model.folder).predict(model.texts)
        assert labels == model.labels
        np.testing.assert_allclose(ours, model.probabilities, atol=1e-5)
        base, ids = AutoModel.from_pretrained(tmp_path / family), torch.tensor([[6, 9, 7]])
        merged = load_classifier(model.folder)._encoder.body
        expected = merged(input_ids=ids).last_hidden_state
        assert not torch.allclose(base.eval()(input_ids=ids).last_hidden_state, expected, atol=1e-3)
        adapted = PeftModel.from_pretrained(base, model.folder / "adapter").eval()
        torch.testing.assert_close(adapted(input_ids=ids).last_hidden_state, expected, rtol=0, atol=1e-5)
        assert "holds them alone, for `peft.PeftModel.from_pretrained`" in (model.folder / "README.md").read_text()


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may ask the user whether it may run code of a folder."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked the user"))


@pytest.fixture
def pairs(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """The tiny task with a second text."""
    source, task = Path(tiny["data"]["task"]), tmp_path / "pairs"
    task.mkdir()
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "other": f"a scene with {row['label']} music"}) for row in rows]
        (task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return task


def test_pairs(tiny: dict[str, Any], tmp_path: Path, pairs: Path) -> None:
    models = []
    for family, pooling in (("bert", "first"), ("roberta", "first"), ("electra", "mean"), ("distilbert", "first")):
        encoder = write_family(tmp_path / family, family)
        settings = [f"encoder.name={encoder}", f"encoder.pooling={pooling}", f"data.task={pairs}", "data.text_b=other"]
        config = tiny_config(tiny, "method=finetune", "schedule.steps=4", "data.max_tokens=14", *settings)
        models.append(exported(config, tmp_path / f"{family}-{pooling}"))
    for model, (_, probabilities) in zip(models, elsewhere(*models, own_code=[False, False, True, True]), strict=True):
        np.testing.assert_allclose(probabilities, model.probabilities, atol=1e-5, err_msg=str(model.folder))
        classifier = load_classifier(model.folder)
        np.testing.assert_array_equal(classifier.predict(model.texts)[1], model.probabilities)
        labels, alone = classifier.predict(model.texts[0])
        assert labels == model.labels[:1]
        np.testing.assert_allclose(alone, model.probabilities[:1], atol=1e-5)
        for single in ("alone", ["alone"], ["alone", "too"]):
            with pytest.raises(UserError, match="trained on pairs of texts; 'alone' is one text"):
                classifier.predict(single)
    assert "text_pair" in (models[0].folder / "README.md").read_text()


@pytest.mark.parametrize(
    "settings",
    [
        ["method=static", "encoder.layers=2"],
        ["method=finetune", "encoder.pooling=first", "data.max_tokens=8", "encoder.dropout=0.5"],
        ["method=finetune", "precision=bf16"],
    ],
)
def test_round_trip(tiny: dict[str, Any], tmp_path: Path, settings: list[str]) -> None:
    model = exported(tiny_config(tiny, *settings), tmp_path / "deep" / "model")
    classifier = load_classifier(tmp_path / "deep" / "model")
    labels, probabilities = classifier.predict(model.texts)
    assert classifier.labels == ("bad", "good")
    assert labels == model.labels
    np.testing.assert_array_equal(probabilities, model.probabilities)
    nothing, none = classifier.predict([])
    assert (nothing, none.shape) == ([], (0, 2))
    for one in (model.texts[0], model.texts[:1]):
        label, alone = classifier.predict(one)
        assert label == labels[:1]
        assert alone.shape == (1, 2)
        np.testing.assert_allclose(alone, probabilities[:1], atol=1e-2 if "precision=bf16" in settings else 1e-5)
    assert (classifier.card["result"]["method"], classifier.card["max_tokens"]) == (
        settings[0].partition("=")[2],
        8 if "data.max_tokens=8" in settings else 64,
    )
    tokenizer = AutoTokenizer.from_pretrained(model.folder, trust_remote_code=False)
    assert tokenizer.model_max_length == classifier.card["max_tokens"]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_padding_that_encoder_and_tokenizer_do_not_share(tiny: dict[str, Any], tmp_path: Path) -> None:
    """RoBERTa counts positions from its own padding, here a word of the tokenizer: its own class would count wrong."""
    encoder = tmp_path / "encoder"
    AutoTokenizer.from_pretrained(tiny["encoder"]["name"]).save_pretrained(encoder)
    small_model("roberta", "Model").save_pretrained(encoder)
    settings = [f"encoder.name={encoder}", "encoder.pooling=first", "schedule.steps=4"]
    model = exported(tiny_config(tiny, "method=finetune", *settings), tmp_path / "model")
    ((kind, probabilities),) = elsewhere(model, own_code=[True])
    assert kind == "PooledClassifier"
    np.testing.assert_allclose(probabilities, model.probabilities, atol=1e-5)


def test_the_encoder_alone_is_no_classifier(tiny: dict[str, Any], tmp_path: Path) -> None:
    run_cell(
        tiny_config(tiny, "method=finetune", "encoder.pooling=first", "schedule.steps=2"), export=tmp_path / "model"
    )
    assert not [path for path in (tmp_path / "model").iterdir() if path.is_dir()]
    body = AutoModel.from_pretrained(tmp_path / "model")
    assert body.config.id2label == {0: "bad", 1: "good"}


def test_pooling_does_not_mind_on_which_side_padding_stands() -> None:
    hidden_BLH = torch.arange(12.0).view(2, 3, 2)
    mask_BL = torch.tensor([[1, 1, 0], [0, 1, 1]])
    assert pool(hidden_BLH, mask_BL, "first").tolist() == [[0, 1], [8, 9]]
    assert pool(hidden_BLH, mask_BL, "mean").tolist() == [[1, 2], [9, 10]]


def test_a_second_export_replaces_the_first_and_nothing_else(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tiny, "method=finetune", "schedule.steps=2")
    folder = tmp_path / "model"
    (tmp_path / ".model.new").mkdir()  # of an export that was killed
    run_cell(config, export=folder)
    (folder / "notes.txt").write_text("mine")
    run_cell(config, export=folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_pooled_classifier.py",
        "run.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    with pytest.raises(UserError, match="trained on single texts"):
        load_classifier(folder).predict([("a", "b")])
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").touch()
    with pytest.raises(UserError, match="there is something that is not an exported model"):
        run_cell(config, export=tmp_path / "precious")


def test_an_export_that_fails_leaves_what_was_there(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    run_cell(tiny_config(tiny, "method=finetune", "schedule.steps=2"), export=folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "model_card", full)
    with pytest.raises(OSError, match="No space"):
        run_cell(tiny_config(tiny, "method=finetune", "schedule.steps=3"), export=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_failed_run_exports_nothing(tiny: dict[str, Any], tmp_path: Path) -> None:
    record = run_cell(tiny_config(tiny, "method=static", "optim.body_lr=1e30"), export=tmp_path / "model")
    assert record.result.status == "failed"
    assert not list(tmp_path.iterdir())


def test_what_is_no_export_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no exported model: it holds no run.json"):
        load_classifier(tmp_path)
    (tmp_path / "model_card.json").write_text("{}")
    with pytest.raises(UserError, match="has format 1, this version reads format 2; export the model again"):
        load_classifier(tmp_path)
    folder = tmp_path / "model"
    run_cell(tiny_config(tiny, "method=finetune", "schedule.steps=2"), export=folder)
    run = folder / "run.json"
    whole = run.read_text()
    run.write_text(whole[:-10])
    with pytest.raises(UserError, match="is not valid JSON"):
        load_classifier(folder)
    run.write_text(whole.replace('"format": 2', '"format": 3'))
    with pytest.raises(UserError, match="has format 3, this version reads format 2"):
        load_classifier(folder)
    run.write_text(whole)
    weights = folder / "model.safetensors"
    kept = load_file(weights)
    save_file({name: value for name, value in kept.items() if name != "dense.bias"}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights, dense\.bias first"):
        load_classifier(folder)
    weights.write_bytes(b"")
    with pytest.raises(UserError, match="the model cannot be read, export it again"):
        load_classifier(folder)
    weights.unlink()
    with pytest.raises(UserError, match="the model cannot be read, export it again"):
        load_classifier(folder)


def test_a_score_without_examples_is_null() -> None:
    assert export_module._without_nan({"a": [float("nan"), 1.0], "b": (2,)}) == {"a": [None, 1.0], "b": [2]}


FACTS = ModelFacts(
    labels=("bad", "good"), base_model="owner/name", layers=2, pooling="mean", max_tokens=64, pairs=False, own_code=True
)


@pytest.fixture(scope="module")
def learned(tiny: dict[str, Any]) -> CellRecord:
    """The record of a run with learned weights."""
    return run_cell(tiny_config(tiny, "method=aang", "schedule.steps=8", "schedule.eval_every=2"))


def test_what_the_hub_reads_of_a_card(learned: CellRecord, tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    path = tmp_path / "README.md"
    path.write_text(model_card(learned, FACTS))
    data = ModelCard.load(path).data
    assert (data.pipeline_tag, data.library_name, data.license) == ("text-classification", "transformers", "unknown")
    assert (data.base_model, data.language) == ("owner/name", None)
    assert "custom_code" in data.tags
    result = learned.result
    assert result.test is not None
    assert result.test_clean is not None
    found = {(one.dataset_config, one.metric_type): one.metric_value for one in data.eval_results}
    assert found == {
        (None, "accuracy"): round(result.test.accuracy, 4),
        (None, "f1"): round(result.test.macro_f1, 4),
        ("without texts of train or dev", "accuracy"): round(result.test_clean.accuracy, 4),
        ("without texts of train or dev", "f1"): round(result.test_clean.macro_f1, 4),
    }
    assert "base_model" not in yaml.safe_load(model_card(learned, _facts(base_model=None)).split("---")[1])


def _facts(**changes: Any) -> ModelFacts:
    return ModelFacts(**{**vars(FACTS), **changes})


def test_what_people_read_of_a_card(learned: CellRecord) -> None:
    card, result = model_card(learned, FACTS), learned.result
    assert result.test is not None
    assert f"| test | {100 * result.test.accuracy:.2f} | {100 * result.test.macro_f1:.2f} | 40 |" in card
    assert "`bad`, `good`" in card
    assert "owner/name, first 2 layers; the mean over all tokens" in card
    assert 'pipeline("text-classification", "path/to/this/folder", trust_remote_code=True)' in card
    assert "trust_remote_code" not in model_card(learned, _facts(own_code=False))
    assert "schedule.steps: 8\n" in card
    assert result.config["data"]["task"] not in card  # a path of this machine
    assert " · denoise | " in card
    first, last = learned.weights[0], learned.weights[-1]
    assert f"The weight of the end task was {first.end_task_weight:.3f} at first" in card
    assert last.step == 8
    assert "`aang weights STORE` compares the seeds" in card


def test_a_card_warns_of_leaked_texts_and_of_the_majority_class(learned: CellRecord) -> None:
    def card(**changes: Any) -> str:
        result = learned.result
        changed = type(result)(**{**vars(result), **changes})
        return model_card(CellRecord(changed, learned.history, learned.weights), FACTS)

    def scores(examples: int) -> Scores:
        return Scores(0.5, 0.5, examples, {"bad": examples, "good": 0}, 0.7)

    assert "Warning" not in card(test=scores(40), test_clean=scores(40), majority=False)
    leaked = card(test=scores(40), test_clean=scores(30))
    assert "**Warning:** 10 of the 40 test texts also stand in train or dev" in leaked
    assert "believe the score without them" in leaked
    nothing = Scores(float("nan"), float("nan"), 0, {"bad": 0, "good": 0}, float("nan"))
    all_leaked = card(test=scores(40), test_clean=nothing)
    assert "40 of the 40 test texts" in all_leaked
    assert "no test text is left without them" in all_leaked
    assert "nan" not in all_leaked
    assert "never scored above the majority class" in card(majority=True)


def test_the_seeds_of_a_card(learned: CellRecord) -> None:
    def run(seed: int, accuracy: float, clean: int) -> ResultRow:
        scores, fewer = (Scores(accuracy, 0.5, count, {"bad": count, "good": 0}, 0.7) for count in (40, clean))
        return replace(learned.result, seed=seed, metric="accuracy", dev=scores, test=scores, test_clean=fewer)

    card = model_card(learned, FACTS)
    three = with_seeds(card, [run(2, 0.9, 0), run(0, 0.7, 0), run(1, 0.8, 0)])
    assert "with the seeds 0, 1, 2:\n" in three
    assert "| test | 80.00 ± 10.00 |" in three
    section = three.partition("The same configuration")[2].partition("## Training")[0]
    assert "without texts" not in section, "no test text is left"
    before, _, after = card.partition("\n## Training")
    assert three.startswith(before)
    assert three.endswith(after)


def test_a_card_of_a_run_without_objectives(learned: CellRecord) -> None:
    alone = CellRecord(learned.result, learned.history, ())
    assert "trained on the end task alone" in model_card(alone, FACTS)
