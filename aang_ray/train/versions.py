"""Versions of what a result depends on."""

from __future__ import annotations

import platform
from importlib.metadata import version

import aang_ray

_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scikit-learn", "ray", "torchjd")


def versions() -> dict[str, str]:
    """Python, this package, and the packages that compute."""
    found = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "aang-ray": aang_ray.__version__, **found}
