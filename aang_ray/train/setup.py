"""The parts of a run, and its stages (docs/semantics.md, section 4).

| stage | trains on | resulting model |
|---|---|---|
| `dapt`, `tapt` | masked LM on in-domain or task text | the last model, because no labels are used |
| `pooled` | the labels of all other sets | the last model |
| `search` | the end task and one objective, again for each trial of `halving` | none: the next stage starts afresh |
| `train` | the method's objectives | the best model on dev |
| `finetune` | the end task alone, from the result of `train` | the best model on dev in this stage |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from aang_ray.config.methods import (
    DaptConfig,
    FinetuneConfig,
    PooledConfig,
    PretrainSection,
    StagesSection,
    TaptConfig,
)
from aang_ray.config.run import RunConfig
from aang_ray.config.sections import ObjectivesConfig
from aang_ray.data.tasks import LabelledSplit, Task
from aang_ray.errors import UserError
from aang_ray.methods.base import Method
from aang_ray.methods.registry import make_method
from aang_ray.train.device import Compute
from aang_ray.train.domain import DomainParts, DomainPiece, domain_of
from aang_ray.train.halving import Search
from aang_ray.train.workers.group import Workers


@dataclass
class Setup(DomainParts):
    """The parts of one run, or of one of its stages."""

    config: RunConfig
    compute: Compute
    heads: nn.ModuleDict
    """The heads of `head_of`, named by number: module names must not contain dots, but head names may."""
    method: Method
    workers: Workers

    @property
    def classes(self) -> int:
        """Number of classes of the end task."""
        return len(self.task.label_names)

    def class_weights(self) -> Tensor | None:
        """Return the weight of each class in the end-task loss, [C], on the device; None for equal weights."""
        weights = self.task.class_weights
        return None if weights is None else torch.from_numpy(weights).to(self.compute.device)

    def pinned(self, piece: DomainPiece) -> DomainPiece:
        """Return the piece in pinned memory on a GPU, for asynchronous copies; the piece itself on a CPU."""
        return piece.pin() if self.compute.device.type == "cuda" else piece


def build(config: RunConfig, compute: Compute, workers: Workers | None = None) -> Setup:
    """Load the task and the encoder, and make heads and method.

    Raises:
        UserError: For data, an encoder or a space that the run cannot use.
    """
    torch.manual_seed(config.seed)
    parts = domain_of(config.data).build(config, compute.device)
    heads = nn.ModuleDict({str(i): head for i, head in enumerate(parts.head_of.values())}).to(compute.device)
    method = make_method(config, parts.space, compute.device)
    check_dev(config, parts.task)
    made: dict[str, Any] = {"config": config, "compute": compute, "heads": heads, "method": method}
    return Setup(**vars(parts), **made, workers=workers or Workers())


def check_dev(config: RunConfig, task: Task[Any]) -> None:
    """Refuse a dev split that is too small for the method; a `UserError` if it is."""
    if config.method.uses_dev and len(task.dev) < 2:
        raise UserError(f"{task.name}: dev has {len(task.dev)} example; dev head and dev gradient need one each")


def majority_class(task: Task[LabelledSplit]) -> int:
    """Return the most frequent class of train; the smallest index in a tie."""
    counts = Counter(int(label) for label in task.train.labels)
    return min(counts, key=lambda label: (-counts[label], label))


@dataclass(frozen=True)
class Stage:
    """A part of a run."""

    name: str
    """`dapt`, `tapt`, `pooled`, `search`, `train` or `finetune`; the name in the history."""
    config: RunConfig
    """The configuration of this stage, derived from that of the run."""
    decides: bool
    """Whether dev is scored and the best model on dev is kept."""


def stages_of(config: RunConfig, search: Search | None = None) -> tuple[Stage, ...]:
    """Return the stages of a resolved configuration, in order.

    Args:
        config: The configuration of the run.
        search: The search of a run that has one. While it runs, its stage is that of the next trial.
    """
    stages: list[Stage] = []
    if search is not None:
        trial = config if search.over else search.stage_config(config)
        stages.append(Stage("search", trial, decides=False))
        config = search.result_config(config)
    if isinstance(config.method, StagesSection):
        stages.extend(_stages_before(config, config.method))
        config = config.changed(method=FinetuneConfig())
    elif config.train_steps != (config.schedule.steps or 0):  # tied compute
        config = config.changed(method=FinetuneConfig(), schedule=config.schedule.changed(steps=config.train_steps))
    stages.append(Stage("train", config, decides=True))
    final = config.final_finetune
    if final is not None:
        rates = {"body_lr": final.body_lr, "head_lr": final.head_lr or config.optim.head_lr}
        optim = config.optim.changed(**rates, head_warmup_steps=0)  # the head is trained
        patience = final.patience or config.schedule.patience
        schedule = config.schedule.changed(steps=final.steps, patience=patience, until="steps")
        config = config.changed(method=FinetuneConfig(), optim=optim, schedule=schedule)
        stages.append(Stage("finetune", config, decides=True))
    return tuple(stages)


def setup_of_stage(setup: Setup, config: RunConfig) -> Setup:
    """Return a set-up for a stage: the same task, body and heads; space, batches and method of its `config`."""
    if config == setup.config:
        return setup
    space, domain = setup.stage(config)
    method = make_method(config, space, setup.compute.device)
    return replace(setup, config=config, space=space, domain=domain, method=method)


def _stages_before(config: RunConfig, method: StagesSection) -> Iterator[Stage]:
    """Yield the stages before fine-tuning, each with a method of this stage alone."""
    for text in method.texts:
        steps = method.steps_of(text)
        single, optim, objectives = method, config.optim, ObjectivesConfig()
        if isinstance(method, PretrainSection):
            shared = {name: getattr(method, name) for name in PretrainSection.model_fields}
            tapt = text == "end-task"
            single = TaptConfig(**shared, tapt_steps=steps) if tapt else DaptConfig(**shared, dapt_steps=steps)
            # The masked-LM head usually comes with the checkpoint: then nothing would be trained in its warm-up.
            optim = optim.changed(body_lr=method.lr, head_lr=method.head_lr or method.lr, head_warmup_steps=0)
            objectives = ObjectivesConfig(mask_rate=method.mask_rate)
        elif isinstance(method, PooledConfig):
            optim = optim.changed(body_lr=method.lr, head_lr=method.head_lr or optim.head_lr)
        stage = config.changed(
            method=single,
            batch=config.batch.changed(auxiliary=method.batch),
            optim=optim,
            schedule=config.schedule.changed(steps=steps, until="steps"),
            objectives=objectives,
        )
        yield Stage(single.named_settings()["name"], stage, decides=False)
