"""Write the classifier of a finished run to a folder of Hugging Face's layout, and load it again.

- config.json, model.safetensors: a model for sequence classification. It is the family's own class where that computes
  what the run did, and else `PooledClassifier`, with its modelling file beside it
- the tokenizer, which cuts texts as in the run
- README.md: the model card
- run.json: the run's row, and what `load_classifier` must know
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification, AutoTokenizer

from aang_ray.config import DataConfig
from aang_ray.data import EndTask, load_tokenizer
from aang_ray.data.modalities import modality_of
from aang_ray.data.pretrained import first_line
from aang_ray.data.random_encoder import locate_encoder
from aang_ray.data.read import Texts
from aang_ray.data.tasks import Labelled
from aang_ray.data.tokens import tokenise
from aang_ray.errors import UserError
from aang_ray.model import portable
from aang_ray.model.attention import position_offset
from aang_ray.model.encoder import Encoder
from aang_ray.model.heads import NATIVE, TANH_FAMILIES, ClassificationHead, EndTaskHead, NativeHead
from aang_ray.model.loading import quiet_transformers
from aang_ray.model.lora import has_lora, merged_state, write_adapter
from aang_ray.model.portable import PooledClassifier, PooledClassifierConfig
from aang_ray.objectives.source import END_TASK_HEAD
from aang_ray.store.files import NotWritten, new_folder, write_file
from aang_ray.store.schema import CellRecord, ResultRow
from aang_ray.train.device import Compute
from aang_ray.train.domain import domain_of
from aang_ray.train.evaluate import SplitReader
from aang_ray.train.model_card import ModelFacts, model_card, with_seeds
from aang_ray.train.setup import Setup

FORMAT = 2
RUN, README, CODE = "run.json", "README.md", "modeling_pooled_classifier.py"
ADAPTER = "adapter"
_OLD_RUN = "model_card.json"
"""What `RUN` was called in format 1."""
_DROPOUTS = {
    "distilbert": ("seq_classif_dropout",),
    "deberta-v2": ("pooler_dropout", "cls_dropout"),
}
"""What the dropout of a family's classifier is called where it is not `classifier_dropout`."""


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
    if folder.is_dir() and ((folder / RUN).is_file() or (folder / _OLD_RUN).is_file() or not any(folder.iterdir())):
        return
    if folder.exists():
        raise UserError(f"export {folder}: there is something that is not an exported model; give another folder")
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=above).cleanup()  # only trying tells: of permissions, root has all
    except OSError as error:
        raise UserError(f"export {folder}: cannot be written: {above}: {error.strerror}") from error


def export_model(folder: Path, setup: Setup, record: CellRecord) -> None:
    """Write the classifier of a finished run with its best model, all or nothing.

    Raises:
        UserError: The folder holds something that is not an exported model, which is replaced.
        NotWritten: It cannot be written. An earlier export is still there.
    """
    check_export(folder, setup.config.data)
    try:
        _write(folder, setup, record)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise NotWritten(
            f"export {folder} cannot be written: {reason}; the row is in the store, and the same command tries again"
        ) from error


def _write(folder: Path, setup: Setup, record: CellRecord) -> None:
    task, encoder, config = setup.task, setup.encoder, setup.config
    assert isinstance(task, EndTask)
    assert isinstance(encoder, Encoder)
    head = setup.head_of[END_TASK_HEAD]
    assert isinstance(head, ClassificationHead | NativeHead)
    located = locate_encoder(config.data, config.encoder)
    tokenizer = load_tokenizer(located)
    model = to_transformers(encoder, head, task.label_names, tokenizer.pad_token_id)
    own_code = isinstance(model, PooledClassifier)
    _adapt(tokenizer, encoder, task.manifest["max_tokens"])
    facts = ModelFacts(
        labels=task.label_names,
        base_model=None if located.local else located.source,
        layers=config.encoder.layers,
        pooling=encoder.pooling,
        max_tokens=task.manifest["max_tokens"],
        pairs=config.data.text_b is not None,
        own_code=own_code,
        adapter=ADAPTER if has_lora(encoder.body) else None,
    )
    run = {
        "format": FORMAT,
        "labels": list(facts.labels),
        "pooling": facts.pooling,
        "max_tokens": facts.max_tokens,
        "text_pairs": facts.pairs,
        "precision": setup.compute.precision,
        "result": asdict(record.result),
    }
    text = json.dumps(_without_nan(run), indent=1, ensure_ascii=False, allow_nan=False)
    with quiet_transformers(), new_folder(folder.absolute(), replace=True) as draft:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        if facts.adapter is not None:
            write_adapter(encoder.body, draft / facts.adapter, facts.base_model, located.revision)
        if own_code:
            (draft / CODE).write_text(inspect.getsource(portable), encoding="utf-8")
        (draft / README).write_text(model_card(record, facts), encoding="utf-8")
        (draft / RUN).write_text(text + "\n", encoding="utf-8")


