"""Everything that a run computes with, built from its configuration."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from aang_ray.config.methods import AangConfig
from aang_ray.config.run import RunConfig
from aang_ray.data import load_end_task, load_tokenizer, locate, tokenizer_facts
from aang_ray.data.task import EndTask
from aang_ray.data.tokenizer import TokenizerFacts
from aang_ray.errors import UserError
from aang_ray.methods.base import Method
from aang_ray.methods.registry import make_method
from aang_ray.model.encoder import Encoder
from aang_ray.model.heads import ClassificationHead, TokenHead
from aang_ray.model.loading import LoadedEncoder, load_encoder
from aang_ray.objectives.legality import Capabilities, ruled_out
from aang_ray.objectives.outputs import OutputSettings
from aang_ray.objectives.source import END_TASK_HEAD, BatchSource, SourceSettings, head_names
from aang_ray.objectives.space import Space, enumerate_space, read_space
from aang_ray.objectives.transforms import Vocabulary
from aang_ray.train.domain import Domain
from aang_ray.train.precision import Compute
from aang_ray.train.text import TextDomain

logger = logging.getLogger(__name__)


@dataclass
class Setup:
    """The parts of one run."""

    config: RunConfig
    compute: Compute
    task: EndTask
    facts: TokenizerFacts
    encoder: Encoder
    heads: nn.ModuleDict
    """Heads by number; `head_of` finds them by name (module names admit no dots or slashes)."""
    head_of: dict[str, nn.Module]
    space: Space | None
    source: BatchSource
    domain: Domain
    method: Method

    @property
    def classes(self) -> int:
        return len(self.task.label_names)


def build(config: RunConfig, compute: Compute) -> Setup:
    """Load the task and the encoder (which refuses one that disobeys its visibility), make heads and method.

    Raises:
        UserError: for data, an encoder or a space that will not do.
    """
    torch.manual_seed(config.seed)
    located = locate(config.encoder)
    facts = tokenizer_facts(located, load_tokenizer(located))
    task = load_end_task(config.data, config.encoder)
    loaded = load_encoder(config.encoder, located)
    encoder = loaded.encoder
    if config.gradients.checkpointing:
        encoder.enable_checkpointing()
    encoder.to(compute.device)
    space = make_space(config, task, encoder) if config.method.auxiliary else None
    head_of = make_heads(config, task, loaded, space, facts)
    heads = nn.ModuleDict({str(number): head for number, head in enumerate(head_of.values())}).to(compute.device)
    source = make_source(config, task, encoder, space, facts)
    domain = TextDomain(task, encoder, source, facts.pad, config.seed, config.objectives.visibility == "published")
    method = make_method(config, space, compute.device)
    if method.uses_dev and len(task.dev) < 2:
        raise UserError(f"{task.name}: dev has {len(task.dev)} text; the dev head and the dev gradient need one each")
    return Setup(config, compute, task, facts, encoder, heads, head_of, space, source, domain, method)


def make_space(config: RunConfig, task: EndTask, encoder: Encoder) -> Space:
    """The legal objectives that this task and encoder can compute; what is left out is logged with its reason.

    Raises:
        UserError: if nothing is left, the space names data that are not there, or n exceeds its size.
    """
    settings = config.objectives
    capabilities = Capabilities(
        positions_given=encoder.positions_given,
        corpora=frozenset(name.replace("_", "-") for name, texts in task.corpora.items() if len(texts)),
        queries=settings.visibility == "sound",
    )
    file = read_space(config.space)
    missing = {data for block in file.blocks for data in block.data} - {"end-task", *capabilities.corpora}
    if missing:
        data = sorted(missing)[0]
        raise UserError(f"space {config.space}: no {data} text is given; set data.{data.replace('-', '_')} to a file")
    space = enumerate_space(config.space, file, settings.legality, settings.labels, capabilities)
    for objective, reason in space.ruled_out.items():
        if ruled_out(objective, settings.legality) is None:
            logger.warning("%s is left out: %s", objective.title(task.name), reason)
    if config.n != "all" and config.n > len(space):
        raise UserError(
            f"n: {config.n} exceeds the {len(space)} objectives of space {config.space}; use at most that, or all"
        )
    return space


def make_heads(
    config: RunConfig, task: EndTask, loaded: LoadedEncoder, space: Space | None, facts: TokenizerFacts
) -> dict[str, nn.Module]:
    """phi_E and the heads of the outputs, by name (semantics section 4)."""
    encoder = loaded.encoder
    classes, dropout = len(task.label_names), config.encoder.head_dropout
    heads: dict[str, nn.Module] = {END_TASK_HEAD: ClassificationHead(encoder.hidden_size, classes, dropout)}
    names = head_names(space, config.objectives.heads == "per_objective")
    bias_V = (
        log_unigrams(task, encoder.vocab_size, facts.special_ids)
        if names["token"] and loaded.mlm_head is None
        else None
    )
    for name in names["token"]:
        heads[name] = TokenHead(
            encoder.word_embeddings,
            encoder.hidden_size,
            bias_V=bias_V,
            start=loaded.mlm_head,
            untied=config.objectives.heads == "per_objective",
            std=encoder.initializer_range,
        )
    for name in names["label"]:
        heads[name] = ClassificationHead(encoder.hidden_size, classes, dropout)
    return heads


def make_source(
    config: RunConfig, task: EndTask, encoder: Encoder, space: Space | None, facts: TokenizerFacts
) -> BatchSource:
    """The source of every step's batch."""
    meta = config.method if isinstance(config.method, AangConfig) else AangConfig()
    batch = config.batch
    if batch.end_task is None or batch.auxiliary is None or batch.dev_head is None:
        raise ValueError("the configuration must be resolved first")
    settings = SourceSettings(
        end_task=batch.end_task,
        auxiliary=batch.auxiliary,
        dev=batch.dev,
        dev_head=0 if meta.dev_head == "live" else batch.dev_head,
        seed=config.seed,
        per_objective_heads=config.objectives.heads == "per_objective",
        head_from_train=meta.dev_sample == "published",
        head_refit_every=meta.head_refit_every,
        meta_dev_fraction=meta.meta_dev_fraction,
        published_allocation=config.objectives.allocation == "published",
    )
    vocabulary = Vocabulary(facts.vocab_size, facts.mask, facts.special_ids)
    output = OutputSettings(config.objectives.mask_rate, config.objectives.labels, encoder.pooling)
    n = 0 if space is None else len(space) if config.n == "all" else config.n
    return BatchSource(task, space, n, vocabulary, output, settings)


def log_unigrams(task: EndTask, vocabulary: int, special: Sequence[int]) -> Tensor:
    """log of each token's relative frequency in the train and unlabelled texts, add-one smoothed, [V]."""
    counts = np.ones(vocabulary)
    for tokens in (task.train.tokens, *task.corpora.values()):
        counts += np.bincount(tokens.values[tokens.offsets[0] : tokens.offsets[-1]], minlength=vocabulary)[:vocabulary]
    counts[list(special)] = 1.0  # never labels
    return torch.from_numpy(np.log(counts / counts.sum())).float()


def majority_class(task: EndTask) -> int:
    """The most frequent class of train; of ties the first."""
    counts = Counter(int(label) for label in task.train.labels)
    return min(counts, key=lambda label: (-counts[label], label))
