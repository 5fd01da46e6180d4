"""A user's own primitives: from a file, through a space, into a segment; and what is wrong with one, in one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from aang_ray.errors import UserError
from aang_ray.objectives.primitives import BUILT_IN, Primitives
from aang_ray.objectives.space import SpaceFile, enumerate_space, read_space
from aang_ray.objectives.texts import Texts, Vocabulary
from tests.objectives.cells import cell
from tests.objectives.conftest import make_texts
from tests.objectives.source import step_of

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def of_readme(language: str, holding: str) -> str:
    """Return the one code block of the README in a language that contains a given text."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if holding in code]
    return str(found)


SHUFFLE, SHUFFLE_SPACE = of_readme("python", "PRIMITIVES = "), of_readme("yaml", "primitives: ")
"""The README's example: a transform that shuffles the selected tokens of a text, and its space."""


def write(folder: Path, source: str = SHUFFLE, transform: str = "shuffle") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "shuffle.py").write_text(source)
    path = folder / "space.yaml"
    path.write_text(SHUFFLE_SPACE.replace("[shuffle]", f"[{transform}]"))
    return str(path)


def test_the_readmes_transform_shuffles(tmp_path: Path, vocabulary: Vocabulary) -> None:
    space = enumerate_space("mine", read_space(write(tmp_path)))
    assert [k.key for k in space.objectives] == ["end-task/shuffle/bidirectional/denoise"]
    texts = make_texts([60, 40, 12])
    segment = cell("shuffle", "bidirectional", "denoise", texts, vocabulary, primitives=space.primitives, rate=0.5)
    assert (segment.targets_M == texts.ids_T[segment.labelled_M]).all()
    changed = np.flatnonzero(segment.ids_T != texts.ids_T)
    assert len(changed) > 20
    assert set(changed.tolist()) <= set(segment.labelled_M.tolist())
    for number, start in enumerate(texts.starts_E):
        inside = slice(int(start), int(start + texts.lengths_E[number]))
        assert sorted(segment.ids_T[inside].tolist()) == sorted(texts.ids_T[inside].tolist())
    # Another text in the batch changes nothing: a pure function of the text and its key.
    alone = Texts(texts.ids_T[60:100], texts.lengths_E[1:2], texts.keys_E[1:2])
    again = cell("shuffle", "bidirectional", "denoise", alone, vocabulary, primitives=space.primitives, rate=0.5)
    assert (again.ids_T == segment.ids_T[60:100]).all()


def test_a_space_without_files_is_named_as_ever() -> None:
    # Stored results hang on this name.
    assert read_space("td").fingerprint == "37c99c918ddfd67e"


def test_the_content_of_a_file_counts_and_its_place_does_not(tmp_path: Path) -> None:
    one, same = (read_space(write(tmp_path / name)).fingerprint for name in ("a", "b"))
    changed = read_space(write(tmp_path / "c", SHUFFLE.replace("1000", "1001"))).fingerprint
    assert one == same != changed
    without = SpaceFile.model_validate(
        {
            "blocks": [
                {"data": ["end-task"], "transform": ["mask"], "representation": ["bidirectional"], "output": ["tf"]}
            ]
        }
    )
    assert one != without.fingerprint


def test_two_spaces_may_use_one_name_for_different_things(tmp_path: Path) -> None:
    # A worker process runs one cell after another: nothing of the first may stay.
    other = SHUFFLE.replace("Corrupted(ids_T)", "Corrupted(texts.ids_T)")
    one, two = read_space(write(tmp_path / "a")), read_space(write(tmp_path / "b", other))
    assert one.known.transforms["shuffle"].corrupt is not two.known.transforms["shuffle"].corrupt
    assert "shuffle" not in BUILT_IN.names("transform")


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("def broken(:", "SyntaxError"),
        ("x = 1", "say PRIMITIVES = "),
        ("PRIMITIVES = ('shuffle',)", "say PRIMITIVES = "),
        (SHUFFLE.replace('"shuffle"', '"mask"'), "there is a transform mask already"),
        (SHUFFLE.replace('"shuffle"', '"shufle"'), "'shuffle' is no transform; allowed: no-op, mask"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(tmp_path: Path, source: str, fragment: str) -> None:
    with pytest.raises(UserError) as caught:
        read_space(write(tmp_path, source))
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_prints_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    read_space(write(tmp_path, f"print('hello')\n{SHUFFLE}"))
    assert f"{tmp_path}/shuffle.py prints when it is loaded: hello" in caplog.text
    assert capsys.readouterr().out == ""


def test_a_file_is_run_once_a_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, f"print('hello', __name__)\n{SHUFFLE}")
    assert read_space(path).known == read_space(path).known
    assert len(caplog.messages) == 1
    path = write(tmp_path, f"print('another')\n{SHUFFLE}")
    read_space(path)
    assert ["hello" in line for line in caplog.messages] == [True, False]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "shuffle.py").unlink()
    with pytest.raises(UserError, match=r"shuffle\.py: No such file"):
        read_space(path)


