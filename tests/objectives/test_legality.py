"""Every rule: what it forbids, what it allows, and in which semantics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from aang_ray.config.sections import Semantics
from aang_ray.errors import UserError
from aang_ray.objectives.objective import Objective, ruled_out
from aang_ray.objectives.primitives import BUILT_IN
from aang_ray.objectives.space import Capabilities, Space, SpaceFile, enumerate_space, read_space, unavailable

TRANSFORMS, REPRESENTATIONS = tuple(BUILT_IN.transforms), tuple(BUILT_IN.representations)
ANY = "*"

# (reason, in published semantics too, forbidden cells (data, transform, representation, output), neighbours that pass).
RULES = [
    (
        "denoising an uncorrupted input that every token sees is copying",
        False,
        [("end-task", "no-op", "bidirectional", "denoise")],
        [("end-task", t, "bidirectional", "denoise") for t in TRANSFORMS if t != "no-op"]
        + [("end-task", "no-op", r, "denoise") for r in REPRESENTATIONS if r != "bidirectional"],
    ),
    (
        "the next token is visible under this representation: predicting it is copying",
        False,
        [("in-domain", t, "bidirectional", "next-token") for t in TRANSFORMS],
        [("in-domain", t, r, "next-token") for t in TRANSFORMS for r in ("left-to-right", "right-to-left")],
    ),
    (
        "under a random order, predicting the next token of corrupted text is denoising",
        True,
        [("end-task", t, "random-factorized", "next-token") for t in TRANSFORMS if t != "no-op"],
        [("end-task", "no-op", "random-factorized", "next-token")],
    ),
    (
        "telling real from synthetic tokens needs the transform replace; masks, gaps and noise are easy to see",
        True,
        [("neural-lm", t, r, "real-synthetic") for t in TRANSFORMS if t != "replace" for r in REPRESENTATIONS],
        [("neural-lm", "replace", r, "real-synthetic") for r in REPRESENTATIONS],
    ),
    (
        "the output end-task needs the end task's data",
        True,
        [(d, "mask", "bidirectional", "end-task") for d in ("in-domain", "out-of-domain", "neural-lm", "external:x")],
        [("end-task", t, "bidirectional", "end-task") for t in TRANSFORMS],
    ),
    (
        "supervised needs the data of another data set (external:NAME); for the end task's labels use end-task",
        True,
        [(d, "mask", "bidirectional", "supervised") for d in ("end-task", "in-domain", "out-of-domain", "neural-lm")],
        [("external:x", t, "random-factorized", "supervised") for t in TRANSFORMS],
    ),
    (
        "the label of a text needs a representation that reads all of it",
        True,
        [(d, t, r, o) for d, o in (("end-task", "end-task"), ("external:x", "supervised"))
         for t in TRANSFORMS for r in ("left-to-right", "right-to-left")],
        [("end-task", "no-op", r, "end-task") for r in ("bidirectional", "random-factorized")],
    ),
]  # fmt: skip


def why_not(cell: tuple[str, str, str, str], semantics: Semantics) -> str | None:
    objective = Objective(*cell)
    return ruled_out(objective, semantics, BUILT_IN.rules(objective))


@pytest.mark.parametrize(("reason", "published", "forbidden", "allowed"), RULES, ids=[rule[0][:40] for rule in RULES])
def test_a_rule_forbids_what_it_says_and_no_more(
    reason: str,
    published: bool,
    forbidden: list[tuple[str, str, str, str]],
    allowed: list[tuple[str, str, str, str]],
) -> None:
    for cell in forbidden:
        assert why_not(cell, "sound") == reason
        assert why_not(cell, "published") == (reason if published else None)
    for cell in allowed:
        assert why_not(cell, "sound") is None


def test_no_rule_is_untested() -> None:
    everything = [primitive.rules for primitive in BUILT_IN.transforms.values()]
    everything += [primitive.rules for primitive in BUILT_IN.representations.values()]
    everything += [primitive.rules for primitive in BUILT_IN.outputs.values()]
    stated = {(rule.reason, rule.published) for rules in everything for rule in rules}
    assert stated == {(reason, published) for reason, published, _, _ in RULES}


@pytest.mark.parametrize("output", ["tf", "tf-idf", "capitalisation"])
def test_what_is_no_token_may_be_asked_of_a_visible_one(output: str) -> None:
    for transform in TRANSFORMS:
        for representation in REPRESENTATIONS:
            assert why_not(("in-domain", transform, representation, output), "sound") is None


def space_of(text: str, **settings: object) -> Space:
    return enumerate_space("test", SpaceFile.model_validate(yaml.safe_load(text)), **settings)  # type: ignore[arg-type]


BOTH_NAMES = """
blocks:
  - data: [end-task]
    transform: [no-op, mask]
    representation: [left-to-right, right-to-left, random-factorized]
    output: [denoise, next-token]
