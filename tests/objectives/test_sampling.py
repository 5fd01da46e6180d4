"""Which objectives a step trains and which examples they read: pure functions of (seed, step)."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.objectives import randomness
from aang_ray.objectives.objective import Objective
from aang_ray.objectives.sampling import (
    Cursors,
    ExampleSchedule,
    Share,
    SourceSettings,
    draw_objectives,
    epoch_examples,
    equal_shares,
    published_shares,
)
from aang_ray.objectives.space import Space


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_draws_are_distinct_and_repeatable(size: int, n: int, seed: int, step: int) -> None:
    drawn = draw_objectives(size, n, seed, step)
    assert len(set(drawn)) == len(drawn) == min(n, size)
    assert drawn == tuple(sorted(drawn))
    assert drawn == draw_objectives(size, n, seed, step)


def test_draws_are_uniform() -> None:
    counts = Counter(k for step in range(4000) for k in draw_objectives(23, 6, 0, step))
    # Each objective is drawn 6/23 of 4000 times = 1043.5; standard deviation about 27.8.
    assert max(abs(counts[k] - 4000 * 6 / 23) for k in range(23)) < 5 * 27.8


@given(st.integers(0, 300), st.integers(1, 24), st.integers(0, 99))
def test_shares_differ_by_one_at_most_and_rotate(batch: int, n: int, seed: int) -> None:
    rows = np.array([equal_shares(batch, n, seed, step) for step in range(n)])
    assert (rows.sum(axis=1) == batch).all()
    assert rows.max() - rows.min() <= 1
    # Over n steps everybody has had the same.
    assert len(set(rows.sum(axis=0).tolist())) == 1


@given(st.integers(1, 50), st.integers(0, 200), st.integers(1, 120))
def test_an_epoch_reads_everything_once(size: int, start: int, count: int) -> None:
    whole = epoch_examples(size, 0, start + count, 7, 3)
    assert (epoch_examples(size, start, count, 7, 3) == whole[start:]).all()
    for epoch in range((start + count) // size):
        assert sorted(whole[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_cursors_replay_what_they_missed() -> None:
    walked, jumped = Cursors(23, 6, 48, 5), Cursors(23, 6, 48, 5)
    for step in range(40):
        expected = walked.at(step)
    assert jumped.at(39) == expected
    assert jumped.at(3) == Cursors(23, 6, 48, 5).at(3)  # backwards, too


def test_no_example_is_skipped_or_repeated_between_steps() -> None:
    cursors = Cursors(5, 2, 9, 0)
    read: dict[int, int] = {}
    for step in range(50):
        for objective, start, count in cursors.at(step):
            assert start == read.get(objective, 0)
            read[objective] = start + count


def test_randomness_is_uniform_and_keyed_by_every_coordinate() -> None:
    draws = randomness.uniform(1, 2, np.arange(100_000))
    assert draws.mean() == pytest.approx(0.5, abs=0.005)
    assert np.histogram(draws, bins=16, range=(0, 1))[0].std() < 4 * np.sqrt(100_000 / 16)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.02
    others = [randomness.uniform(1, 3, np.arange(1000)), randomness.uniform(2, 2, np.arange(1000))]
    for other in others:
        assert abs(np.corrcoef(draws[:1000], other)[0, 1]) < 0.15
    assert randomness.uniform(2, 1)[0] != randomness.uniform(1, 2)[0]


# Published allocation (docs/semantics.md, section 2.3), with factors that are not equal


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
"""All objectives but the last, which shares no data, transform or representation with another."""
LOGITS = {
    "D": {"end-task": 0.0, "in-domain": math.log(2), "out-of-domain": 50.0},
    "T": {"mask": math.log(4), "replace": 0.0, "bert-op": 50.0},
    "R": {"bidirectional": math.log(3), "random-factorized": 0.0, "left-to-right": 50.0},
    "O": {"denoise": -30.0, "end-task": 30.0},
}
BATCH = 21
COUNTS = [5, 5, 2, 11, 6]
"""Computed by hand from the logits above; softmaxes run over what was sampled together.

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


# The examples of the dev head and of the dev batch (docs/semantics.md, section 3)


TRAIN, DEV, HEAD = 100, 20, 8


def schedule(batch: int, published: bool, set_aside: float = 0.0) -> ExampleSchedule:
    settings = SourceSettings(
        end_task=16,
        auxiliary=24,
        dev=batch,
        dev_head=HEAD,
        seed=0,
        head_from_train=published,
        meta_dev_fraction=set_aside,
    )
    return ExampleSchedule(TRAIN, DEV, lambda _: 0, None, 0, settings)


def test_published_the_head_is_of_train_and_all_of_dev_is_left_for_the_batch() -> None:
    made = schedule(DEV, published=True)
    seen: set[int] = set()
    for step in range(200):
        head = made.dev_head(step).tolist()
        assert len(set(head)) == HEAD
        seen.update(head)
        assert sorted(made.dev_batch(step).tolist()) == list(range(DEV))
    assert seen == set(range(TRAIN)), "train, whose indices go beyond dev's"


def test_published_every_example_of_dev_is_as_likely_in_a_smaller_batch() -> None:
    """5 of 20, 800 times: 200 each, deviation sqrt(800 * 1/4 * 3/4) = 12.2. None is left out for the head's sake."""
    made = schedule(5, published=True)
    counts = np.bincount(np.concatenate([made.dev_batch(step) for step in range(800)]), minlength=DEV)
    assert abs(counts - 200).max() < 5 * 12.3


@pytest.mark.parametrize(("batch", "size"), [(DEV, DEV - HEAD), (5, 5)])
def test_sound_head_and_batch_are_disjoint_parts_of_dev(batch: int, size: int) -> None:
    made = schedule(batch, published=False)
    for step in range(100):
        head, dev = made.dev_head(step).tolist(), made.dev_batch(step).tolist()
        assert len(set(head)) == HEAD
        assert len(set(dev)) == size
        assert not set(head) & set(dev)
        assert set(head) | set(dev) <= set(range(DEV))


def test_published_with_a_part_of_dev_set_aside_for_the_meta_part() -> None:
    """Half of 20: the dev batch is those 10, and the other 10 decide which checkpoint stays."""
    made = schedule(DEV, published=True, set_aside=0.5)
    batch = set(made.dev_batch(0).tolist())
    assert len(batch) == 10
    assert not batch & set(made.score_dev.tolist())
    assert batch | set(made.score_dev.tolist()) == set(range(DEV))