# Primitives that return something invalid: one line names the primitive, before the device sees it


ANY_FILE = """\
import numpy as np
from aang_ray.objectives.primitives import Corrupted, Head, Labels, Output, Representation, Rule, Transform

PRIMITIVES = ({0},)
"""
ANY_SPACE = """\
primitives: [mine.py]
blocks:
  - {{data: [end-task], transform: [{0}], representation: [{1}], output: [{2}]}}
"""


def write_primitive(folder: Path, primitive: str) -> Path:
    (folder / "mine.py").write_text(ANY_FILE.format(primitive))
    cell_of = {"T": ("mine", "bidirectional", "denoise"), "R": ("mask", "mine", "denoise")}
    path = folder / "space.yaml"
    path.write_text(ANY_SPACE.format(*cell_of.get(primitive[0], ("mask", "bidirectional", "mine"))))
    return path


def known(folder: Path, primitive: str) -> Primitives:
    return read_space(str(write_primitive(folder, primitive))).known


def complaint(where: tuple[str, str, str], primitives: Primitives, vocabulary: Vocabulary) -> str:
    with pytest.raises(UserError) as caught:
        cell(*where, make_texts([9, 5]), vocabulary, primitives=primitives)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        ("x", "must return Corrupted(ids_T) with an id for each token of the texts, [T]"),
        ("Corrupted(x.ids_T[:-1])", "must return Corrupted(ids_T) with an id for each token of the texts, [T]"),
        ("Corrupted(x.ids_T + 50)", "returned an id outside of the vocabulary, 0 to 49"),
        ("Corrupted(x.ids_T / 2)", "returned an id outside of the vocabulary, 0 to 49"),
        ("Corrupted(x.ids_T, kept_T=x.ids_T < 0)", "deletes special tokens"),
        ("Corrupted(x.ids_T, kept_T=x.ids_T)", "kept_T must have a truth value for each token of the texts, [T]"),
        ("Corrupted(x.ids_T, noised_T=s[1:])", "noised_T must have a truth value for each token of the texts, [T]"),
        ("Corrupted(x.nothing)", "AttributeError: 'Texts' object has no attribute 'nothing'"),
    ],
)
def test_a_transform(tmp_path: Path, vocabulary: Vocabulary, corrupt: str, message: str) -> None:
    own = known(tmp_path, f'Transform("mine", lambda x, s, v: {corrupt})')
    assert complaint(("mine", "bidirectional", "denoise"), own, vocabulary) == f"transform mine: {message}"


def test_what_a_transform_selects(tmp_path: Path, vocabulary: Vocabulary) -> None:
    own = known(tmp_path, 'Transform("mine", lambda x, s, v: Corrupted(x.ids_T), select=lambda x, r, rate: r[1:])')
    message = "transform mine: select must return a truth value for each token of the texts, [T]"
    assert complaint(("mine", "bidirectional", "denoise"), own, vocabulary) == message


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ("np.ones(3, dtype=np.int32)", "order must return an integer for each token of the texts, [T]"),
        ("[1] * 3", "order must return an integer for each token of the texts, [T]"),
        ("x.positions_T + 1.5", "order must return an integer for each token of the texts, [T]"),
        ("x.positions_T", "order returned ranks 0 to 8; allowed: 1 to 1073741823"),
        ("x.positions_T + 2**30", "order returned ranks 1073741824 to 1073741832; allowed: 1 to 1073741823"),
        ("{}[1]", "KeyError: 1"),
    ],
)
def test_a_representation(tmp_path: Path, vocabulary: Vocabulary, order: str, message: str) -> None:
    own = known(tmp_path, f'Representation("mine", lambda x: {order})')
    assert complaint(("mask", "mine", "denoise"), own, vocabulary) == f"representation mine: {message}"


