"""An exported model makes the same predictions as the run's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from aang_ray.errors import UserError
from aang_ray.train import export as export_module
from aang_ray.train.evaluate import Predictions, SplitReader
from aang_ray.train.export import load_classifier
from aang_ray.train.run import run_cell
from tests.train.running import tiny_config


def texts_of(tiny: dict[str, Any], split: str) -> list[str]:
    lines = (Path(tiny["data"]["task"]) / f"{split}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(
    "settings",
    [
        ["method=static", "encoder.layers=2"],
        ["method=finetune", "encoder.pooling=first", "data.max_tokens=8", "encoder.dropout=0.5"],
        ["method=finetune", "precision=bf16"],
    ],
)
def test_round_trip(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]) -> None:
    made: list[Predictions] = []
    predict = SplitReader.predict

    def recorded(self: SplitReader, *arguments: Any) -> Predictions:
        made.append(predict(self, *arguments))
        return made[-1]

    monkeypatch.setattr(SplitReader, "predict", recorded)
    result = run_cell(tiny_config(tiny, *settings), export=tmp_path / "deep" / "model").result
    ours = made[-2]  # test, and then dev once more for the stored predictions
    monkeypatch.undo()
    classifier = load_classifier(tmp_path / "deep" / "model")
    labels, probabilities = classifier.predict(texts_of(tiny, "test"))
    assert classifier.labels == ("bad", "good")
    assert labels == [classifier.labels[index] for index in ours.classes_E]
    np.testing.assert_array_equal(probabilities, torch.softmax(ours.logits_EC, dim=1).numpy())
    assert result.test is not None
    assert classifier.card["result"]["test"]["accuracy"] == result.test.accuracy
    assert classifier.card["result"]["cell"] == result.cell
    nothing, none = classifier.predict([])
    assert (nothing, none.shape) == ([], (0, 2))
    one, alone = classifier.predict(texts_of(tiny, "test")[:1])
    assert one == labels[:1]
    np.testing.assert_allclose(alone, probabilities[:1], atol=1e-2 if "precision=bf16" in settings else 1e-5)


def test_others_can_read_the_encoder(tiny: dict[str, Any], tmp_path: Path) -> None:
    run_cell(tiny_config(tiny, "method=finetune"), export=tmp_path / "model")
    folder = tmp_path / "model" / "encoder"
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    model: Any = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(["the film was great"], return_tensors="pt")
    classifier = load_classifier(tmp_path / "model")
    with torch.no_grad():
        pooled = model(**tokens).last_hidden_state.mean(dim=1)
        probabilities = torch.softmax(classifier._head(pooled), dim=1)
    np.testing.assert_allclose(probabilities.numpy(), classifier.predict(["the film was great"])[1], atol=1e-5)


def test_pairs(tiny: dict[str, Any], tmp_path: Path) -> None:
    source, task = Path(tiny["data"]["task"]), tmp_path / "task"
    task.mkdir()
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "other": f"a scene with {row['label']} music"}) for row in rows]
        (task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    config = tiny_config(tiny, "method=finetune", f"data.task={task}", "data.text_b=other", "schedule.steps=4")
    run_cell(config, export=tmp_path / "model")
    classifier = load_classifier(tmp_path / "model")
    labels, probabilities = classifier.predict([("the film", "a scene"), ("the plot", "was dull")])
    assert len(labels) == 2
    assert probabilities.sum(axis=1) == pytest.approx([1, 1])
    with pytest.raises(UserError, match="trained on pairs of texts; 'alone' is one text"):
        classifier.predict(["alone"])


def test_a_second_export_replaces_the_first_and_nothing_else(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config(tiny, "method=finetune", "schedule.steps=2")
    folder = tmp_path / "model"
    (tmp_path / ".model.new").mkdir()  # of an export that was killed
    run_cell(config, export=folder)
    (folder / "notes.txt").write_text("mine")
    run_cell(config, export=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["encoder", "head.safetensors", "model_card.json"]
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

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        run_cell(tiny_config(tiny, "method=finetune", "schedule.steps=3"), export=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_failed_run_exports_nothing(tiny: dict[str, Any], tmp_path: Path) -> None:
    record = run_cell(tiny_config(tiny, "method=static", "optim.body_lr=1e30"), export=tmp_path / "model")
    assert record.result.status == "failed"
    assert not list(tmp_path.iterdir())


def test_what_is_no_export_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no exported model: it holds no model_card.json"):
        load_classifier(tmp_path)
    run_cell(tiny_config(tiny, "method=finetune", "schedule.steps=2"), export=tmp_path / "model")
    card = tmp_path / "model" / "model_card.json"
    whole = card.read_text()
    card.write_text(whole[:-10])
    with pytest.raises(UserError, match="is not valid JSON"):
        load_classifier(tmp_path / "model")
    card.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(UserError, match="has format 2, this version reads format 1"):
        load_classifier(tmp_path / "model")
    card.write_text(whole)
    (tmp_path / "model" / "head.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="holds no head for 2 labels"):
        load_classifier(tmp_path / "model")


def test_a_score_without_examples_is_null() -> None:
    assert export_module._without_nan({"a": [float("nan"), 1.0], "b": (2,)}) == {"a": [None, 1.0], "b": [2]}
