"""How the published allocation splits a batch, with factors that are not equal. (semantics section 2.3)"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest

from aang_ray.objectives.objective import Objective
from aang_ray.objectives.sampling import Share, published_shares
from aang_ray.objectives.space import Space

SPACE = Space(
    "example",
    (
        Objective("end-task", "mask", "bidirectional", "denoise"),
        Objective("end-task", "mask", "bidirectional", "end-task"),
        Objective("end-task", "replace", "bidirectional", "denoise"),
        Objective("in-domain", "replace", "bidirectional", "denoise"),
        Objective("end-task", "replace", "random-factorized", "denoise"),
        Objective("out-of-domain", "bert-op", "left-to-right", "denoise"),
    ),
    {},
)
SAMPLED = (0, 1, 2, 3, 4)
"""All but the last objective, whose data, transform and representation no other has."""
LOGITS = {
    "D": {"end-task": 0.0, "in-domain": math.log(2), "out-of-domain": 50.0},
    "T": {"mask": math.log(4), "replace": 0.0, "bert-op": 50.0},
    "R": {"bidirectional": math.log(3), "random-factorized": 0.0, "left-to-right": 50.0},
    "O": {"denoise": -30.0, "end-task": 30.0},
}
BATCH = 21
COUNTS = [5, 5, 2, 11, 6]
"""Worked out with the logits above, softmaxes over what was sampled together alone.

R: bidirectional 3/4 of 21 = 15.75, so 16; random-factorized 1/4 of 21 = 5.25, so 6.
D, bidirectional: end-task 1/3 of 16 = 5.33, so 6; in-domain 2/3 of 16 = 10.67, so 11. Random-factorized has the end
task's text alone: 6.
T, end-task text seen from both sides: mask 4/5 of 6 = 4.8, so 5; replace 1/5 of 6 = 1.2, so 2. The others have one
transform each: 11 and 6.
O: both outputs of the masked text share its 5 examples.
"""
HUGE = 10**9


def factors() -> dict[str, npt.NDArray[np.float64]]:
    names = SPACE.factors()
    found = {letter: np.array([LOGITS[letter][name] for name in names[letter]]) for letter in "DTRO"}
    return {"A": np.linspace(-9, 9, len(SPACE)), **found}


def shares(step: int = 0, seed: int = 0, size: int = HUGE) -> list[Share]:
    sizes = dict.fromkeys(("end-task", "in-domain", "out-of-domain"), size)
    return published_shares(SPACE, SAMPLED, factors(), sizes, BATCH, seed, step)


def examples(found: list[Share]) -> list[list[int]]:
    return [share.examples.tolist() for share in found]


def test_the_split_follows_the_factors_of_what_was_sampled_together() -> None:
    found = shares()
    assert [share.objective for share in found] == list(SAMPLED)
    assert [len(chosen) for chosen in examples(found)] == COUNTS
    assert [len(share.keys) for share in found] == COUNTS
    assert [share.fraction for share in found] == pytest.approx([count / BATCH for count in COUNTS])


def test_an_exact_part_is_not_rounded_up() -> None:
    """3/4 and 1/4 of 20, whatever softmax makes of ln 3."""
    sizes = {"end-task": HUGE}
    found = published_shares(SPACE, (0, 4), factors(), sizes, 20, 0, 0)
    assert [len(chosen) for chosen in examples(found)] == [15, 5]


def test_the_sampled_objectives_decide_what_a_softmax_runs_over() -> None:
    """One representation: it has all 21 examples, 7 and 14 by data; one transform each."""
    found = published_shares(SPACE, (0, 3), factors(), {"end-task": HUGE, "in-domain": HUGE}, BATCH, 0, 0)
    assert [len(chosen) for chosen in examples(found)] == [7, 14]


def test_outputs_share_the_batch() -> None:
    one, other = shares()[:2]
    assert (one.examples == other.examples).all()
    assert (one.keys == other.keys).all(), "and its corruption"


def test_transforms_read_random_subsets_of_the_same_examples() -> None:
    """5 and 2 of the same 6: both of the two are among the five in C(5, 2) of C(6, 2) draws, 2/3; else one is.

    Of so many texts, examples drawn apart would have none in common.
    """
    steps = 300
    common = []
    for step in range(steps):
        mask, _, replace, _, _ = map(set, examples(shares(step)))
        assert (len(mask), len(replace)) == (5, 2), "no example is read twice by one transform"
        common.append(len(mask & replace))
    assert set(common) == {1, 2}
    assert abs(common.count(2) / steps - 2 / 3) < 5 * math.sqrt(2 / 9 / steps)


def test_representations_and_data_read_examples_of_their_own() -> None:
    mask, _, replace, in_domain, factorized = map(set, examples(shares()))
    assert not (mask | replace) & factorized
    assert not (mask | replace) & in_domain


def test_examples_are_drawn_with_replacement() -> None:
    """Eleven examples of eleven texts are all different with probability 11! / 11^11 = 1.4e-4."""
    steps = 200
    drawn = np.array([examples(shares(step, size=11))[3] for step in range(steps)])
    assert all(len(set(row)) < 11 for row in drawn[:20].tolist())
    # Every text has 1/11 of all the draws.
    counts = np.bincount(drawn.ravel(), minlength=11)
    assert abs(counts - steps).max() < 5 * math.sqrt(steps * 10 / 11)
    keys = shares(size=11)[3].keys
    assert len(set(keys.tolist())) == 11, "a text that is read twice is corrupted twice"


def test_it_is_a_function_of_seed_and_step() -> None:
    assert examples(shares(3)) == examples(shares(3))
    assert examples(shares(3)) != examples(shares(4))
    assert examples(shares(3)) != examples(shares(3, seed=1))