def to_transformers(encoder: Encoder, head: EndTaskHead, labels: Sequence[str], pad: int) -> Any:
    """Return a model of Transformers that computes what encoder and head compute, in eval mode on the CPU.

    Adapters are merged into the layers that they adapt.
    It is the family's own class where that pools and classifies in the same way, else a `PooledClassifier`.

    Args:
        encoder: The encoder of a run.
        head: Its head for the end task.
        labels: Name of each class.
        pad: The tokenizer's id of padding.
    """
    body: Any = encoder.body
    dropout: Any = head.dropout if isinstance(head, NativeHead) else head[2]
    first_position = position_offset(body)
    settings: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    # Families that number positions from their padding's id find padding by it, which the tokenizer must share.
    finds_padding = first_position in (0, pad + 1)
    if isinstance(head, NativeHead) or (
        encoder.pooling == "first" and encoder.model_type in TANH_FAMILIES and finds_padding
    ):
        config = copy.deepcopy(body.config)
        dropouts = _DROPOUTS.get(encoder.model_type, ("classifier_dropout",))
        config.update({**settings, **dict.fromkeys(dropouts, dropout.p)})
        if hasattr(config, "classifier_pooling"):
            config.update({"classifier_pooling": "cls"})
        model = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)](config)
    else:
        names = {"AutoConfig": PooledClassifierConfig, "AutoModelForSequenceClassification": PooledClassifier}
        settings["auto_map"] = {name: f"{CODE.removesuffix('.py')}.{kind.__name__}" for name, kind in names.items()}
        plain = (body.config.to_dict(), encoder.pooling, dropout.p, first_position)
        model = PooledClassifier(PooledClassifierConfig(*plain, **settings))
    target, layers = _parts(model)
    found = target.load_state_dict(merged_state(body), strict=False)
    # The hidden layer of BERT's head is the pooler of its body, which our bodies do not have.
    wrong = [name for name in (*found.missing_keys, *found.unexpected_keys) if not name.startswith("pooler.")]
    if wrong:
        raise ValueError(f"{type(model).__name__} does not hold the encoder: {wrong}")
    own = (head.dense, head.out_proj, head.norm) if isinstance(head, NativeHead) else (head[0], head[3], nn.Identity())
    for layer, ours in zip(layers, own, strict=True):
        layer.load_state_dict(ours.state_dict())
    return model.eval()


def _parts(model: Any) -> tuple[Any, tuple[nn.Module, nn.Module, nn.Module]]:
    """Return the body of a model that `to_transformers` returns, and its hidden layer, output layer and norm."""
    if isinstance(model, PooledClassifier):
        return model.encoder, (model.dense, model.out_proj, nn.Identity())
    match model.config.model_type:
        case "bert":
            return model.bert, (model.bert.pooler.dense, model.classifier, nn.Identity())
        case "distilbert":
            return model.distilbert, (model.pre_classifier, model.classifier, nn.Identity())
        case "deberta-v2":
            return model.deberta, (model.pooler.dense, model.classifier, nn.Identity())
        case "modernbert":
            return model.model, (model.head.dense, model.classifier, model.head.norm)
        case _:
            return model.base_model, (model.classifier.dense, model.classifier.out_proj, nn.Identity())


def _adapt(tokenizer: Any, encoder: Encoder, max_tokens: int) -> None:
    """Let the tokenizer by itself give a model what a run gives it."""
    body: Any = encoder.body
    takes_types = "token_type_ids" in inspect.signature(body.forward).parameters
    tells_types = takes_types and getattr(body.config, "type_vocab_size", 1) > 1
    settings = {
        "model_input_names": ["input_ids", *(["token_type_ids"] if tells_types else []), "attention_mask"],
        "model_max_length": max_tokens,
        "padding_side": "right",
    }
    for name, value in settings.items():
        setattr(tokenizer, name, value)
    tokenizer.init_kwargs.update(settings)  # of its settings, it writes those that it was made with


def add_seeds(folder: Path, results: Sequence[ResultRow]) -> None:
    """Write the scores of all seeds of an exported run's configuration into its model card.

    Raises:
        NotWritten: It cannot be written; the card is as before.
    """
    card = folder / README
    write_file(card.absolute(), with_seeds(card.read_text(encoding="utf-8"), results).encode())


