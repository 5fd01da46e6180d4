"""The modalities of end tasks (text, images): how each is loaded, hashed and printed.

To add one, write a module with its cards (`register_cards`) and these three functions, and add a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data.describe import print_text_task
from aang_ray.data.digits import IMAGES, ImageTask, digits_fingerprint, load_digit_pairs, print_image_task
from aang_ray.data.load import data_fingerprint, load_end_task
from aang_ray.data.tasks import TEXT, EndTask, card_named

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Modality:
    """How end tasks of a kind of examples are loaded, hashed and printed."""

    load: Callable[[DataConfig, EncoderConfig], Any]
    fingerprint: Callable[[DataConfig], str]
    show: Callable[[Any, Console], None]


MODALITIES = {
    TEXT: Modality(load_end_task, data_fingerprint, print_text_task),
    IMAGES: Modality(lambda data, _: load_digit_pairs(data), digits_fingerprint, print_image_task),
}


def modality_of(data: DataConfig) -> str:
    """Return the modality of an end task: its card's, else text."""
    card = card_named(data.task)
    return card.modality if card is not None else TEXT


def load_task(data: DataConfig, encoder: EncoderConfig) -> EndTask | ImageTask:
    """Load everything that a run reads of its end task.

    Raises:
        UserError: for anything wrong with the data or the encoder's tokenizer.
    """
    task: EndTask | ImageTask = MODALITIES[modality_of(data)].load(data, encoder)
    return task


def task_fingerprint(data: DataConfig) -> str:
    """Return a hash of the content that the names in `data` stand for.

    Raises:
        UserError: if a file or folder does not exist.
    """
    return MODALITIES[modality_of(data)].fingerprint(data)


def print_task(data: DataConfig, encoder: EncoderConfig, console: Console) -> None:
    """Load an end task, with errors as `load_task`, and print what it looks like."""
    MODALITIES[modality_of(data)].show(load_task(data, encoder), console)
