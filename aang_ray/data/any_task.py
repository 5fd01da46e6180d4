"""An end task of any kind by its configuration."""

from __future__ import annotations

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data.digits import ImageTask, digits_fingerprint, load_digit_pairs
from aang_ray.data.load import data_fingerprint, load_end_task
from aang_ray.data.tasks import EndTask, card_named


def is_image_task(data: DataConfig) -> bool:
    """Whether `data.task` names a task whose examples are images."""
    card = card_named(data.task)
    return card is not None and card.images


def load_task(data: DataConfig, encoder: EncoderConfig) -> EndTask | ImageTask:
    """Everything that a run reads of its end task.

    Raises:
        UserError: for anything wrong with the data or the encoder's tokenizer.
    """
    return load_digit_pairs(data) if is_image_task(data) else load_end_task(data, encoder)


def task_fingerprint(data: DataConfig) -> str:
    """Hash of the content that the names in `data` stand for.

    Raises:
        UserError: for a file or folder that is not there.
    """
    return digits_fingerprint(data) if is_image_task(data) else data_fingerprint(data)
