"""Frozen runs name their inputs relative to this folder, use one thread, and share a cache of prepared data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.frozen.frozen import HERE


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("frozen-cache")


@pytest.fixture(autouse=True)
def _at_home(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.chdir(HERE)
    monkeypatch.setenv("AANG_CACHE", str(cache))
    torch.set_num_threads(1)
