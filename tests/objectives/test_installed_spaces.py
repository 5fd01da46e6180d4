"""Spaces are found by name where the package is installed without its repository."""

from __future__ import annotations

import sysconfig
import tomllib
from pathlib import Path

import pytest

from aang_ray.objectives.space import INSTALLED, space_path

ROOT = Path(__file__).parents[2]


def test_they_are_looked_for_where_they_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / INSTALLED / "mine.yaml"
    there.parent.mkdir(parents=True)
    there.write_text("blocks: []\n")
    monkeypatch.setattr(sysconfig, "get_path", {"data": str(tmp_path)}.__getitem__)
    assert space_path("mine") == there


def test_all_of_them_are_installed_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["data-files"] == {INSTALLED: ["search_spaces/*.yaml"]}
    assert {path.suffix for path in (ROOT / "search_spaces").iterdir()} == {".yaml"}
