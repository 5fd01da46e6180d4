"""Every kind of examples is loaded, hashed and printed by the functions of its modality."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data import EndTask, ImageTask, load_task, print_task, task_fingerprint
from aang_ray.data.corpora import external_sources
from aang_ray.data.load import data_fingerprint
from aang_ray.data.modalities import MODALITIES, Modality, modality_of
from aang_ray.data.tasks import _CARDS, Card
from aang_ray.errors import UserError


def test_texts_and_images(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    texts, images = DataConfig(task=str(folder())), DataConfig(task="digits-left")
    assert (modality_of(texts), modality_of(images)) == ("text", "images")
    assert isinstance(load_task(texts, encoder), EndTask)
    assert isinstance(load_task(images, encoder), ImageTask)
    assert task_fingerprint(texts) == data_fingerprint(texts)
    assert task_fingerprint(images) != data_fingerprint(DataConfig(task="movie"))


def test_a_new_modality_needs_a_card_and_three_functions(
    encoder: EncoderConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card("birds", "birdsong", "accuracy", 3, "somebody", "nowhere", modality="sounds")
    monkeypatch.setitem(_CARDS, "birds", card)
    sounds = Modality(
        lambda data, _: f"sounds of {data.task}", lambda _: "abc", lambda task, console: console.print(task)
    )
    monkeypatch.setitem(MODALITIES, "sounds", sounds)
    data, page = DataConfig(task="birds"), io.StringIO()
    assert task_fingerprint(data) == "abc"
    print_task(data, encoder, Console(file=page))
    assert page.getvalue() == "sounds of birds\n"
    assert modality_of(data) == "sounds"
    with pytest.raises(UserError, match=r"^data\.external: birds: this is a task of sounds"):
        external_sources(DataConfig(task="movie", external=("birds",)))
