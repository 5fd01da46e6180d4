"""The deployment files, and copies of them with one thing changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parents[2]

Mutation = Callable[[dict[str, Any]], object]
"""Changes a configuration in place; what it returns is of no interest."""


def load(name: str) -> dict[str, Any]:
    """A YAML file of the project, parsed."""
    config: dict[str, Any] = yaml.safe_load((PROJECT / name).read_text(encoding="utf-8"))
    return config


def mutated(config: Mapping[str, Any], mutate: Mutation) -> dict[str, Any]:
    """A deep copy with a change."""
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    mutate(changed)
    return changed


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    text = (PROJECT / "constraints.txt").read_text(encoding="utf-8")
    found = re.search(rf"^{re.escape(package)}==(\S+)$", text, re.MULTILINE)
    assert found is not None, f"constraints.txt does not pin {package}"
    return found.group(1)
