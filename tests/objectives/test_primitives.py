"""A user's own primitives: from a file, through a space, into a segment."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from aang_ray.errors import UserError
from aang_ray.objectives.primitives import BUILT_IN
from aang_ray.objectives.space import SpaceFile, enumerate_space, read_space
from aang_ray.objectives.texts import Texts, Vocabulary
from tests.objectives.cells import cell
from tests.objectives.conftest import make_texts

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def of_readme(language: str, holding: str) -> str:
    """The README's one block in a language that holds a text."""
    (found,) = [code for code in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if holding in code]
    return str(found)


SHUFFLE, SHUFFLE_SPACE = of_readme("python", "PRIMITIVES = "), of_readme("yaml", "primitives: ")
"""The README's example: a transform that makes the selected tokens of a text change places, and its space."""


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


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "shuffle.py").unlink()
    with pytest.raises(UserError, match=r"shuffle\.py: No such file"):
        read_space(path)
