"""From an objective and its images to inputs with labels.

| transform | what the body sees | | output | label |
|---|---|---|---|---|
| no-op | the image | | other-digit | class of the digit that is not the target |
| rotate | the image, turned by 0, 90, 180 or 270 degrees, each as likely | | rotation | how often it was turned |
| noise | each pixel plus `NOISE` x N(0, 1) | | denoise | the pixels without the noise |
| | | | end-task | class of the target |

Pixels are standardised, so that noise and the loss of denoising have the scale of the train images' own spread.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri

from aang_ray.data.digits import LabelledImages
from aang_ray.objectives import randomness
from aang_ray.objectives.images.segment import Floats, ImageSegment, Int64
from aang_ray.objectives.objective import Objective

NOISE = 1.0
"""Standard deviation of the noise: that of the train images' pixels."""
TURNS = 4


def rotate(pixels_EHW: Floats, keys_E: randomness.U64) -> tuple[Floats, Int64]:
    """Each image turned against the clock by a quarter as often as its key says, and how often.

    Raises:
        ValueError: for images that are not square: turned, they would not fit.
    """
    if pixels_EHW.shape[1] != pixels_EHW.shape[2]:
        raise ValueError(f"images of {pixels_EHW.shape[1]} x {pixels_EHW.shape[2]} pixels cannot be turned")
    turns_E = (TURNS * randomness.uniform(keys_E.view(np.int64), randomness.OPERATION)).astype(np.int64)
    turned_EHW = np.empty_like(pixels_EHW)
    for turns in range(TURNS):
        chosen = turns_E == turns
        turned_EHW[chosen] = np.rot90(pixels_EHW[chosen], turns, axes=(1, 2))
    return turned_EHW, turns_E


def add_noise(pixels_EHW: Floats, keys_E: randomness.U64) -> Floats:
    """Independent normal noise on every pixel, by inversion of the normal distribution function."""
    pixels = np.arange(pixels_EHW[0].size if len(pixels_EHW) else 0)
    uniform_EP = randomness.uniform(keys_E.view(np.int64)[:, None], randomness.REPLACEMENT, pixels)
    # Of 2^53 numbers the first is 0, whose normal quantile is infinite: take the middle of each interval.
    noise_EP = ndtri(uniform_EP + 2.0**-54)
    noisy_EHW: Floats = (pixels_EHW + NOISE * noise_EP.reshape(pixels_EHW.shape)).astype(np.float32)
    return noisy_EHW


def build(objective: Objective, head: str, images: LabelledImages, keys_E: randomness.U64) -> ImageSegment:
    """The objective's inputs and labels on these images."""
    pixels_EHW, turns_E = images.pixels_NHW, np.zeros(len(images), dtype=np.int64)
    match objective.transform:
        case "rotate":
            pixels_EHW, turns_E = rotate(pixels_EHW, keys_E)
        case "noise":
            pixels_EHW = add_noise(pixels_EHW, keys_E)
    classes = {"other-digit": images.others, "rotation": turns_E, "end-task": images.labels}
    if objective.output == "denoise":
        return segment(objective.key, head, pixels_EHW, None, clean_EHW=images.pixels_NHW)
    return segment(objective.key, head, pixels_EHW, classes[objective.output])


def segment(
    name: str, head: str, pixels_EHW: Floats, classes_E: Int64 | None, clean_EHW: Floats | None = None
) -> ImageSegment:
    """A whole segment in which every label weighs 1."""
    ones_E = np.ones(len(pixels_EHW), dtype=np.float32)
    return ImageSegment(name, head, pixels_EHW, classes_E, ones_E, clean_EHW, float(len(pixels_EHW)))
