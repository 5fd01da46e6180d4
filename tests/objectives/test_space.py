"""Spaces: sizes, names, files and how they are shown."""

from __future__ import annotations

import sys
import sysconfig
import tomllib
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from aang_ray.config.sections import Semantics
from aang_ray.errors import UserError
from aang_ray.objectives import DOMAINS
from aang_ray.objectives.objective import Objective, Rule, ruled_out
from aang_ray.objectives.primitives import BUILT_IN
from aang_ray.objectives.space import (
    INSTALLED,
    Capabilities,
    Space,
    enumerate_space,
    read_space,
    render_space,
    space_path,
)


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


def test_elmo_and_electra_are_the_rows_of_figure_1() -> None:
    """Dery et al. 2023, Figure 1; ELECTRA's generator is trained beside its discriminator."""
    assert [k.key for k in space("elmo").objectives] == [
        "out-of-domain/no-op/left-to-right/next-token",
        "out-of-domain/no-op/right-to-left/next-token",
    ]
    assert [k.key for k in space("electra").objectives] == [
        "neural-lm/replace/bidirectional/real-synthetic",
        "neural-lm/mask/bidirectional/denoise",
    ]


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
    assert "1  denoising an uncorrupted input" in text
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


SOUNDS = """
domain: sounds
blocks:
  - {data: [end-task], transform: [mute, no-op], representation: [whole], output: [pitch]}
"""


class Sounds:
    """The taxonomy of a domain that this test registers."""

    def names(self, stage: str) -> tuple[str, ...]:
        return {
            "data": ("end-task",),
            "transform": ("no-op", "mute"),
            "representation": ("whole",),
            "output": ("pitch",),
        }[stage]

    def rules(self, objective: Objective) -> tuple[Rule, ...]:
        return (Rule("silence has no pitch", lambda k: k.transform == "mute"),)

    def conflicts(self, objectives: Collection[Objective], labels: Semantics) -> dict[Objective, str]:
        return {}


def test_a_domain_is_one_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sounds.yaml"
    path.write_text(SOUNDS)
    with pytest.raises(UserError, match="'sounds' is no domain; allowed: text, images"):
        read_space(str(path))
    module = ModuleType("sounds_domain")
    module.TAXONOMY = Sounds()  # type: ignore[attr-defined]  # a module of a test has no declared attributes
    monkeypatch.setitem(sys.modules, "sounds_domain", module)
    monkeypatch.setitem(DOMAINS, "sounds", "sounds_domain")
    made = enumerate_space("sounds", read_space(str(path)))
    assert [k.key for k in made.objectives] == ["end-task/no-op/whole/pitch"]
    assert list(made.ruled_out.values()) == ["silence has no pitch"]
    path.write_text(SOUNDS.replace("mute", "mask"))
    with pytest.raises(UserError, match="'mask' is no transform; allowed: no-op, mute"):
        read_space(str(path))


def test_spaces_are_named_as_ever() -> None:
    # Stored results refer to these fingerprints.
    assert read_space("td").fingerprint == "37c99c918ddfd67e"
    assert read_space("digits").fingerprint == "121683b696806fc6"


def test_text_may_be_named_as_the_domain(tmp_path: Path) -> None:
    path = tmp_path / "named.yaml"
    path.write_text("domain: text\n" + space_path("td").read_text())
    assert read_space(str(path)).fingerprint == read_space("td").fingerprint
