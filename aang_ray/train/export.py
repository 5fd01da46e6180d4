"""The classifier that a run leaves to its user: a folder to keep, copy and load.

encoder/              the body with its tokenizer, in the layout of Hugging Face (safetensors)
head.safetensors      Linear, Tanh, Dropout, Linear on the pooled text
model_card.json       labels, how a text is read, scores, configuration, versions
"""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch

from aang_ray.config import DataConfig
from aang_ray.data import EndTask, is_image_task, load_tokenizer, locate
from aang_ray.errors import UserError
from aang_ray.model.encoder import Encoder
from aang_ray.objectives.source import END_TASK_HEAD
from aang_ray.store.rows import ResultRow
from aang_ray.train.setup import Setup

FORMAT = 1
CARD, ENCODER, HEAD = "model_card.json", "encoder", "head.safetensors"


def check_export(folder: Path, data: DataConfig) -> None:
    """An export holds a classifier of texts, and replaces an earlier export or an empty folder, nothing else.

    Raises:
        UserError: where there is something else, or for a task of images.
    """
    if is_image_task(data):
        raise UserError(f"export {folder}: only classifiers of text are exported; {data.task} is a task of images")
    if folder.is_dir() and ((folder / CARD).is_file() or not any(folder.iterdir())):
        return
    if folder.exists():
        raise UserError(f"export {folder}: there is something that is not an exported model; give another folder")


def export_model(folder: Path, setup: Setup, result: ResultRow) -> None:
    """Write encoder, tokenizer, end-task head and card of a run that is done; the folder appears whole or not at all.

    The set-up holds the kept model, that test was scored from.

    Raises:
        UserError: where there is something that is not an exported model.
    """
    check_export(folder, setup.config.data)
    folder = folder.absolute()
    draft, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for leftover in (draft, old):
        _remove(leftover)
    draft.mkdir(parents=True)
    _write(draft, setup, result)
    _make_durable(draft)
    if folder.exists():
        folder.rename(old)  # a folder that is not empty cannot be replaced in one action
    draft.rename(folder)
    _sync(folder.parent)
    _remove(old)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _write(folder: Path, setup: Setup, result: ResultRow) -> None:
    task, encoder = setup.task, setup.encoder
    assert isinstance(task, EndTask)
    assert isinstance(encoder, Encoder)
    body: Any = encoder.body
    body.save_pretrained(folder / ENCODER)
    load_tokenizer(locate(setup.config.encoder)).save_pretrained(folder / ENCODER)
    head = setup.head_of[END_TASK_HEAD].state_dict()
    safetensors.torch.save_file({name: value.contiguous() for name, value in head.items()}, folder / HEAD)
    card = {
        "format": FORMAT,
        "labels": list(task.label_names),
        "pooling": encoder.pooling,
        "max_tokens": task.manifest["max_tokens"],
        "text_pairs": setup.config.data.text_b is not None,
        "precision": setup.compute.precision,
        "result": asdict(result),
    }
    text = json.dumps(_without_nan(card), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: the score of a view without examples is null."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _make_durable(folder: Path) -> None:
    """Files and names survive a power cut after this."""
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
