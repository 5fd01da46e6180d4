"""The draw, the shares, the epochs: pure functions of (seed, step)."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aang_ray.objectives import randomness
from aang_ray.objectives.sampling import Cursors, draw_objectives, epoch_examples, equal_shares


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
