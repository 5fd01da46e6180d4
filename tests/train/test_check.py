"""What is checked and told of runs before one starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from aang_ray.data.random_encoder import locate_encoder
from aang_ray.errors import UserError
from aang_ray.model.loading import encoder_size
from aang_ray.train.check import check_runs
from aang_ray.train.device import choose_compute
from aang_ray.train.setup import build
from tests.train.running import tiny_config


def test_runs_are_described_once(tiny: dict[str, Any]) -> None:
    runs = [tiny_config(tiny, f"method={method}", "space=td_ed") for method in ("finetune", "static", "aang")]
    assert check_runs(runs, here=True) == [
        "task: 80 of 80 train texts, 40 dev and 40 test texts, 2 classes; encoder, all 3 layers; no train text is cut; "
        "60 in-domain passages"
    ]
    line, *more = check_runs(
        [tiny_config(tiny, "data.train_size=20", "data.max_tokens=8", "encoder.layers=2", "space=td_ed")], here=True
    )
    assert line.startswith("task: 20 of 80 train texts")
    assert "encoder, 2 of 3 layers; 1" in line
    assert "train texts are cut at 8 tokens" in line
    assert more == []


def test_adapters_are_described_and_count_in_memory(tiny: dict[str, Any]) -> None:
    config = tiny_config(tiny, "encoder.adapter.rank=2", "space=td_ed")
    (line,) = check_runs([config], here=True)
    size = encoder_size(config.encoder, locate_encoder(config.data, config.encoder))
    assert f"all 3 layers, LoRA of rank 2: {size.trained:,} of {size.parameters:,} parameters are trained; no" in line
    trained = [p.numel() for p in build(config, choose_compute(config)).encoder.parameters() if p.requires_grad]
    assert sum(trained) == size.trained < size.parameters / 10
    with pytest.raises(UserError, match=r"encoder.adapter.targets: 'nothing' names no linear layers"):
        check_runs([tiny_config(tiny, "encoder.adapter.targets=nothing")], here=False)


def test_text_that_no_objective_uses(tiny: dict[str, Any], tmp_path: Path) -> None:
    """It is told of the sweep, not of each run, and not of text that only `train_size` makes."""
    warning = "warning: task: the in-domain text is given, but no objective uses it"
    runs = {space: tiny_config(tiny, f"space={space}") for space in ("td", "td_ed")}
    assert check_runs([runs["td"]], here=True)[1:] == [warning]
    assert check_runs(runs.values(), here=True)[1:] == []
    assert check_runs([tiny_config(tiny, "method=finetune")], here=True)[1:] == []
    shutil.copytree(tiny["data"]["task"], tmp_path / "task")
    (tmp_path / "task" / "in_domain.txt").unlink()
    cut = tiny_config(tiny, f"data.task={tmp_path / 'task'}", "data.train_size=40")
    assert check_runs([cut], here=True)[1:] == []


def test_warnings_of_the_data_are_told(tiny: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(tiny["data"]["task"], tmp_path / "own")
    with (tmp_path / "own" / "train.jsonl").open("a") as file:
        file.write('{"text": "the film", "label": "nan"}\n')
    warnings = check_runs([tiny_config(tiny, f"data.task={tmp_path / 'own'}", "method=finetune")], here=True)[1:]
    assert warnings == [
        "warning: own: 'nan' is a class: is it a label that is missing?",
        "warning: own: dev has no example of 'nan': it cannot tell how well they do",
    ]


@pytest.mark.parametrize("setting", ["resources.device=cuda", "batch.auxiliary=1000000000000"])
def test_devices_and_memory_count_where_the_runs_are(tiny: dict[str, Any], setting: str) -> None:
    import torch

    if setting == "resources.device=cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = tiny_config(tiny, setting)
    with pytest.raises(UserError):
        check_runs([run], here=True)
    assert check_runs([run], here=False)


def test_text_of_a_language_model_is_not_written_for_it(tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "blocks: [{data: [neural-lm], transform: [mask], representation: [bidirectional], output: [denoise]}]\n"
    )
    run = tiny_config(tiny, f"space={tmp_path / 'own.yaml'}", "data.neural_lm=trained", "n=1")
    assert check_runs([run], here=True)
    with pytest.raises(UserError, match="no neural-lm text is given; set data"):
        check_runs([tiny_config(tiny, f"space={tmp_path / 'own.yaml'}", "n=1")], here=True)
