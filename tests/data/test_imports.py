"""Importing `aang_ray.data` is quick: `aang --help` must not wait for libraries that only some commands need."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_loads_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "ray", "datasets", "pandas", "sklearn", "rich")
    code = f"import sys, aang_ray.data; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
