"""The four stages for images, and which of their combinations are objectives.

| stage | primitives |
|---|---|
| data | end-task: the train images |
| transform | no-op · rotate (by 0, 90, 180 or 270 degrees) · noise (Gaussian, on every pixel) |
| representation | whole: the body sees all of the image |
| output | other-digit (supervised) · rotation (which of the four) · denoise (the pixels before the noise) · end-task |
"""

from __future__ import annotations

from typing import Final

from aang_ray.objectives.objective import Rule

IMAGE_PRIMITIVES: Final[dict[str, tuple[str, ...]]] = {
    "data": ("end-task",),
    "transform": ("no-op", "rotate", "noise"),
    "representation": ("whole",),
    "output": ("other-digit", "rotation", "denoise", "end-task"),
}

IMAGE_RULES: tuple[Rule, ...] = (
    Rule(
        "how far an image was turned can be asked of one that was turned only",
        lambda k: k.output == "rotation" and k.transform != "rotate",
        published=True,
    ),
    Rule(
        "a turned image has its digits in other corners, so that their labels no longer fit",
        lambda k: k.transform == "rotate" and k.output in {"other-digit", "end-task"},
        published=True,
    ),
    Rule(
        "a turned image has lost nothing that denoising could restore",
        lambda k: (k.transform, k.output) == ("rotate", "denoise"),
        published=True,
    ),
    Rule(
        "denoising an image that nothing corrupted is copying",
        lambda k: (k.transform, k.output) == ("no-op", "denoise"),
        published=False,
    ),
)
"""Each with its reason."""
