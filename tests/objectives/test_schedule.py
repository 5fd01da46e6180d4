"""Which examples the dev head and the dev batch have. (semantics section 3)"""

from __future__ import annotations

import numpy as np
import pytest

from aang_ray.objectives.sampling import ExampleSchedule, SourceSettings

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
