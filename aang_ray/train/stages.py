"""The stages of a run: masked-LM pretraining, training, a last fine-tuning. Most runs have one.

| stage | trains on | decided by |
|---|---|---|
| `dapt`, `tapt` | masked LM on in-domain or task text | its last step: no label is seen |
| `train` | what the method says | dev |
| `finetune` | the end task alone, from the model that `train` kept | dev, among its own models |

Every stage has an optimiser and a schedule of its own. (semantics section 4; Dery et al. 2023, section 6)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from aang_ray.config.methods import DaptConfig, FinetuneConfig, PretrainSection, TaptConfig
from aang_ray.config.run import RunConfig
from aang_ray.config.sections import FinalFinetuneConfig, ObjectivesConfig
from aang_ray.methods.registry import make_method
from aang_ray.train.setup import Setup


@dataclass(frozen=True)
class Stage:
    """A part of a run."""

    name: str
    config: RunConfig
    """What its steps are made from; the run itself keeps the whole configuration."""
    decides: bool
    """Whether dev is scored and decides which of the stage's models is kept."""


def stages_of(config: RunConfig) -> tuple[Stage, ...]:
    """The stages of a resolved configuration, in order."""
    method = config.method
    stages: list[Stage] = []
    if isinstance(method, PretrainSection):
        stages.extend(_pretraining(config, method))
        config = config.model_copy(update={"method": FinetuneConfig()})
    stages.append(Stage("train", config, decides=True))
    if config.final_finetune is not None:
        stages.append(Stage("finetune", _final(config, config.final_finetune), decides=True))
    return tuple(stages)


def staged(setup: Setup, config: RunConfig) -> Setup:
    """The same task, body and heads under the configuration of a stage."""
    if config == setup.config:
        return setup
    space, domain = setup.stage(config)
    method = make_method(config, space, setup.compute.device)
    return replace(setup, config=config, space=space, domain=domain, method=method)


def _pretraining(config: RunConfig, method: PretrainSection) -> Iterator[Stage]:
    shared = {name: getattr(method, name) for name in PretrainSection.model_fields}
    for text in method.texts:
        steps = method.steps_of(text)
        single = (
            DaptConfig(**shared, dapt_steps=steps) if text == "in-domain" else TaptConfig(**shared, tapt_steps=steps)
        )
        changed = {
            "method": single,
            "batch": _changed(config.batch, auxiliary=method.batch),
            "optim": _changed(config.optim, body_lr=method.lr, head_lr=method.head_lr or method.lr),
            "schedule": _changed(config.schedule, steps=steps),
            "objectives": ObjectivesConfig(mask_rate=method.mask_rate),
        }
        yield Stage(single.name, config.model_copy(update=changed), decides=False)


def _final(config: RunConfig, final: FinalFinetuneConfig) -> RunConfig:
    changed = {
        "method": FinetuneConfig(),
        "optim": _changed(config.optim, body_lr=final.body_lr, head_lr=final.head_lr or config.optim.head_lr),
        "schedule": _changed(config.schedule, steps=final.steps, patience=final.patience or config.schedule.patience),
    }
    return config.model_copy(update=changed)


def _changed(section: Any, **values: Any) -> Any:
    return section.model_copy(update=values)
