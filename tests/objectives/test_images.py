"""Objectives on images: legality, corruptions, labels, and the loss of each segment."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from aang_ray.data.digits import ImageTask, LabelledImages
from aang_ray.errors import UserError
from aang_ray.objectives import randomness
from aang_ray.objectives.batch import cut
from aang_ray.objectives.images import (
    NOISE,
    PRIMITIVES,
    RULES,
    ImageSegment,
    ImageSource,
    add_noise,
    build,
    collate_images,
    image_losses,
    rotate,
    segment,
)
from aang_ray.objectives.objective import Objective, ruled_out
from aang_ray.objectives.sampling import SourceSettings
from aang_ray.objectives.space import enumerate_space, read_space


def keys(count: int, seed: int = 0) -> randomness.U64:
    return randomness.keys(seed, np.arange(count))


def images(count: int = 20, size: int = 6) -> LabelledImages:
    rng = np.random.default_rng(0)
    return LabelledImages(
        rng.normal(size=(count, size, size)).astype(np.float32), rng.integers(0, 10, count), rng.integers(0, 10, count)
    )


def objective(transform: str, output: str) -> Objective:
    return Objective("end-task", transform, "whole", output)


@pytest.mark.parametrize(
    ("name", "sound", "published"), [("digits", 4, 5), ("digits_pair", 1, 1), ("digits_unlabelled", 6, 6)]
)
def test_sizes_of_the_spaces(name: str, sound: int, published: int) -> None:
    assert len(enumerate_space(name, read_space(name))) == sound
    assert len(enumerate_space(name, read_space(name), "published")) == published


# (reason, in published semantics too, forbidden cells (transform, output), neighbours that pass).
EXPECTED = [
    (
        "the rotation of an image can be predicted only if it was rotated",
        True,
        [("no-op", "rotation"), ("noise", "rotation")],
        [("rotate", "rotation")],
    ),
    (
        "rotation moves the digits to other corners, so their labels no longer fit",
        True,
        [("rotate", "other-digit"), ("rotate", "end-task")],
        [(t, o) for t in ("no-op", "noise") for o in ("other-digit", "end-task")],
    ),
    ("rotation destroys nothing that denoising could restore", True, [("rotate", "denoise")], []),
    ("denoising an uncorrupted image is copying", False, [("no-op", "denoise")], [("noise", "denoise")]),
]
UNLABELLED = "in-domain images have no labels of digits"


@pytest.mark.parametrize(
    ("reason", "published", "forbidden", "allowed"), EXPECTED, ids=[rule[0][:40] for rule in EXPECTED]
)
def test_a_rule_forbids_what_it_says_and_no_more(
    reason: str, published: bool, forbidden: list[tuple[str, str]], allowed: list[tuple[str, str]]
) -> None:
    for cell in forbidden:
        assert ruled_out(objective(*cell), "sound", RULES) == reason
        assert ruled_out(objective(*cell), "published", RULES) == (reason if published else None)
    for cell in allowed:
        assert ruled_out(objective(*cell), "sound", RULES) is None


def test_no_cell_and_no_rule_is_untested() -> None:
    cells = {cell for _, _, forbidden, allowed in EXPECTED for cell in (*forbidden, *allowed)}
    assert cells == set(product(PRIMITIVES["transform"], PRIMITIVES["output"]))
    about_data = {(UNLABELLED, True)}
    assert {(rule.reason, rule.published) for rule in RULES} - about_data == {(rule[0], rule[1]) for rule in EXPECTED}


@pytest.mark.parametrize("output", PRIMITIVES["output"])
def test_images_without_labels_have_objectives_without_labels(output: str) -> None:
    transform = "rotate" if output == "rotation" else "noise"
    found = ruled_out(Objective("in-domain", transform, "whole", output), "published", RULES)
    assert found == (UNLABELLED if output in {"other-digit", "end-task"} else None)


def test_a_name_of_another_domain_is_refused(tmp_path: pytest.TempPathFactory) -> None:
    path = f"{tmp_path}/mine.yaml"
    with open(path, "w") as file:
        file.write(
            "domain: images\nblocks:\n"
            "  - {data: [end-task], transform: [bert-op], representation: [whole], output: [denoise]}\n"
        )
    with pytest.raises(UserError, match=r"'bert-op' is no transform; allowed: no-op, rotate, noise"):
        read_space(path)


def test_files_of_primitives_are_for_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "domain: images\nprimitives: [mine.py]\nblocks:\n"
        "  - {data: [end-task], transform: [noise], representation: [whole], output: [denoise]}\n"
    )
    with pytest.raises(UserError, match=r"^mine\.yaml: primitives: files that add primitives are for spaces on text"):
        read_space(str(path))


def test_pixels_are_standardised_by_train_alone() -> None:
    made = images()
    train, dev, test = (replace(made, pixels_NHW=(k + 2) * made.pixels_NHW + 10 * k) for k in range(3))
    none = made.take(np.arange(0))
    task = ImageTask("t", ("0", "1"), "accuracy", train, dev, test, np.arange(20), None, unlabelled=none)
    source = ImageSource(task, None, 0, SourceSettings(end_task=8, auxiliary=8, dev=8, dev_head=8, seed=0))
    for split, seen in ((train, source.train), (dev, source.dev), (test, source.test)):
        expected = (split.pixels_NHW - train.pixels_NHW.mean()) / train.pixels_NHW.std()
        np.testing.assert_allclose(seen.pixels_NHW, expected, rtol=1e-4, atol=1e-5)


def test_rotation_is_undone_by_the_label() -> None:
    made = images(400)
    turned, turns = rotate(made.pixels_NHW, keys(400))
    for image, back, quarter in zip(made.pixels_NHW, turned, turns, strict=True):
        assert np.array_equal(np.rot90(back, -quarter), image)
    # 400 draws of four: each count is binomial with deviation 8.7; six of them is one in a billion.
    assert (abs(np.bincount(turns, minlength=4) - 100) < 52).all()


def test_rotation_needs_squares() -> None:
    with pytest.raises(ValueError, match="2 x 3 pixels cannot be turned"):
        rotate(np.zeros((1, 2, 3), dtype=np.float32), keys(1))


def test_noise_is_standard_normal_and_of_its_own_for_every_image() -> None:
    clean = np.zeros((200, 12, 12), dtype=np.float32)
    noise = add_noise(clean, keys(200)) / NOISE
    assert abs(noise.mean()) < 6 / noise.size**0.5
    assert noise.std() == pytest.approx(1.0, abs=0.03)
    assert abs((noise**4).mean() - 3) < 0.3  # normal, not only scaled
    correlations = np.corrcoef(noise.reshape(200, -1)) - np.eye(200)
    assert abs(correlations).max() < 6 / 144**0.5
    order = np.random.default_rng(1).permutation(200)
    assert np.array_equal(add_noise(clean, keys(200)[order]), noise[order] * NOISE)
    assert add_noise(clean[:0], keys(0)).shape == (0, 12, 12)


def test_inputs_and_labels() -> None:
    made = images()
    key = keys(len(made))
    other = build(objective("no-op", "other-digit"), "other-digit", made, key)
    assert np.array_equal(other.pixels_EHW, made.pixels_NHW)
    assert np.array_equal(other.labels, made.others)
    noisy = build(objective("noise", "other-digit"), "other-digit", made, key)
    assert not np.array_equal(noisy.pixels_EHW, made.pixels_NHW)
    denoise = build(objective("noise", "denoise"), "denoise", made, key)
    assert np.array_equal(denoise.labels, made.pixels_NHW.reshape(len(made), -1))
    label = build(objective("noise", "end-task"), "label", made, key)
    assert np.array_equal(label.labels, made.labels)
    assert [s.normaliser for s in (other, denoise)] == [20.0, 20.0]


def step() -> list[ImageSegment]:
    """Segments: dev, an empty end task, two that share a head, and one whose labels are pixels."""
    made, key = images(24), keys(24)
    take = [made.take(np.arange(start, stop)) for start, stop in ((0, 5), (5, 9), (9, 16), (16, 24))]
    return [
        segment("dev", "dev", take[0].pixels_NHW, take[0].labels),
        segment("end-task", "end-task", take[0].pixels_NHW[:0], take[0].labels[:0]),
        build(objective("no-op", "other-digit"), "other", take[1], key[:4]),
        build(objective("noise", "denoise"), "pixels", take[2], key[4:11]),
        build(objective("noise", "other-digit"), "other", take[3], key[11:19]),
    ]


def model() -> tuple[nn.Module, dict[str, nn.Module]]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 8))
    return body, {"dev": nn.Linear(8, 10), "other": nn.Linear(8, 10), "pixels": nn.Linear(8, 36)}


def test_every_segment_has_the_mean_loss_of_its_own_images() -> None:
    body, heads = model()
    segments = step()
    expected = []
    for one in segments:
        features = body(torch.tensor(one.pixels_EHW)[:, None])
        if not one.examples:
            expected.append(torch.tensor(0.0))
        elif one.labels.ndim == 1:
            expected.append(F.cross_entropy(heads[one.head](features), torch.tensor(one.labels)))
        else:
            expected.append(F.mse_loss(heads["pixels"](features), torch.tensor(one.labels)))
    losses = image_losses(body, heads, collate_images(segments))
    torch.testing.assert_close(losses, torch.stack(expected))


@pytest.mark.parametrize("per_segment", [False, True])
@pytest.mark.parametrize("micro", [1, 5, 100])
def test_pieces_add_up(micro: int, per_segment: bool) -> None:
    body, heads = model()
    segments = step()
    pieces = [collate_images(part) for part in cut(segments, micro, per_segment)]
    assert max(piece.real_tokens for piece in pieces) <= micro
    total = torch.stack([image_losses(body, heads, piece) for piece in pieces]).sum(0)
    torch.testing.assert_close(total, image_losses(body, heads, collate_images(segments)))
