"""An exported model at work: texts in, labels and probabilities out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from aang_ray.config.sections import EncoderConfig
from aang_ray.data import load_tokenizer, locate, tokenizer_facts
from aang_ray.data.task import Labelled
from aang_ray.data.texts import Texts
from aang_ray.data.tokens import tokenise
from aang_ray.errors import UserError
from aang_ray.model.encoder import Encoder
from aang_ray.model.heads import ClassificationHead
from aang_ray.model.loading import load_encoder
from aang_ray.train.evaluate import SplitReader
from aang_ray.train.export import CARD, ENCODER, FORMAT, HEAD
from aang_ray.train.precision import Compute


class Classifier:
    """A trained encoder with its end-task head, tokenizer and card."""

    def __init__(
        self, encoder: Encoder, head: nn.Module, tokenizer: Any, pad: int, card: dict[str, Any], compute: Compute
    ) -> None:
        self.card = card
        """Labels, scores, configuration and versions of the run that made it."""
        self.labels: tuple[str, ...] = tuple(card["labels"])
        self._encoder, self._head = encoder.to(compute.device).eval(), head.to(compute.device).eval()
        self._tokenizer, self._pad, self._compute = tokenizer, pad, compute

    def predict(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> tuple[list[str], npt.NDArray[np.float32]]:
        """The label of each text, or pair of texts, and the probabilities [E, C] in the order of `labels`.

        Texts are cut to the length that the model was trained with.

        Raises:
            UserError: for a text where the model was trained on pairs, or the other way round.
        """
        if not texts:
            return [], np.zeros((0, len(self.labels)), dtype=np.float32)
        tokens = tokenise(self._read(texts), self._tokenizer, self.card["max_tokens"], "texts").ragged
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
    """The classifier that a run exported, in the precision that its scores were made with.

    Raises:
        UserError: for a folder that holds no whole export, or one of a newer version.
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