"""


def test_of_two_names_for_one_objective_one_stays() -> None:
    # 12 cells; mask, random-factorized, next-token is illegal; the three of no-op denoising are next-token.
    space = space_of(BOTH_NAMES)
    assert len(space) == 8
    assert not [k for k in space.objectives if (k.transform, k.output) == ("no-op", "denoise")]
    twins = [k for k, reason in space.ruled_out.items() if "is next-token, which is in the space, too" in reason]
    assert {(k.transform, k.output) for k in twins} == {("no-op", "denoise")}
    assert len(twins) == 3
    assert space.left_out == set(twins)  # a run says so, too
    # The released code's no-op labels are copies of the input: another objective.
    assert len(space_of(BOTH_NAMES, labels="published")) == 11
    # Alone each name stays: the spaces of the paper say denoise.
    assert len(space_of(BOTH_NAMES.replace("[denoise, next-token]", "[denoise]"))) == 6


def test_real_synthetic_needs_a_denoise_head() -> None:
    cell = "{data: [end-task], transform: [replace], representation: [bidirectional], output: [%s]}"
    assert len(space_of(f"blocks: [{cell % 'denoise, real-synthetic'}]")) == 2
    with pytest.raises(UserError, match="real-synthetic needs denoise in the space, too"):
        space_of(f"blocks: [{cell % 'real-synthetic'}]")
    # The space's one denoise goes because it is next-token by another name: what needs it goes, too.
    no_op = "{data: [end-task], transform: [no-op], representation: [left-to-right], output: [denoise, next-token]}"
    left = space_of(f"blocks: [{no_op}, {cell % 'real-synthetic'}]")
    assert [k.output for k in left.objectives] == ["next-token"]
    alone = space_of(f"blocks: [{cell % 'denoise, real-synthetic'}]", capabilities=Capabilities(shared_heads=False))
    assert [k.output for k in alone.objectives] == ["denoise"]


def test_what_is_not_there_is_left_out_with_what_to_set() -> None:
    cell = "{data: [end-task, %s], transform: [mask], representation: [bidirectional], output: [denoise]}"
    for data, fragment in (("neural-lm", "set data.neural_lm"), ("external:x", "list x in data.external")):
        space = space_of(f"blocks: [{cell % data}]", capabilities=Capabilities())
        (reason,) = space.ruled_out.values()
        assert fragment in reason
        assert len(space.left_out) == 1


def test_queries_need_sound_visibility() -> None:
    blind = Capabilities(sound_visibility=False)
    space = space_of(BOTH_NAMES, capabilities=blind)
    gone = Objective("end-task", "no-op", "random-factorized", "next-token")
    assert "sound visibility" in space.ruled_out[gone]
    # The released code's denoising labels the content instead, and needs no queries.
    assert (
        Objective("end-task", "no-op", "random-factorized", "denoise")
        in space_of(BOTH_NAMES, capabilities=blind, labels="published").objectives
    )


def test_the_released_codes_visibility_is_that_of_its_representations() -> None:
    k = Objective("end-task", "mask", "by-pairs", "denoise")
    blind = Capabilities(sound_visibility=False)
    assert unavailable(k, blind, "sound") == "the released code has no such visibility (objectives.visibility: sound)"
    assert unavailable(k, Capabilities(), "sound") is None
    for representation in REPRESENTATIONS:
        assert unavailable(replace(k, representation=representation), blind, "sound") is None


def test_the_full_space() -> None:
    # Per kind of data: denoise 7 * 4 - 4 (of no-op one is copying, three are next-token), next-token 7 * 2 + 1,
    # tf-idf, tf and capitalisation 7 * 4 each, real-synthetic 4: 24 + 15 + 84 + 4 = 127. The end task's label: 7 * 2.
    assert len(enumerate_space("full", read_space("full"))) == 4 * 127 + 14
    # Published legality lets 1 + 7 copies in; the three twins are two only where labels are published, too.
    assert len(enumerate_space("full", read_space("full"), "published")) == 4 * (127 + 8) + 14
    assert len(enumerate_space("full", read_space("full"), "published", "published")) == 4 * (127 + 8 + 3) + 14


def test_the_full_space_with_labels_of_another_data_set() -> None:
    # The other data set has the 127 cells of any data, and 7 * 2 of its labels.
    full = set(enumerate_space("full", read_space("full")).objectives)
    more = set(enumerate_space("full_external", read_space("full_external")).objectives)
    assert full < more
    beside = more - full
    assert {k.data for k in beside} == {"external:tweets"}
    assert len(beside) == 127 + 14
    assert sum(k.output == "supervised" for k in beside) == 14


def test_task_and_domain_text_jointly() -> None:
    space = enumerate_space("tapt_dapt", read_space("tapt_dapt"))
    assert [k.data for k in space.objectives] == ["end-task", "in-domain"]
    assert {(k.transform, k.representation, k.output) for k in space.objectives} == {
        ("bert-op", "bidirectional", "denoise")
    }


def test_an_external_data_set_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "blocks: [{data: ['external:sciie'], transform: [mask], representation: [bidirectional], output: [supervised]}]"
    )
    (objective,) = enumerate_space("x", read_space(str(path))).objectives
    assert objective.key == "external:sciie/mask/bidirectional/supervised"
