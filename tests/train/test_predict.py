"""From a store to a model with `aang export`, and from texts to labels with `aang predict`."""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import yaml

from aang_ray.cli import main
from aang_ray.errors import UserError
from aang_ray.store import CellRecord, Store
from aang_ray.train import predict
from aang_ray.train.export import Classifier, load_classifier
from aang_ray.train.predict import Form, read_rows
from tests.train.conftest import sentence


@pytest.fixture(scope="module")
def made(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A store with two seeds of two methods, and the model of one of them."""
    root = tmp_path_factory.mktemp("made")
    store, config = root / "store", root / "run.yaml"
    config.write_text(yaml.safe_dump({**tiny, "schedule": {"steps": 12, "eval_every": 4}, "data": tiny["data"]}))
    for method in ("finetune", "static"):
        for seed in (0, 1):
            chosen = ["--set", f"method={method}", "--set", f"seed={seed}"]
            assert main(["train", str(config), *chosen, "--store", str(store)]) == 0
    records = [Store(store).record(cell) for cell in Store(store).done()]
    assert main(["export", records[0].result.cell, "-o", str(root / "model"), "--store", str(store)]) == 0
    return {"root": root, "store": store, "records": records, "model": root / "model", "tiny": tiny}


@pytest.fixture
def model(made: dict[str, Any]) -> Path:
    return Path(made["model"])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    capsys.readouterr()
    assert main([*arguments]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_a_run_is_trained_again_and_gives_the_model_of_its_row(
    made: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record: CellRecord = made["records"][1]
    folder = tmp_path / "model"
    before = {path: path.read_bytes() for path in Path(made["store"]).rglob("*.parquet")}
    name = record.result.cell[:12]
    said = " ".join(printed(capsys, "export", name, "-o", str(folder), "--store", str(made["store"])).split())
    of = f"{record.result.row}, seed {record.result.seed}"
    assert f"the store keeps no model of this run: {of}, is trained again (it took" in said
    assert "the result differs" not in said
    assert "With Transformers alone: pipeline(" in said
    assert f'aang_ray.load_classifier("{folder}")' in said
    readme = (folder / "README.md").read_text()
    same = [other.result for other in made["records"] if other.result.group == record.result.group]
    tests = [100 * one.test.accuracy for one in same if one.test is not None]
    assert "The same configuration with the seeds 0, 1:\n\n| accuracy in % |" in readme
    assert f"| test | {fmean(tests):.2f} ± {stdev(tests):.2f} |\n" in readme
    assert readme.index("The same configuration") < readme.index("## Training")
    card = load_classifier(folder).card["result"]
    assert record.result.test is not None
    assert (card["cell"], card["test"]["loss"]) == (record.result.cell, record.result.test.loss)
    assert {path: path.read_bytes() for path in Path(made["store"]).rglob("*.parquet")} == before


def test_the_best_run_of_a_task(made: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def dev(record: CellRecord) -> float:
        assert record.result.dev is not None
        return record.result.dev.accuracy

    groups: dict[str, list[CellRecord]] = {}
    for record in made["records"]:
        groups.setdefault(record.result.group, []).append(record)
    best = max(groups.values(), key=lambda records: sum(map(dev, records)))
    chosen = max(dev(record) for record in best)
    folder, store = tmp_path / "model", str(made["store"])
    said = printed(capsys, "export", "--best", "task", "-o", str(folder), "--store", store)
    assert said.startswith(f"best on task by dev accuracy: {best[0].result.row}, mean ")
    card = load_classifier(folder).card["result"]
    assert (card["group"], card["dev"]["accuracy"]) == (best[0].result.group, chosen)
    error = printed(capsys, "export", "--best", "nothing", "-o", str(folder), "--store", store, code=2)
    assert error == "error: the table has no column 'nothing'; choose one of task\n"


def test_a_run_whose_data_changed_is_not_trained_again(
    made: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    task = tmp_path / "task"
    task.mkdir()
    for file in Path(made["tiny"]["data"]["task"]).iterdir():
        (task / file.name).write_bytes(file.read_bytes())
    store, config = str(tmp_path / "store"), tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**made["tiny"], "method": "finetune", "schedule": {"steps": 2}}))
    assert main(["train", str(config), "--set", f"data.task={task}", "--store", store]) == 0
    (cell,) = Store(store).done()
    with (task / "train.jsonl").open("a") as file_:
        file_.write(json.dumps({"text": "one more film", "label": "good"}) + "\n")
    error = printed(capsys, "export", cell, "-o", str(tmp_path / "model"), "--store", store, code=2)
    assert error == f"error: run {cell}: its data changed since, so it cannot be trained again\n"
    assert not (tmp_path / "model").exists()


def texts(count: int) -> list[str]:
    rng = random.Random(0)
    return [
        " ".join(sentence(rng.choice(["good", "bad"]), rng) for _ in range(rng.randint(1, 3))) for _ in range(count)
    ]


def answers(output: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.removesuffix("\n").split("\n")] if output else []


def check(found: list[dict[str, Any]], classifier: Classifier, given: list[Any]) -> None:
    labels, probabilities = classifier.predict(given)
    assert [line["label"] for line in found] == labels
    ours = np.array([[line["probabilities"][name] for name in classifier.labels] for line in found])
    np.testing.assert_allclose(ours, probabilities, atol=2e-6)


@pytest.mark.parametrize("form", ["jsonl", "csv", "txt"])
def test_every_form_of_input(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: str
) -> None:
    monkeypatch.setattr(predict, "BLOCK", 7)  # several blocks, the last one smaller
    given = texts(30)
    path = tmp_path / f"input.{form}"
    if form == "jsonl":
        lines = [json.dumps({"id": number, "text": text}) for number, text in enumerate(given)]
        path.write_text("\n\n".join(lines), encoding="utf-8")
    elif form == "csv":
        given[3] = 'a film, "great"\nand warm'
        with path.open("w", newline="", encoding="utf-8-sig") as stream:
            csv.writer(stream).writerows([("id", "text"), *enumerate(given)])
    else:
        given[3] = "ein schöner\u2028Film"
        path.write_bytes("\r\n".join([*given, "", " "]).encode())
    found = answers(printed(capsys, "predict", str(model), "--input", str(path)))
    assert [line["text"] for line in found] == given
    check(found, load_classifier(model), given)


def test_lines_of_stdin(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = texts(5)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(given).encode())))
    check(answers(printed(capsys, "predict", str(model))), load_classifier(model), given)
    rows = "".join(json.dumps({"body": text}) + "\n" for text in given)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(rows.encode())))
    found = answers(printed(capsys, "predict", str(model), "--format", "jsonl", "--text", "body"))
    check(found, load_classifier(model), given)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert printed(capsys, "predict", str(model)) == ""


def test_answers_come_block_by_block(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong row far down does not cost the answers before it."""
    monkeypatch.setattr(predict, "BLOCK", 2)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n' * 5 + b"{}\n")))
    output = io.StringIO()
    with pytest.raises(UserError, match="stdin: row 6 has no text in column 'text'"):
        predict.predict_stream(load_classifier(model), None, output, "jsonl")
    assert len(answers(output.getvalue())) == 4


def test_pairs(made: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    source, task = Path(made["tiny"]["data"]["task"]), tmp_path / "task"
    task.mkdir()
    for split in ("train", "dev", "test"):
        rows = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps({**row, "other": f"a scene with {row['label']} music"}) for row in rows]
        (task / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({**made["tiny"], "method": "finetune", "schedule": {"steps": 2}}))
    chosen = ["--set", f"data.task={task}", "--set", "data.text_b=other", "--store", str(tmp_path / "store")]
    assert main(["train", str(config), *chosen, "--export", str(tmp_path / "model")]) == 0
    classifier = load_classifier(tmp_path / "model")
    given = [("the film", "a scene"), ("the plot was", "dull and cold")]
    path = tmp_path / "input.txt"
    path.write_text("\n".join("\t".join(pair) for pair in given))
    found = answers(printed(capsys, "predict", str(tmp_path / "model"), "--input", str(path)))
    assert [(line["text"], line["text_b"]) for line in found] == given
    check(found, classifier, given)
    found = answers(printed(capsys, "predict", str(tmp_path / "model"), "--input", str(task / "test.jsonl")))
    rows = [json.loads(line) for line in (task / "test.jsonl").read_text().splitlines()]
    check(found, classifier, [(row["text"], row["other"]) for row in rows])
    path.write_text("alone\n")
    error = printed(capsys, "predict", str(tmp_path / "model"), "--input", str(path), code=2)
    assert error == f"error: {path}: row 1 has 1 parts; a pair is two texts with a tab between\n"


@pytest.mark.parametrize(
    ("form", "lines", "error"),
    [
        ("jsonl", '{"text": "a"}\n\n{"text": 1}\n', "file: row 3 has 1, which is no text, in column 'text'"),
        ("jsonl", '{"text": "a"}\n{"other": "b"}\n', "file: row 2 has no text in column 'text'"),
        ("jsonl", '{"text": "a"\n', r"file: row 1 is no valid JSON \(Expecting ',' delimiter\)"),
        ("jsonl", '["a"]\n', "file: row 1 is no JSON object"),
        ("csv", "id,body\n1,a\n", "file: no column 'text'; columns found: id, body"),
        ("csv", "", "file: no column 'text'; columns found: none"),
        ("csv", "id,text\n1,a\n2\n", "file: row 2 has no text in column 'text'"),
    ],
)
def test_wrong_rows(form: Form, lines: str, error: str) -> None:
    with pytest.raises(UserError, match=error):
        list(read_rows(io.StringIO(lines, newline=""), form, ("text",), "file"))


def test_wrong_files(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def error(*arguments: str) -> str:
        return printed(capsys, "predict", str(model), *arguments, code=2)

    missing, parquet, binary = (tmp_path / name for name in ("missing.txt", "x.parquet", "x.txt"))
    assert error("--input", str(missing)) == f"error: --input {missing}: No such file or directory\n"
    assert error("--input", str(tmp_path)) == f"error: --input {tmp_path}: Is a directory\n"
    assert error("--input", str(parquet)).startswith(f"error: --input {parquet}: give a .jsonl or .csv file")
    binary.write_bytes(b"a text\n\xff\n")
    assert error("--input", str(binary)) == f"error: {binary}: is not valid UTF-8 (byte 0xff)\n"
    assert "--text-b other: this model was trained on single texts" in error("--text-b", "other")


def test_a_bar_where_stderr_is_a_terminal(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    path, terminal, output = tmp_path / "input.txt", Terminal(), io.StringIO()
    path.write_text("\n".join(texts(20)))
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    classifier = load_classifier(model)
    terminal.truncate(0)
    predict.predict_stream(classifier, path, output)
    assert "20 texts" in terminal.getvalue()
    terminal.truncate(0)
    terminal.seek(0)
    predict.predict_stream(classifier, path, Terminal())  # the answers go to a terminal, too
    assert terminal.getvalue() == ""


@pytest.fixture(scope="module")
def other(made: dict[str, Any]) -> Path:
    """The model of another run of the store."""
    folder = Path(made["root"]) / "other"
    assert main(["export", made["records"][3].result.cell, "-o", str(folder), "--store", str(made["store"])]) == 0
    return folder


def labelled_file(folder: Path, labels: tuple[str, ...], count: int = 12) -> Path:
    path = folder / "labelled.jsonl"
    draw = random.Random(3)
    rows = [{"text": sentence(labels[i % 2], draw), "label": labels[i % 2]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_two_models_are_compared(model: Path, other: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, second = load_classifier(model), load_classifier(other)
    path = labelled_file(tmp_path, first.labels)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (ours, _), (theirs, _) = (one.predict([row["text"] for row in rows]) for one in (first, second))
    agreed = sum(a == b for a, b in zip(ours, theirs, strict=True))
    text = printed(capsys, "compare", str(model), str(other), str(path))
    assert f"agree on {agreed} of 12 texts" in text
    right = 100 * np.mean([a == row["label"] for a, row in zip(ours, rows, strict=True)])
    assert f"accuracy in %: {model} {right:.2f}, {other}" in text
    assert "exact McNemar p" in text
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(row["text"] for row in rows))
    unlabelled = printed(capsys, "compare", str(model), str(other), str(lines), "--all")
    assert "the true labels are not known" in unlabelled
    assert unlabelled.count("\n| ") == (12 - agreed and 12 - agreed + 2)
    assert "agree on 12 of 12" in printed(capsys, "compare", str(model), str(model), str(path))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", [], "has no rows"),
        ('{"text": "a", "label": null}', [], "row 1 has no label in column 'label'"),
        ('{"text": "a", "label": "unknown"}', [], "none of its labels is one of the models'"),
        ('{"text": "a"}', ["--label", "gold"], "row 1 has no label in column 'gold'"),
        ('{"label": "x"}', [], "row 1 has no text in column 'text'"),
        ('{"text": "a"}', ["--text-b", "b"], "this model was trained on single texts"),
        ("{", [], "row 1 is no valid JSON"),
        ("a text", ["--format", "lines", "--label", "x"], "has one text a line and no columns"),
    ],
)
def test_files_that_cannot_be_compared(
    model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, options: list[str], message: str
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    assert message in printed(capsys, "compare", str(model), str(model), str(path), *options, code=2)
