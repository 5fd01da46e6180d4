"""Rows are called as in the papers' tables, and say which published switches are on."""

from __future__ import annotations

import pytest

from aang_ray.config import load_config, parse_config
from aang_ray.config.run import published_switches

ALL = [
    *(f"objectives.{name}=published" for name in ("legality", "allocation", "visibility", "labels")),
    "objectives.heads=per_objective",
    "optim.clipping=published",
    "method.dev_sample=published",
    "method.auxiliary_score=published",
]
SGD = ["method.update=sgd", "method.dev_memory=0"]
"""What the published joint score needs; it is not part of a row's name."""


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (["space=bert", "n=1"], "bert-style n=1"),
        (["space=gpt", "n=1"], "gpt-style n=1"),
        (["space=xlnet", "n=1"], "xlnet-style n=1"),
        (["space=tapt_dapt", "n=2"], "meta-tartan-tapt_dapt n=2"),
        (["space=xyz", "n=3"], "aang-xyz n=3"),
        (["method=static", "space=bert", "n=1"], "static-bert n=1"),
        (["method=tapt"], "tapt"),
        (["method=tapt_dapt"], "tapt_dapt"),
        (["final_finetune.steps=10"], "aang-td+finetune n=6"),
        (["method=finetune", "final_finetune.steps=10"], "finetune+finetune"),
        (["objectives.legality=published"], "aang-td (published: legality) n=6"),
        (["objectives.legality=published", "optim.clipping=published"], "aang-td (published: clipping, legality) n=6"),
        (["method=finetune", "optim.clipping=published"], "finetune (published)"),
        (["method=finetune", "objectives.legality=published"], "finetune"),
        ([*SGD, *ALL], "aang-td (published) n=6"),
        (["method=static", *ALL[:-2]], "static-td (published) n=6"),
    ],
)
def test_row_names(settings: list[str], name: str) -> None:
    assert load_config(None, settings).row_name == name


@pytest.mark.parametrize("switch", ALL)
def test_each_published_switch_is_named(switch: str) -> None:
    plain, published = load_config(None, SGD), load_config(None, [*SGD, switch])
    assert published.row_name != plain.row_name
    key = switch.partition("=")[0].rpartition(".")[2]
    assert [name for name, on in published_switches(published) if on] == [key]
    assert published.cell != plain.cell


def test_a_label_names_the_row_and_is_no_part_of_the_runs_identity() -> None:
    plain, labelled = (parse_config({"method": "static", **more}, "test") for more in ({}, {"label": "my rate"}))
    assert (labelled.row_name, plain.row_name) == ("my rate", "static-td n=6")
    assert (labelled.cell, labelled.group) == (plain.cell, plain.group)
    assert "label" not in plain.model_dump(mode="json"), "stored rows stay as they are"
    assert parse_config(labelled.model_dump(mode="json"), "test") == labelled
