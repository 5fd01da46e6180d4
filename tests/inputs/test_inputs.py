"""Whatever is given wrongly ends in one line that names the place, with exit code 2 (or 1), and nothing is written."""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from aang_ray.cli import main
from tests.inputs.cases import (
    BLOCKS,
    COMMANDS,
    FILES,
    FLAGS,
    PRIMITIVES,
    RUN_FILES,
    SETTINGS,
    SPACES,
    SWEEP_FILES,
    TABLES,
)

FROZEN = Path(__file__).parents[1] / "frozen"
RUN = {
    "data": {"task": "T"},
    "encoder": {"name": "E"},
    "space": "td",
    "n": 2,
    "batch": {"end_task": 4, "auxiliary": 4, "dev": 4, "dev_head": 4},
    "schedule": {"steps": 2, "eval_every": 1},
    "resources": {"device": "cpu"},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of prepared data, which all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a good task, encoder, run and sweep. Nothing in it may train or start Ray."""
    shutil.copytree(FROZEN / "texts", tmp_path / "T")
    shutil.copytree(FROZEN / "encoder", tmp_path / "E")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": RUN, "methods": ["aang"]}))
    os.mkfifo(tmp_path / "fifo.txt")
    os.mkfifo(tmp_path / "fifo.csv")
    (tmp_path / "directory.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AANG_CACHE", str(cache))
    monkeypatch.setenv("AANG_STORE", str(tmp_path / "results"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("it went on to train")

    for name in ("aang_ray.train.run.run_cell", "aang_ray.train.workers.launch.launch", "ray.init"):
        monkeypatch.setattr(name, forbidden)
    return tmp_path


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line; return the one line on stderr."""
    before = content(Path.cwd())
    capsys.readouterr()
    code = main(arguments)
    said = capsys.readouterr()
    assert code in (1, 2), (code, said.out)
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in said.out
    assert content(Path.cwd()) == before
    return line


def named(cases: tuple[tuple[str, str], ...]) -> Iterator[object]:
    for number, (given, line) in enumerate(cases):
        yield pytest.param(given, line, id=f"{number}-{given[:30]!r}")


@pytest.mark.parametrize(("setting", "line"), named(SETTINGS))
def test_settings(capsys: pytest.CaptureFixture[str], setting: str, line: str) -> None:
    assert line in complaint(capsys, "train", "run.yaml", "--set", setting)


@pytest.mark.parametrize(("flags", "line"), named(FLAGS))
def test_flags_of_a_sweep(capsys: pytest.CaptureFixture[str], flags: str, line: str) -> None:
    assert line in complaint(capsys, "sweep", "sweep.yaml", "--dry-run", *shlex.split(flags))


@pytest.mark.parametrize(("command", "line"), named(COMMANDS))
def test_commands(capsys: pytest.CaptureFixture[str], command: str, line: str) -> None:
    assert line in complaint(capsys, *shlex.split(command))


@pytest.mark.parametrize(("text", "line"), named(RUN_FILES))
def test_run_files(capsys: pytest.CaptureFixture[str], text: str, line: str) -> None:
    Path("own.yaml").write_text(text, encoding="utf-8")
    said = complaint(capsys, "train", "own.yaml")
    assert said.startswith("error: own.yaml: ")
    assert line in said


@pytest.mark.parametrize(("text", "line"), named(SWEEP_FILES))
def test_sweep_files(capsys: pytest.CaptureFixture[str], text: str, line: str) -> None:
    Path("own.yaml").write_text(text, encoding="utf-8")
    assert line in complaint(capsys, "sweep", "own.yaml", "--dry-run", "--set", "encoder.name=E")


@pytest.mark.parametrize(("text", "line"), named(SPACES))
def test_space_files(capsys: pytest.CaptureFixture[str], text: str, line: str) -> None:
    Path("own.yaml").write_text(text, encoding="utf-8")
    assert line in complaint(capsys, "train", "run.yaml", "--set", "space=own.yaml", "--set", "n=1")


@pytest.mark.parametrize(("text", "line"), named(PRIMITIVES))
def test_files_of_primitives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, line: str
) -> None:
    monkeypatch.setattr("aang_ray.objectives.primitives.LOAD_SECONDS", 1)
    Path("own.py").write_text(text, encoding="utf-8")
    Path("own.yaml").write_text(f"primitives: [own.py]\n{BLOCKS}", encoding="utf-8")
    assert line in complaint(capsys, "space", "show", "own.yaml")


@pytest.mark.parametrize(("name", "data", "line"), FILES, ids=itertools.count())
def test_files_of_a_folder(
    capsys: pytest.CaptureFixture[str], folder: Path, name: str, data: bytes | None, line: str
) -> None:
    (folder / "T" / name).unlink(missing_ok=True)
    if data is not None:
        (folder / "T" / name).write_bytes(data)
    assert line in complaint(capsys, "sweep", "sweep.yaml", "--dry-run")
    assert line in complaint(capsys, "train", "run.yaml")


@pytest.mark.parametrize(("name", "data", "line"), TABLES, ids=itertools.count())
def test_one_labelled_file(capsys: pytest.CaptureFixture[str], folder: Path, name: str, data: bytes, line: str) -> None:
    (folder / name).write_bytes(data)
    assert line in complaint(capsys, "sweep", "sweep.yaml", "--dry-run", "--task", name)
