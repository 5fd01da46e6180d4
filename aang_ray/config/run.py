"""The configuration of one run, its name (a hash), and the name of its row in a table."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PositiveInt, field_validator, model_validator

from aang_ray.config.methods import AangConfig, FinetuneConfig, MethodConfig, RoundsSection, StaticConfig
from aang_ray.config.sections import (
    STORED,
    BatchConfig,
    DataConfig,
    EncoderConfig,
    FinalFinetuneConfig,
    Fingerprints,
    GradientsConfig,
    Neutral,
    NotInName,
    ObjectivesConfig,
    OptimConfig,
    ResourcesConfig,
    ScheduleConfig,
    Section,
)


class RunConfig(Section):
    """Everything that determines one run, as an immutable value."""

    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    method: MethodConfig = AangConfig()
    space: str = "td"
    """Name of a file in `search_spaces/`, or a path to a space file."""
    n: PositiveInt | Literal["all"] = 6
    """Number of objectives that are sampled at each step."""
    objectives: ObjectivesConfig = ObjectivesConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    gradients: GradientsConfig = GradientsConfig()
    precision: Literal["auto", "fp32", "medium", "bf16"] = "auto"
    """`auto`: bf16 if the device supports it, else fp32; `medium`: fp32 with reduced-precision matrix products."""
    final_finetune: Annotated[FinalFinetuneConfig | None, Neutral(None, stored=True)] = None
    """An additional last stage on the end task alone; null: none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    label: Annotated[str | None, NotInName(), Field(min_length=1, exclude_if=lambda label: label is None)] = None
    """Name of the row in a table; null: made from the settings. It does not change the result."""
    resources: Annotated[ResourcesConfig, NotInName()] = ResourcesConfig()
    fingerprints: Fingerprints = Fingerprints()
    """Filled in when the run is planned. Do not set it by hand."""

    @model_validator(mode="after")
    def _derivable(self) -> Self:
        """Refuse settings that contradict each other."""
        softmax = isinstance(self.method, AangConfig) and self.method.jacobian == "softmax"
        if softmax and self.objectives.allocation == "published":
            raise ValueError("method.jacobian: softmax does not go with objectives.allocation: published; use identity")
        if self.method.own_direction and self.optim.clipping == "published":
            raise ValueError(
                "optim.clipping: published clips each term of a weighted sum, but "
                f"the update of {self.method.name} is not a weighted sum; use sound"
            )
        if self.optim.head_warmup_steps and isinstance(self.method, RoundsSection):
            raise ValueError(f"optim.head_warmup_steps does not go with {self.method.name}, which trains in rounds")
        return self

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: object) -> object:
        """Read `method: static` as `method: {name: static}`, and settings without a name as settings of AANG."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" not in value:
            return {"name": "aang", **value}
        return value

    @classmethod
    def stored(cls, settings: Mapping[str, Any]) -> Self:
        """Return the configuration that a store holds, perhaps written by an earlier version.

        Raises:
            pydantic.ValidationError: It is not valid in this version.
        """
        return cls.model_validate(settings, context=STORED)

    def identity(self) -> dict[str, Any]:
        """Return the part of the configuration that determines the result, as JSON values.

        It omits what `Section.named_settings` omits, names whose content has a fingerprint, and settings that the
        method does not use.
        """
        value = self.named_settings()
        prints = value["fingerprints"]
        if prints["data"]:
            for key in (
                "task",
                "in_domain",
                "out_of_domain",
                "neural_lm",
                "neural_lm_passages",
                "external",
                *_RETRIEVAL,
            ):
                value["data"].pop(key, None)
        if prints["encoder"]:
            del value["encoder"]["name"], value["encoder"]["revision"]
        if prints["space"]:
            del value["space"]
        if not self.method.auxiliary:
            for key in ("space", "n", "objectives", "gradients"):
                value.pop(key, None)
            del prints["space"]
            if not self._has_tied_compute:
                del value["batch"]["auxiliary"]
        if not self.method.samples_dev:
            del value["batch"]["dev"], value["batch"]["dev_head"]
        return value

    @property
    def cell(self) -> str:
        """The name of the run: 16 hex digits of the SHA-256 of `identity()`."""
        return _digest(self.identity())

    @property
    def group(self) -> str:
        """The name of the configuration without its seed."""
        value = self.identity()
        del value["seed"]
        return _digest(value)

    @property
    def task_name(self) -> str:
        """Short name of the end task: the name of a card, a folder, a file without its ending, or a data set."""
        name = self.data.task.rstrip("/").rsplit("/", 1)[-1]
        return re.sub(r"\.(jsonl|csv|parquet)$", "", name)

    @property
    def row_name(self) -> str:
        """The name of the row in a table, for example `aang-td n=6`."""
        return self.label or _row_name(self)

    @property
    def total_steps(self) -> int:
        """The maximum number of optimiser steps over all stages. Early stopping may end a run earlier."""
        final = self.final_finetune.steps if self.final_finetune is not None else 0
        return self.method.pretraining_steps + self.train_steps + final

    @property
    def train_steps(self) -> int:
        """The maximum number of optimiser steps of the stage `train`."""
        steps, end_task = self.schedule.steps or 0, self.batch.end_task or 1
        if not self._has_tied_compute:
            return steps
        return math.ceil(steps * (end_task + (self.batch.auxiliary or 0)) / end_task)

    @property
    def _has_tied_compute(self) -> bool:
        return isinstance(self.method, FinetuneConfig) and self.method.tied_compute


_RETRIEVAL = ("retrieve_from", "retrieve_k")
"""Settings of the data that its fingerprint covers by their content."""
PAPER_ROWS = {
    ("aang", "gpt"): "gpt-style",
    ("aang", "xlnet"): "xlnet-style",
    ("aang", "bert"): "bert-style",
    ("aang", "tapt_dapt"): "meta-tartan-tapt_dapt",
}
"""Row names that the paper uses for AANG on some spaces, by method and space (Dery et al. 2023, Table 2, Figure 3)."""


def _row_name(config: RunConfig) -> str:
    """Return for example `aang-td n=6`, `aang-td (published) n=6`, or `aang-td (published: labels, legality) n=6`."""
    method = config.method
    name: str = method.name
    if method.auxiliary:
        space = config.space.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
        name = PAPER_ROWS.get((method.name, space), f"{method.name}-{space}")
    if isinstance(method, FinetuneConfig) and method.tied_compute:
        name += "-tied"
    if isinstance(method, StaticConfig) and method.weights is not None:
        name += "+weights"
    if config.final_finetune is not None:
        name += "+finetune"
    switches = dict(published_switches(config))
    chosen = sorted(switch for switch, on in switches.items() if on)
    if chosen:
        name += " (published)" if len(chosen) == len(switches) else f" (published: {', '.join(chosen)})"
    return f"{name} n={config.n}" if method.auxiliary else name


def published_switches(config: RunConfig) -> Iterator[tuple[str, bool]]:
    """Yield the name of every setting that can be `published` for the run's method, and whether it is."""
    sections: list[Section] = [config.optim, config.method]
    if config.method.auxiliary:
        sections.append(config.objectives)
        yield "heads", config.objectives.heads == "per_objective"  # the research code has one untied head for each
    for section in sections:
        for name, field in type(section).model_fields.items():
            if "published" in get_args(field.annotation):
                yield name, getattr(section, name) == "published"


def _digest(value: dict[str, Any]) -> str:
    """Return the first 16 hex digits of the SHA-256 of a JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
