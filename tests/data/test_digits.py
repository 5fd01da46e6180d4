"""Superimposed digits: which digit is where, and that no digit is in two splits."""

from __future__ import annotations

from io import StringIO
from itertools import product

import numpy as np
import pytest
from rich.console import Console
from sklearn.datasets import load_digits

from aang_ray.config import DataConfig
from aang_ray.data import ImageTask
from aang_ray.data.digits import digits_fingerprint, load_digit_pairs, print_image_task, split_digits, superimpose
from aang_ray.errors import UserError


def task(name: str = "digits-left", **settings: object) -> ImageTask:
    return load_digit_pairs(DataConfig.model_validate({"task": name, **settings}))


def test_digits_are_split_before_they_are_paired() -> None:
    parts = split_digits(0.15, 0.25, seed=0)
    everything = np.concatenate(list(parts.values()))
    assert sorted(everything) == list(range(1797))
    images = load_digits().images
    seen = [{images[index].tobytes() for index in part} for part in parts.values()]
    assert len(set().union(*seen)) == sum(len(part) for part in seen)
    for part in parts.values():  # stratified: every class has about a tenth
        assert np.bincount(load_digits().target[part], minlength=10).min() > 0.08 * len(part)


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_an_image_shows_two_digits_of_its_own_split_with_its_labels(split: str) -> None:
    """The three upper rows and left columns show the left digit alone; the lower and right ones the right digit."""
    digits, classes = load_digits().images / 16, load_digits().target
    part = split_digits(0.15, 0.25, seed=0)[split]  # type: ignore[index]
    made = getattr(task(), split)
    for index in range(12):
        image = made.pixels_NHW[index]
        for flipped, label in ((image, made.labels[index]), (image[::-1, ::-1], made.others[index])):
            found = set()
            for down, across in product((0, 1), (0, 1)):
                canvas = np.zeros((len(part), 12, 12))
                shown = digits[part] if flipped is image else digits[part][:, ::-1, ::-1]
                canvas[:, down : down + 8, across : across + 8] = shown
                alone = np.zeros((12, 12), dtype=bool)
                alone[:3], alone[:, :3] = True, True
                matches = (canvas[:, alone] == flipped[alone]).all(axis=1)
                found |= set(classes[part][matches].tolist())
            assert label in found


def test_superimposed_by_hand() -> None:
    """Two digits of one brightness: 8 x 8 pixels each, of which 4 x 4 overlap and show the brighter one.

    0.5 * (64 - 16) + 1 * 64 = 88; shifted by (1, 1) and (1, 1) 6 x 6 overlap: 0.5 * (64 - 36) + 64 = 78.
    """
    left, right = np.full((2, 8, 8), 0.5, dtype=np.float32), np.ones((2, 8, 8), dtype=np.float32)
    canvas = superimpose(left, right, np.array([[0, 0, 0, 0], [1, 1, 1, 1]]))
    assert canvas.shape == (2, 12, 12)
    assert canvas.sum(axis=(1, 2)).tolist() == [88.0, 78.0]
    assert canvas[0, 0, 0] == 0.5
    assert canvas[0, 11, 11] == 1.0
    assert canvas[1, 0, 0] == canvas[1, 11, 11] == 0.0
    assert canvas[0, 0, 11] == canvas[0, 11, 0] == 0.0


def test_left_and_right_are_the_same_images_with_labels_exchanged() -> None:
    left, right = task("digits-left"), task("digits-right")
    for split in ("train", "dev", "test"):
        one, other = getattr(left, split), getattr(right, split)
        assert np.array_equal(one.pixels_NHW, other.pixels_NHW)
        assert np.array_equal(one.labels, other.others)
        assert np.array_equal(one.others, other.labels)
    assert task("digits").name == "digits-left"


def test_the_split_seed_decides_the_images() -> None:
    assert np.array_equal(task().train.pixels_NHW, task().train.pixels_NHW)
    assert not np.array_equal(task().train.pixels_NHW, task(split_seed=1).train.pixels_NHW)


def test_small_train_sets_are_nested() -> None:
    small, larger = task(train_size=40).train, task(train_size=80).train
    assert (len(small), len(larger)) == (40, 80)
    inside = {image.tobytes() for image in larger.pixels_NHW}
    assert {image.tobytes() for image in small.pixels_NHW} <= inside
    with pytest.raises(UserError, match="train_size: 5000 is not possible"):
        task(train_size=5000)


def test_the_other_images_stay_without_their_labels() -> None:
    few, everything = task(train_size=100), task()
    assert (len(few.train), len(few.unlabelled), len(everything.unlabelled)) == (100, 1948, 0)
    together = sorted(image.tobytes() for split in (few.train, few.unlabelled) for image in split.pixels_NHW)
    assert together == sorted(image.tobytes() for image in everything.train.pixels_NHW)
    assert set(few.unlabelled.labels) == set(few.unlabelled.others) == {-1}
    page = StringIO()
    print_image_task(few, Console(file=page, width=120))
    assert "Unlabelled: 1948 images" in page.getvalue()


def test_balanced_weights_sum_to_the_examples() -> None:
    weighted = task(class_weights="balanced")
    assert weighted.class_weights is not None
    assert weighted.class_weights[weighted.train.labels].sum() == pytest.approx(len(weighted.train))


def test_the_fingerprint_depends_on_the_side_and_not_on_the_seed() -> None:
    left, right = (digits_fingerprint(DataConfig(task=f"digits-{side}")) for side in ("left", "right"))
    assert left != right
    assert digits_fingerprint(DataConfig(task="digits", split_seed=3)) == left


def test_the_printed_page() -> None:
    page = StringIO()
    print_image_task(task("digits-right"), Console(file=page, width=120))
    lines = page.getvalue().splitlines()
    assert lines[0].startswith("digits-right from sklearn.datasets.load_digits, decided by accuracy")
    assert any("2048" in line and "1024" in line for line in lines)
    assert "(other:" in page.getvalue()
