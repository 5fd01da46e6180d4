"""What the shell offers after Tab, asked as the scripts of the shells ask."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from aang_ray.cli import main
from aang_ray.config import RunConfig, parse_config
from aang_ray.config.load import override
from aang_ray.config.methods import method_sections
from aang_ray.store import Store
from aang_ray.sweep.presets import preset_names
from tests.sweep.conftest import done_record, fake_resolve


def offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The words that bash would offer for the last of the words."""
    monkeypatch.setenv("_AANG_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(words))
    monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
    with pytest.raises(SystemExit) as end:
        main(["ignored"])
    assert end.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return [word for word in captured.out.splitlines() if word]  # nothing is an empty line


def test_verbs_presets_and_methods(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert offered(monkeypatch, capsys, "aang", "do") == ["doctor"]
    chemprot = [name for name in preset_names() if name.startswith("paper/chem")]
    assert offered(monkeypatch, capsys, "aang", "sweep", "--preset", "paper/chem") == chemprot
    assert offered(monkeypatch, capsys, "aang", "preset", "show", "paper/chem") == chemprot
    methods = [f"method={name}" for name in method_sections()]
    assert offered(monkeypatch, capsys, "aang", "train", "--set", "method=") == methods
    assert offered(monkeypatch, capsys, "aang", "table", "--format", "m") == ["markdown"]


def test_every_setting_that_is_offered_exists(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`override` refuses keys that no configuration has."""
    keys = offered(monkeypatch, capsys, "aang", "train", "--set", "")
    assert {"n=", "optim.body_lr=", "method=", "method.aux_lr=", "data.text_b="} <= set(keys)
    assert not any(key.startswith("fingerprints") for key in keys)
    assert {key.partition(".")[0].rstrip("=") for key in keys} == set(RunConfig.model_fields) - {"fingerprints"}
    for key in keys:
        override({}, [f"{key}1"])


def test_runs_and_rows_of_a_store(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    record = done_record(fake_resolve(parse_config({"method": "aang"}, "test")))
    Store(tmp_path).write(record)
    cell, row = record.result.cell, record.result.row
    assert offered(monkeypatch, capsys, "aang", "show", "--store", str(tmp_path), cell[:3]) == [cell]
    assert offered(monkeypatch, capsys, "aang", "export", "--store", str(tmp_path), "") == [cell]
    assert offered(monkeypatch, capsys, "aang", "errors", "--store", str(tmp_path), "") == [row.replace(" ", "\\ ")]
    assert offered(monkeypatch, capsys, "aang", "export", "--store", str(tmp_path), "--best", "m") == ["movie"]
    monkeypatch.setenv("AANG_STORE", str(tmp_path))
    assert offered(monkeypatch, capsys, "aang", "show", "") == [cell]


@pytest.mark.parametrize("store", ["nowhere", "s3://bucket/results"])
def test_where_no_store_is_or_a_remote_one_nothing_is_offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], store: str
) -> None:
    assert offered(monkeypatch, capsys, "aang", "show", "--store", store, "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_installation(shell: str, tmp_path: Path) -> None:
    # The shell is found among the parent processes, and a test may have none; with this it is an argument.
    detection = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd()), **detection}
    command = [sys.executable, "-m", "aang_ray"]
    shown = subprocess.run(
        [*command, "--show-completion", shell], capture_output=True, text=True, check=True, env=environment
    )
    assert "_AANG_COMPLETE" in shown.stdout
    subprocess.run([*command, "--install-completion", shell], capture_output=True, check=True, env=environment)
    assert any("_AANG_COMPLETE" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_bash_itself(tmp_path: Path) -> None:
    """The script that is installed, in a real bash."""
    command = tmp_path / "aang"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m aang_ray "$@"\n')
    command.chmod(0o755)
    script = f"""
        eval "$({command} --show-completion bash)"
        COMP_WORDS=(aang swe); COMP_CWORD=1
        _aang_completion {command}
        echo "${{COMPREPLY[@]}}"
    """
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, env=environment)
    assert result.stdout == "sweep\n", result.stderr
