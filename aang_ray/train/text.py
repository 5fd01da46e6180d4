"""The domain of text: packed rows of tokens through a pretrained encoder with per-example visibility."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aang_ray.config.methods import PooledConfig, PretrainSection
from aang_ray.config.run import RunConfig
from aang_ray.data import encoder_fingerprint, load_end_task, load_tokenizer, tokenizer_facts
from aang_ray.data.random_encoder import locate_encoder
from aang_ray.data.tasks import EndTask
from aang_ray.data.tokens import TokenizerFacts
from aang_ray.errors import UserError
from aang_ray.model.encoder import Encoder
from aang_ray.model.heads import ClassificationHead, TokenHead, end_task_head
from aang_ray.model.loading import LoadedEncoder, load_encoder
from aang_ray.objectives.batch import BatchPiece, PublishedVisibility, collate, cut
from aang_ray.objectives.losses import segment_losses
from aang_ray.objectives.objective import EXTERNAL
from aang_ray.objectives.packing import Segment, label_weight
from aang_ray.objectives.source import (
    END_TASK_HEAD,
    BatchSource,
    OutputSettings,
    StepBatch,
    plain,
    space_heads,
    unkeyed,
)
from aang_ray.objectives.space import (
    TEXT,
    Capabilities,
    Space,
    SpaceFile,
    enumerate_space,
    how_to_give,
    masked_lm,
    other_labels,
    read_space,
)
from aang_ray.objectives.texts import Int64, Vocabulary
from aang_ray.objectives.transforms import Noise
from aang_ray.train.domain import Domain, DomainKind, DomainParts
from aang_ray.train.evaluate import SplitReader
from aang_ray.train.plan import sampled_count, source_settings, weighted
from aang_ray.train.workers.placement import Range, parts_of

logger = logging.getLogger(__name__)


class TextDomain(Domain):
    """The domain of end tasks whose examples are texts."""

    source: BatchSource

    def __init__(
        self, task: EndTask, encoder: Encoder, source: BatchSource, pad: int, seed: int, published_visibility: bool
    ) -> None:
        super().__init__(source, source.settings)
        self._task, self._encoder, self._pad = task, encoder, pad
        self._seed, self._published = seed, published_visibility

    def entries_read(self, batch: StepBatch, ranges: Sequence[Range]) -> Int64:
        parts = parts_of(batch.segments, ranges)
        # The denoise head may draw any ordinary token as replacement.
        drawn = [s.drawn.vocabulary.ordinary_ids for s in parts if s.drawn is not None and len(s.drawn.at_G)]
        ids_T = np.concatenate([*(segment.ids_T for segment in parts), *drawn])
        # Padding is looked up too. It has a gradient unless the encoder's table excludes it (`padding_idx`).
        return np.unique(np.append(ids_T, self._pad) if len(ids_T) else ids_T).astype(np.int64)

    def pieces(
        self, batch: StepBatch, micro: int, per_segment: bool, ranges: Sequence[Range] | None = None
    ) -> tuple[BatchPiece, ...]:
        published = None
        if self._published:
            width = max(int(segment.lengths_E.max(initial=1)) for segment in batch.segments)
            published = PublishedVisibility(self._seed, batch.step, width)
        segments = batch.segments if ranges is None else parts_of(batch.segments, ranges)
        cuts = cut(segments, micro, per_segment)
        return tuple(collate(part, self._pad, self._task.class_weights, published) for part in cuts)

    def label_weights(self, segments: Sequence[Segment]) -> tuple[float, ...]:
        return tuple(label_weight(segment, self._task.class_weights) for segment in segments)

    def probe(self, batch: StepBatch, examples: int) -> BatchPiece:
        longest = max(batch.segments, key=lambda segment: int(segment.lengths_E.max(initial=0)))
        at = int(longest.lengths_E.argmax())
        return collate([longest.part(at, at + 1)] * examples, self._pad)

    def dev_head_piece(self, step: int) -> BatchPiece:
        return collate([self.source.dev_head_examples(step)], self._pad)

    def end_task_pieces(self, split: str, examples: Int64, micro: int) -> tuple[BatchPiece, ...]:
        labelled = self._task.train if split == "train" else self._task.dev
        segment = plain(split, END_TASK_HEAD, unkeyed(labelled.tokens, examples), labelled.labels[examples])
        return tuple(collate(part, self._pad) for part in cut([segment], micro, per_segment=False))

    def losses(self, piece: BatchPiece, heads: Mapping[str, nn.Module]) -> Tensor:
        return segment_losses(self._encoder, heads, piece)

    def features(self, piece: BatchPiece) -> tuple[Tensor, Tensor]:
        features_EH = self._encoder.pool(self._encoder(piece.inputs), piece.inputs)
        return features_EH, piece.pooled[0].label_K[: len(features_EH)]  # the rest is padding

    def reader(self, split: str, first: int = 0, every: int = 1) -> SplitReader:
        if split == "dev":
            return SplitReader(self._task.dev, self.source.schedule.score_dev[first::every], self._pad)
        return SplitReader(self._task.test, np.arange(first, len(self._task.test), every), self._pad)


def build_text_run(config: RunConfig, device: torch.device) -> DomainParts:
    """Load the task and a pretrained encoder, and make its heads, the space and the domain.

    Raises:
        UserError: For data, an encoder or a space that the run cannot use; also for an encoder that does not respect
            the
        visibility of its inputs.
    """
    located = locate_encoder(config.data, config.encoder)
    facts = tokenizer_facts(located, load_tokenizer(located))
    task = load_end_task(config.data, config.encoder)
    loaded = load_encoder(config.encoder, located)
    encoder = loaded.encoder
    if config.gradients.checkpointing:
        encoder.enable_checkpointing()
    encoder.to(device)
    # Measured on the pretrained embeddings, before any stage has trained them: a resumed run must find the same value.
    table_deviation = float(encoder.word_embeddings.weight.detach().std())

    def stage(config: RunConfig) -> tuple[Space | None, TextDomain]:
        space = make_space(config, task, encoder)
        source = make_source(config, task, encoder, space, facts, table_deviation)
        published = config.objectives.visibility == "published"
        return space, TextDomain(task, encoder, source, facts.pad, config.seed, published)

    space, domain = stage(config)
    head_of = make_heads(config, task, loaded, space, facts)
    return DomainParts(task, encoder, head_of, space, domain, stage)


def make_space(config: RunConfig, task: EndTask, encoder: Encoder) -> Space | None:
    """Return the legal objectives that this task and encoder can compute; None for a method without objectives.

    Objectives that are legal by themselves, but not with this task, encoder or space, are logged with the reason.

    Raises:
        UserError: No objective is left, or the space names data that are not given.
    """
    file = space_file(config, task)
    if file is None:
        return None
    settings = config.objectives
    capabilities = Capabilities(
        positions_given=encoder.positions_given,
        data=_given_data(config, task),
        sound_visibility=settings.visibility == "sound",
        shared_heads=settings.heads == "shared",
    )
    space = weighted(config, enumerate_space(config.space, file, settings.legality, settings.labels, capabilities))
    for objective, reason in space.ruled_out.items():
        if objective in space.left_out:
            logger.warning("%s is left out: %s", objective.title(task.name), reason)
    return space


def _given_data(config: RunConfig, task: EndTask) -> frozenset[str]:
    """Return the names of the data that a space can use; text of a language model counts before it is written."""
    corpora = (name.replace("_", "-") for name, texts in task.corpora.items() if len(texts))
    written = ["neural-lm"] if config.data.neural_lm is not None and "neural_lm" not in task.corpora else []
    return frozenset(("end-task", *corpora, *written, *(f"{EXTERNAL}{name}" for name in task.external)))


def space_file(config: RunConfig, task: EndTask) -> SpaceFile | None:
    """Return the space of a run as its file has it; None for a method without objectives.

    Raises:
        UserError: if it is of another domain, or names data that are not given.
    """
    if isinstance(config.method, PretrainSection):
        file = masked_lm(config.method.texts)
    elif isinstance(config.method, PooledConfig):
        file = other_labels(tuple(task.external))
    elif config.method.auxiliary:
        file = read_space(config.space)
        if file.domain != TEXT:
            raise UserError(
                f"space: {config.space} holds objectives on {file.domain}; {config.data.task} is a task of text"
            )
    else:
        return None
    missing = {data for block in file.blocks for data in block.data} - _given_data(config, task)
    if missing:
        data = sorted(missing)[0]
        named = f"space {config.space}" if config.method.auxiliary else f"method {config.method.name}"
        if data.replace("-", "_") in task.corpora:
            raise UserError(f"{named}: no {data} text is left, all of it is text of dev or test")
        raise UserError(f"{named}: no {data} text is given; {how_to_give(data)}")
    return file


def make_heads(
    config: RunConfig, task: EndTask, loaded: LoadedEncoder, space: Space | None, facts: TokenizerFacts
) -> dict[str, nn.Module]:
    """Return phi_E and the heads of the outputs, by name (docs/semantics.md, section 4)."""
    encoder = loaded.encoder
    classes, dropout = len(task.label_names), config.encoder.head_dropout
    settings: Any = encoder.body.config
    head = end_task_head(config.encoder.head, settings, encoder.pooling, classes, dropout)
    heads: dict[str, nn.Module] = {END_TASK_HEAD: head}
    per_objective = config.objectives.heads == "per_objective"
    wanted = space_heads(space, task, per_objective)
    fresh = loaded.mlm_head is None and any(kind.kind == "vocabulary" for kind in wanted.values())
    bias_V = log_unigrams(task, encoder.vocab_size, facts.special_ids) if fresh else None
    for name, kind in wanted.items():
        if kind.kind == "vocabulary":
            heads[name] = TokenHead(
                encoder.word_embeddings,
                encoder.hidden_size,
                bias_V=bias_V,
                start=loaded.mlm_head,
                untied=per_objective,
                std=encoder.initializer_range,
            )
        else:
            assert kind.size is not None
            heads[name] = ClassificationHead(encoder.hidden_size, kind.size, dropout)
    return heads


def make_source(
    config: RunConfig,
    task: EndTask,
    encoder: Encoder,
    space: Space | None,
    facts: TokenizerFacts,
    table_deviation: float,
) -> BatchSource:
    """Return the source of every step's batch; `table_deviation` of the embeddings is the unit of their noise."""
    vocabulary = Vocabulary(facts.vocab_size, facts.mask, facts.special_ids)
    noise = Noise(encoder.word_embeddings.embedding_dim, config.objectives.noise_scale * table_deviation)
    output = OutputSettings(config.objectives.mask_rate, config.objectives.labels, encoder.pooling, noise)
    return BatchSource(task, space, sampled_count(config, space), vocabulary, output, source_settings(config))


def log_unigrams(task: EndTask, vocabulary: int, special: Sequence[int]) -> Tensor:
    """Return the log of each token's relative frequency in train and unlabelled texts, with add-one smoothing, [V]."""
    counts = np.ones(vocabulary)
    for tokens in (task.train.tokens, *task.corpora.values()):
        counts += np.bincount(tokens.values[tokens.offsets[0] : tokens.offsets[-1]], minlength=vocabulary)[:vocabulary]
    counts[list(special)] = 1.0  # special tokens are never labels
    return torch.from_numpy(np.log(counts / counts.sum())).float()


def count_texts(config: RunConfig) -> int:
    """Return the number of train and in-domain texts."""
    task = load_end_task(config.data, config.encoder)
    return len(task.train) + len(task.corpora.get("in_domain", ()))


DOMAIN = DomainKind(
    build=build_text_run,
    check=lambda config: None,  # every setting applies to text
    encoder_fingerprint=lambda config: encoder_fingerprint(locate_encoder(config.data, config.encoder)),
    examples=count_texts,
    exports=True,
)
