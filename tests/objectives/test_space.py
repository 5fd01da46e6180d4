"""Sizes, legality, names."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from aang_ray.config.sections import Semantics
from aang_ray.errors import UserError
from aang_ray.objectives.objective import Objective, ruled_out
from aang_ray.objectives.primitives import BUILT_IN
from aang_ray.objectives.space import Capabilities, Space, enumerate_space, read_space, render_space


def space(name: str, semantics: Semantics = "sound", capabilities: Capabilities | None = None) -> Space:
    return enumerate_space(name, read_space(name), semantics, capabilities=capabilities)


@pytest.mark.parametrize(
    ("name", "published", "sound"),
    # Dery et al. 2023, Table 1 and Table 2: AANG-TD 24, AANG-TD+ED 40, X+Y+Z 3, each baseline 1.
    [("td", 24, 23), ("td_ed", 40, 38), ("xyz", 3, 3), ("bert", 1, 1), ("gpt", 1, 1), ("xlnet", 1, 1)],
)
def test_sizes(name: str, published: int, sound: int) -> None:
    assert len(space(name, "published")) == published
    assert len(space(name, "sound")) == sound


def why_not(data: str, transform: str, representation: str, output: str, semantics: Semantics = "sound") -> str | None:
    """The reason why an objective is illegal by itself."""
    objective = Objective(data, transform, representation, output)
    return ruled_out(objective, semantics, BUILT_IN.rules(objective))


def test_legality_looks_at_stage_and_name() -> None:
    # `end-task` is data here and output there: only the output makes the rules bite.
    assert why_not("end-task", "mask", "left-to-right", "denoise") is None
    assert "label" in str(why_not("end-task", "mask", "left-to-right", "end-task"))
    assert "data" in str(why_not("in-domain", "mask", "bidirectional", "end-task", "published"))
    assert "copying" in str(why_not("end-task", "no-op", "bidirectional", "denoise"))
    assert why_not("end-task", "no-op", "bidirectional", "denoise", "published") is None


def test_what_task_and_encoder_cannot_do_is_left_out_with_a_reason() -> None:
    poor = space("td_ed", capabilities=Capabilities(positions_given=False, data=frozenset({"end-task"})))
    queries = Objective("end-task", "no-op", "random-factorized", "denoise")
    assert queries not in poor.objectives
    assert "position ids" in poor.ruled_out[queries]
    assert queries in poor.left_out
    assert all(k.data == "end-task" for k in poor.objectives)
    assert len(poor) == 22
    with pytest.raises(UserError, match="no objective is left"):
        space("xlnet", capabilities=Capabilities(positions_given=False))


def test_the_union_of_blocks_counts_an_objective_once(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    block = "{data: [end-task], transform: [mask], representation: [bidirectional], output: [denoise]}"
    path.write_text(f"blocks: [{block}, {block}]")
    assert len(enumerate_space("twice", read_space(str(path)))) == 1


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("blocks: [{data: [end-task], transform: [maks], representation: [bidirectional], output: [denoise]}]", "maks"),
        ("blocks: []", "blocks"),
        ("block: []", "did you mean blocks"),
        ("blocks: [{data: [end-task]}]", "transform"),
    ],
)
def test_bad_spaces_are_one_line(tmp_path: Path, text: str, fragment: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=fragment) as caught:
        read_space(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_space_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="td_ed"):
        read_space("tdd")
    with pytest.raises(UserError, match="no file"):
        read_space("nowhere/x.yaml")


def test_titles_and_codes() -> None:
    objective = Objective("end-task", "bert-op", "left-to-right", "denoise")
    assert objective.title("movie") == "movie · bert-op · left-to-right · denoise"
    codes = {k.code for k in space("td_ed", "published").objectives}
    assert len(codes) == 40


def test_what_a_person_sees() -> None:
    console = Console(record=True, width=140)
    render_space("td", "sound", console)
    text = console.export_text()
    assert "td: 23 objectives (sound semantics)" in text
    assert "1  denoising an input that nothing corrupted" in text
    assert "8  the label of a text needs" in text


def test_a_large_space_fits_into_a_narrow_terminal() -> None:
    console = Console(record=True, width=80)
    render_space("full", "sound", console)
    lines = console.export_text().splitlines()
    # Data that are alike share a grid, and no cell of it is broken.
    assert [line.strip() for line in lines if line.startswith(("end-task", "in-domain"))] == [
        "end-task",
        "in-domain, out-of-domain, neural-lm",
    ]
    assert sum("  noised-embeddings" in line for line in lines) == 2 * 7
