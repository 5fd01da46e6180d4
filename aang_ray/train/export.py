"""Write the classifier of a finished run to a folder, and load it again.

- encoder/: the body with its tokenizer, in the layout of Hugging Face (safetensors)
- head.safetensors: Linear, Tanh, Dropout, Linear on the pooled text
- model_card.json: labels, pooling and text length, scores, configuration, versions
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from aang_ray.config import DataConfig
from aang_ray.config.sections import EncoderConfig
from aang_ray.data import EndTask, load_tokenizer, locate, tokenizer_facts
from aang_ray.data.modalities import modality_of
from aang_ray.data.pretrained import first_line
from aang_ray.data.random_encoder import locate_encoder
from aang_ray.data.read import Texts
from aang_ray.data.tasks import Labelled
from aang_ray.data.tokens import tokenise
from aang_ray.errors import UserError
from aang_ray.model.encoder import Encoder
from aang_ray.model.heads import ClassificationHead
from aang_ray.model.loading import load_encoder, quiet_transformers
from aang_ray.objectives.source import END_TASK_HEAD
from aang_ray.store.files import NotWritten, new_folder
from aang_ray.store.schema import ResultRow
from aang_ray.train.device import Compute
from aang_ray.train.domain import domain_of
from aang_ray.train.evaluate import SplitReader
from aang_ray.train.setup import Setup

FORMAT = 1
CARD, ENCODER, HEAD = "model_card.json", "encoder", "head.safetensors"


def check_export(folder: Path, data: DataConfig) -> None:
    """Check that a classifier of this task can be written to a folder.

    Raises:
        UserError: The folder is neither missing nor empty nor an earlier export, it cannot be made, or the task is not
            one of text.
    """
    if not domain_of(data).exports:
        kind = modality_of(data)
        raise UserError(f"export {folder}: only classifiers of text are exported; {data.task} is a task of {kind}")
    if folder == Path():
        raise UserError("export: give the name of a folder")
    if folder.is_dir() and ((folder / CARD).is_file() or not any(folder.iterdir())):
        return
    if folder.exists():
        raise UserError(f"export {folder}: there is something that is not an exported model; give another folder")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=above).cleanup()  # only trying tells: of permissions, root has all
    except OSError as error:
        raise UserError(f"export {folder}: cannot be written: {above}: {error.strerror}") from error


def export_model(folder: Path, setup: Setup, result: ResultRow) -> None:
    """Write encoder, tokenizer, end-task head and model card of a finished run with its best model, all or nothing.

    Raises:
        UserError: The folder holds something that is not an exported model, which is replaced.
        NotWritten: It cannot be written. An earlier export is still there.
    """
    check_export(folder, setup.config.data)
    try:
        _write(folder, setup, result)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise NotWritten(
            f"export {folder} cannot be written: {reason}; the row is in the store, and the same command tries again"
        ) from error


def _write(folder: Path, setup: Setup, result: ResultRow) -> None:
    task, encoder = setup.task, setup.encoder
    assert isinstance(task, EndTask)
    assert isinstance(encoder, Encoder)
    body: Any = encoder.body
    head = {name: value.contiguous() for name, value in setup.head_of[END_TASK_HEAD].state_dict().items()}
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
    with quiet_transformers(), new_folder(folder.absolute(), replace=True) as draft:
        body.save_pretrained(draft / ENCODER)
        load_tokenizer(locate_encoder(setup.config.data, setup.config.encoder)).save_pretrained(draft / ENCODER)
        safetensors.torch.save_file(head, draft / HEAD)
        (draft / CARD).write_text(text + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    """Replace NaN, the score of a view without examples, by None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value


class Classifier:
    """A trained classifier of texts. `load_classifier` creates it."""

    def __init__(
        self, encoder: Encoder, head: nn.Module, tokenizer: Any, pad: int, card: dict[str, Any], compute: Compute
    ) -> None:
        self.card = card
        """Labels, scores, configuration and versions of the run."""
        self.labels: tuple[str, ...] = tuple(card["labels"])
        self._encoder, self._head = encoder.to(compute.device).eval(), head.to(compute.device).eval()
        self._tokenizer, self._pad, self._compute = tokenizer, pad, compute

    def predict(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> tuple[list[str], npt.NDArray[np.float32]]:
        """Classify texts or pairs of texts. They are truncated to the length used in training.

        Args:
            texts: Single texts if the model was trained on single texts, else pairs.

        Returns:
            The label of each text, and the probabilities [E, C] in the order of `labels`.

        Raises:
            UserError: For a single text if the model was trained on pairs, and for a pair if it was not.
        """
        if not texts:
            return [], np.zeros((0, len(self.labels)), dtype=np.float32)
        tokens, _ = tokenise(self._read(texts), self._tokenizer, self.card["max_tokens"], "texts")
        unknown = np.zeros(len(texts), dtype=np.int64)
        reader = SplitReader(Labelled(tokens, unknown), np.arange(len(texts)), self._pad)
        predictions = reader.predict(self._encoder, self._head, self._compute)
        probabilities_EC: npt.NDArray[np.float32] = torch.softmax(predictions.logits_EC, dim=1).numpy()
        return [self.labels[index] for index in predictions.classes_E], probabilities_EC

    def _read(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> Texts:
        single = [text for text in texts if isinstance(text, str)]
        pairs = [pair for pair in texts if not isinstance(pair, str)]
        if self.card["text_pairs"]:
            if single:
                raise UserError(f"this model was trained on pairs of texts; {single[0]!r} is one text")
            return Texts([first for first, _ in pairs], [second for _, second in pairs])
        if pairs:
            raise UserError(f"this model was trained on single texts; {pairs[0]!r} is not one")
        return Texts(single)


def load_classifier(folder: Path | str, device: str = "cpu") -> Classifier:
    """Load a classifier that a run exported.

    Args:
        folder: The folder of the export.
        device: A PyTorch device. The precision is that of the run.

    Raises:
        UserError: For a folder without a complete export, or with an export of another format.
    """
    folder = Path(folder)
    card = _read_card(folder)
    config = EncoderConfig(name=str((folder / ENCODER).absolute()), pooling=card["pooling"])
    located = locate(config)
    encoder = load_encoder(config, located).encoder
    tokenizer = load_tokenizer(located)
    head = ClassificationHead(encoder.hidden_size, len(card["labels"]), 0.0)
    try:
        head.load_state_dict(safetensors.torch.load_file(folder / HEAD))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder / HEAD} holds no head for {len(card['labels'])} labels; export again") from error
    compute = Compute(torch.device(device), card["precision"])
    return Classifier(encoder, head, tokenizer, tokenizer_facts(located, tokenizer).pad, card, compute)


def _read_card(folder: Path) -> dict[str, Any]:
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is no exported model: it holds no {CARD}") from None
    except ValueError as error:
        raise UserError(f"{folder / CARD} is not valid JSON: {error}") from error
    if card.get("format") != FORMAT:
        raise UserError(f"{folder / CARD} has format {card.get('format')}, this version reads format {FORMAT}")
    return card
