"""What a configuration may say for a task of images."""

from __future__ import annotations

from typing import Final

from aang_ray.config.methods import PretrainSection
from aang_ray.config.run import RunConfig
from aang_ray.errors import UserError

LENET: Final = "lenet"
"""The value of `encoder.name` that stands for the body of images."""
FINGERPRINT: Final = "lenet:1"
"""Of the body and how it starts: to be raised when `model/lenet.py` changes."""
_USED: Final = {
    "data": {"task", "metric", "train_size", "class_weights", "split_seed", "dev_fraction", "test_fraction"},
    "encoder": {"name", "head_dropout"},
    "objectives": {"legality", "allocation", "heads"},
    "gradients": {"engine", "local_distances"},
}
"""Settings of these sections that mean something for images; all others belong to text."""


def check_image_settings(config: RunConfig) -> None:
    """Refuse what means nothing for images, rather than let it change the name of a cell and not its result.

    Raises:
        UserError: for a setting of text that is away from its default, a masked-LM method, or another encoder.
    """
    if config.encoder.name != LENET:
        raise UserError(f"encoder.name: {config.data.task} is a task of images; its encoder is {LENET}")
    if isinstance(config.method, PretrainSection):
        raise UserError(f"method.name: {config.method.name} pretrains on text; {config.data.task} is a task of images")
    plain = type(config)()
    for section, used in _USED.items():
        given, default = getattr(config, section), getattr(plain, section)
        for name in type(given).model_fields:
            if name not in used and getattr(given, name) != getattr(default, name):
                raise UserError(f"{section}.{name}: means nothing for {config.data.task}, a task of images")