@pytest.mark.parametrize(
    ("kind", "label", "message"),
    [
        ("text", "None", "must return Labels(targets) with one target for each text, and no at_M"),
        ("text", "Labels(v.original.ids_T)", "must return Labels(targets) with one target for each text, and no at_M"),
        (
            "text",
            "Labels(v.classes_E, v.row_T[:2])",
            "must return Labels(targets) with one target for each text, and no at_M",
        ),
        ("token", "Labels(v.classes_E)", "must return Labels(targets, at_M) with one target for each entry of at_M"),
        (
            "token",
            "Labels(v.classes_E, v.row_T)",
            "must return Labels(targets, at_M) with one target for each entry of at_M",
        ),
        (
            "token",
            "Labels(v.classes_E, np.array([3, 14]))",
            "at_M must be indices of tokens that are read, in ascending order",
        ),
        (
            "token",
            "Labels(v.classes_E, np.array([3, 1]))",
            "at_M must be indices of tokens that are read, in ascending order",
        ),
        ("text", "{}['nothing']", "KeyError: 'nothing'"),
    ],
)
def test_an_output(tmp_path: Path, vocabulary: Vocabulary, kind: str, label: str, message: str) -> None:
    own = known(tmp_path, f'Output("mine", Head("{kind}", 2), lambda v: {label})')
    assert complaint(("mask", "bidirectional", "mine"), own, vocabulary).startswith(f"output mine: {message}")


@pytest.mark.parametrize(
    ("head", "label", "message"),
    [
        ('"text", 2', "Labels(v.classes_E + 1)", "returned a label outside of its head's classes, 0 to 1"),
        ('"text"', "Labels(v.classes_E + 1)", "returned a label outside of its head's classes, 0 to 1"),
        ('"token", 3', "Labels(v.row_T - 1, v.row_T)", "returned a label outside of its head's classes, 0 to 2"),
        (
            '"vocabulary"',
            "Labels(v.row_T + 50, v.row_T)",
            "returned a label outside of its head's classes, 0 to 49",
        ),
        ('"text", 2', "Labels(v.classes_E / 2)", "its head predicts 2 numbers, its targets have shape (4,)"),
        ('"text", 2', "Labels(v.classes_E[:, None] / 2)", "its head predicts 2 numbers, its targets have shape (4, 1)"),
    ],
)
def test_targets_that_a_head_does_not_have(
    tmp_path: Path, vocabulary: Vocabulary, head: str, label: str, message: str
) -> None:
    file = read_space(str(write_primitive(tmp_path, f'Output("mine", Head({head}), lambda v: {label})')))
    with pytest.raises(UserError) as caught:
        step_of(enumerate_space("mine", file), vocabulary)
    assert str(caught.value) == f"output mine: {message}"


def test_targets_that_a_head_has(tmp_path: Path, vocabulary: Vocabulary) -> None:
    file = read_space(str(write_primitive(tmp_path, 'Output("mine", Head("text", 2), lambda v: Labels(v.classes_E))')))
    assert step_of(enumerate_space("mine", file), vocabulary).segments[2].examples == 4


def test_a_rule_and_a_fit(tmp_path: Path, vocabulary: Vocabulary) -> None:
    rule = 'Output("mine", Head("text", 2), lambda v: None, rules=(Rule("x", lambda k: k.nothing),))'
    file = read_space(str(write_primitive(tmp_path, rule)))
    with pytest.raises(
        UserError, match=r"^output mine: AttributeError: 'Objective' object has no attribute 'nothing'$"
    ):
        enumerate_space("mine", file)
    fit = 'Output("mine", Head("text", 2), lambda v: None, fit=lambda train, vocabulary: 1 // 0)'
    file = read_space(str(write_primitive(tmp_path, fit)))
    with pytest.raises(UserError, match=r"^output mine: ZeroDivisionError: ") as caught:
        step_of(enumerate_space("mine", file), vocabulary)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_an_exception_of_what_is_built_in_is_a_mistake_of_ours(vocabulary: Vocabulary) -> None:
    with pytest.raises(ValueError, match="the texts do not say which tokens are capitalised"):
        cell("mask", "bidirectional", "capitalisation", make_texts([9]), vocabulary, primitives=BUILT_IN)