def how_to_load(folder: Path) -> str:
    """Return a line that says where an export is and how to load it."""
    trust = ", trust_remote_code=True" if (folder / CODE).is_file() else ""
    return (
        f"The model is in {folder}. With Transformers alone: "
        f'pipeline("text-classification", "{folder}"{trust})("a text", truncation=True); '
        f'here: aang_ray.load_classifier("{folder}").predict("a text")'
    )


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
        self, encoder: Encoder, head: nn.Module, tokenizer: Any, card: dict[str, Any], compute: Compute
    ) -> None:
        self.card = card
        """Labels, scores, configuration and versions of the run."""
        self.labels: tuple[str, ...] = tuple(card["labels"])
        self._encoder, self._head = encoder.to(compute.device).eval(), head.to(compute.device).eval()
        self._tokenizer, self._compute = tokenizer, compute

    def predict(
        self, texts: str | tuple[str, str] | Sequence[str] | Sequence[tuple[str, str]]
    ) -> tuple[list[str], npt.NDArray[np.float32]]:
        """Classify texts or pairs of texts. They are truncated to the length used in training.

        Args:
            texts: Single texts if the model was trained on single texts, else pairs. One text, or one pair as a tuple,
                counts as a list of one.

        Returns:
            The label of each text, and the probabilities [E, C] in the order of `labels`.

        Raises:
            UserError: For a single text if the model was trained on pairs, and for a pair if it was not.
        """
        one = isinstance(texts, str) or (self.card["text_pairs"] and _is_pair(texts))
        listed: Any = [texts] if one else texts
        if not listed:
            return [], np.zeros((0, len(self.labels)), dtype=np.float32)
        tokens, _ = tokenise(self._read(listed), self._tokenizer, self.card["max_tokens"], "texts")
        unknown = np.zeros(len(listed), dtype=np.int64)
        reader = SplitReader(Labelled(tokens, unknown), np.arange(len(listed)), self._tokenizer.pad_token_id)
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


def _is_pair(texts: Any) -> bool:
    return isinstance(texts, tuple) and len(texts) == 2 and all(isinstance(text, str) for text in texts)


def load_classifier(folder: Path | str, device: str = "cpu") -> Classifier:
    """Load a classifier that a run exported. Code in the folder is not run.

    Args:
        folder: The folder of the export.
        device: A PyTorch device. The precision is that of the run.

    Raises:
        UserError: For a folder without a complete export, or with an export of another format.
    """
    folder = Path(folder)
    run = _read_run(folder)
    model, tokenizer = read_model(folder)
    body, layers = _parts(model)
    if getattr(body, "pooler", None) is not None:
        body.pooler = None  # its layer is in the head
    encoder = Encoder(body, run["pooling"])
    head: EndTaskHead
    if isinstance(model, PooledClassifier) or encoder.model_type not in NATIVE:
        head = ClassificationHead(encoder.hidden_size, len(run["labels"]), 0.0)
        head[0], head[3], _ = layers
    else:
        head = NativeHead(body.config, len(run["labels"]), 0.0)
        head.dense, head.out_proj, head.norm = layers  # type: ignore[assignment]
    return Classifier(encoder, head, tokenizer, run, Compute(torch.device(device), run["precision"]))


def read_model(folder: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of an export.

    Raises:
        UserError: It is missing, cannot be read, or lacks weights, which would be random ones.
    """
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        own = kind == PooledClassifierConfig.model_type
        family: Any = PooledClassifier if own else AutoModelForSequenceClassification
        with quiet_transformers():
            model, found = family.from_pretrained(
                folder.absolute(), dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            # With the configuration, because it would be looked up, and the user asked whether its code may run.
            tokenizer = AutoTokenizer.from_pretrained(folder.absolute(), config=model.config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: the model cannot be read, export it again: {first_line(error)}") from error
    if found["missing_keys"]:
        raise UserError(
            f"{folder}: the model lacks {len(found['missing_keys'])} weights, {min(found['missing_keys'])} first; "
            "export it again"
        )
    return model, tokenizer


def _read_run(folder: Path) -> dict[str, Any]:
    try:
        run: dict[str, Any] = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / _OLD_RUN).is_file():
            raise UserError(
                f"{folder} has format 1, this version reads format {FORMAT}; export the model again"
            ) from None
        raise UserError(f"{folder} is no exported model: it holds no {RUN}") from None
    except ValueError as error:
        raise UserError(f"{folder / RUN} is not valid JSON: {error}") from error
    if run.get("format") != FORMAT:
        raise UserError(f"{folder / RUN} has format {run.get('format')}, this version reads format {FORMAT}")
    return run
