"""Every block of code in the README and the documentation is valid: commands parse, files load, Python imports."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from aang_ray.cli import app, main
from aang_ray.config import parse_config
from aang_ray.objectives.space import enumerate_space, read_space
from aang_ray.sweep.spec import SweepOverrides, expand, load_sweep

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
SHELL = ("", "sh", "bash", "shell", "console")


def blocks(*languages: str) -> list[Any]:
    """Each block in one of the languages, named by its page and line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            if match[1] in languages:
                name = f"{page.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}"
                found.append(pytest.param(match[2], id=name))
    return found


def command_lines(block: str) -> Iterator[list[str]]:
    """The commands of a block, as words; continued lines are joined, comments left out."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]  # variables of the environment
        if words:
            yield words


def check_aang(arguments: list[str]) -> None:
    """Parse the arguments of `aang` as the command line does, and run nothing."""
    from typer.main import get_command

    for end in ("|", "&&", ">", "<", "&", ";"):
        arguments = arguments[: arguments.index(end)] if end in arguments else arguments
    command: Any = get_command(app)
    name = "aang"
    while True:
        if not hasattr(command, "commands"):
            command.make_context(name, [word for word in arguments if word != "--help"])
            return
        name, *arguments = arguments
        if name == "--install-completion" or name == "--version":
            return
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for word in words:
        assert "=" in word or word in targets, f"make {word}: no such target"


def check_install(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.fullmatch(r"(?:aang-ray|\.)\[([\w,]+)\]", word):
            assert set(match[1].split(",")) <= set(extras), word


@pytest.mark.parametrize("block", blocks(*SHELL))
def test_commands_are_valid(block: str) -> None:
    """`aang` with its options, targets of make, extras of pip, and files that Python runs exist."""
    if not any(
        line.split("#")[0].strip().startswith(("aang ", "make", "pip ", "python ", "./")) for line in block.splitlines()
    ):
        pytest.skip("no commands of this project: what a program prints, a list of files, or another's commands")
    checked = block.replace("…", "DIR")
    parsed = subprocess.run(["bash", "-n"], input=checked, capture_output=True, text=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    for words in command_lines(checked):
        program, *arguments = words
        if program == "aang":
            check_aang(arguments)
        elif program == "make":
            check_make(arguments)
        elif "install" in arguments:
            check_install(arguments)
        elif program.endswith("python"):
            script = next((word for word in arguments if word.endswith(".py")), None)
            assert script is None or (ROOT / script).exists(), script


@pytest.mark.parametrize("block", blocks("yaml"))
def test_files_are_valid(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep file makes runs, a space has objectives, and settings are those of a run."""
    mapping = yaml.safe_load(block)
    monkeypatch.chdir(tmp_path)
    for folder in ("films", "path/to/folder"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    file = tmp_path / "file.yaml"
    file.write_text(block)
    if isinstance(mapping, list):  # entries of `methods`
        file.write_text(yaml.safe_dump({"methods": mapping}))
        assert expand(load_sweep(file, SweepOverrides()), SweepOverrides(), "docs")
    elif "methods" in mapping or "base" in mapping:
        assert expand(load_sweep(file, SweepOverrides()), SweepOverrides(), "docs")
    elif "blocks" in mapping:
        for name in mapping.get("primitives", []):
            primitive = next(code.values[0] for code in blocks("python") if f"# {name}" in str(code.values[0]))
            (tmp_path / name).write_text(str(primitive))
        assert enumerate_space(str(file), read_space(str(file)), "sound").objectives
    elif "method" in mapping or "data" in mapping:
        parse_config(mapping, "docs")


@pytest.mark.parametrize("block", blocks("python"))
def test_python_compiles_and_names_what_exists(block: str) -> None:
    """Modules of this package have the names that are imported from them, and its functions the arguments."""
    tree = ast.parse(block)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aang_ray"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name) or alias.name == "LossRankConfig", f"{node.module}.{alias.name}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "aang"
        ):
            import aang_ray
            from aang_ray import api

            function = getattr(api, node.func.attr, None) or getattr(aang_ray, node.func.attr)
            inspect.signature(function).bind(*node.args, **{str(word.arg): word.value for word in node.keywords})


@pytest.mark.slow
def test_the_commands_of_the_tutorial_about_the_committed_store_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands of the tutorial that need neither data nor training, as they are printed."""
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
        for words in command_lines(block):
            if "benchmarks/results/store" in words:
                assert main(words[1:]) == 0, capsys.readouterr().err
                ran += 1
    assert ran == 6
    assert {"bars.svg", "weights.svg", "objectives.svg", "report.html"} <= {path.name for path in tmp_path.iterdir()}
    assert "these weights follow noise" in capsys.readouterr().out
