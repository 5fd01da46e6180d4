"""The configuration of one run, and the hash that names it everywhere."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, PositiveInt, field_validator, model_validator

from aang_ray.config.methods import AangConfig, MethodConfig
from aang_ray.config.sections import (
    BatchConfig,
    DataConfig,
    EncoderConfig,
    FinalFinetuneConfig,
    Fingerprints,
    GradientsConfig,
    ObjectivesConfig,
    OptimConfig,
    ResourcesConfig,
    ScheduleConfig,
    Section,
)

# --- config.row_name: What a run is called in a table.


PAPER_ROWS = {
    ("aang", "gpt"): "gpt-style",
    ("aang", "xlnet"): "xlnet-style",
    ("aang", "bert"): "bert-style",
    ("aang", "tapt_dapt"): "meta-tartan-tapt_dapt",
}
"""By method and space, what AANG with one kind of objective is called (Dery et al. 2023, Table 2 and Figure 3)."""


def row_name(config: RunConfig) -> str:
    """`aang-td n=6`, with `+finetune` for a final stage and the `published` switches that are on.

    All switches that the method has: `aang-td (published) n=6`; some: `aang-td (published: labels, legality) n=6`.
    """
    method = config.method
    name: str = method.name
    if method.auxiliary:
        space = config.space.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
        name = PAPER_ROWS.get((method.name, space), f"{method.name}-{space}")
    if config.final_finetune is not None:
        name += "+finetune"
    switches = dict(published_switches(config))
    chosen = sorted(switch for switch, on in switches.items() if on)
    if chosen:
        name += " (published)" if len(chosen) == len(switches) else f" (published: {', '.join(chosen)})"
    return f"{name} n={config.n}" if method.auxiliary else name


def published_switches(config: RunConfig) -> Iterator[tuple[str, bool]]:
    """Every setting of the run's method that can be `published`, and whether it is."""
    sections: list[Section] = [config.optim, config.method]
    if config.method.auxiliary:
        sections.append(config.objectives)
        yield "heads", config.objectives.heads == "per_objective"  # one untied copy for each, as published
    for section in sections:
        for name, field in type(section).model_fields.items():
            if "published" in get_args(field.annotation):
                yield name, getattr(section, name) == "published"


ADDED: Mapping[str, tuple[str, ...]] = {
    "data": ("neural_lm", "neural_lm_passages", "external"),
    "objectives": ("noise_scale",),
    "optim": ("algorithm", "momentum"),
}
"""Settings by section that are younger than stored results: at their defaults they are no part of a run's name."""


class RunConfig(Section):
    """One run as a value."""

    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    method: MethodConfig = AangConfig()
    space: str = "td"
    """A file of `search_spaces/` by name, or a path to one."""
    n: PositiveInt | Literal["all"] = 6
    """Objectives sampled at a step."""
    objectives: ObjectivesConfig = ObjectivesConfig()
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    gradients: GradientsConfig = GradientsConfig()
    precision: Literal["auto", "fp32", "medium", "bf16"] = "auto"
    """`auto`: bf16 where the device has it, else fp32; `medium`: fp32 with reduced-precision matrix products."""
    final_finetune: FinalFinetuneConfig | None = None
    """Fine-tuning on the end task alone at the end; null: none."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    label: Annotated[str | None, Field(min_length=1, exclude_if=lambda label: label is None)] = None
    """Name of the row in a table, in place of the one made from the settings; it does not change the result."""
    resources: ResourcesConfig = ResourcesConfig()
    fingerprints: Fingerprints = Fingerprints()
    """Filled in when the run is planned; not meant to be set by hand."""

    @model_validator(mode="after")
    def _derivable(self) -> Self:
        """The softmax Jacobian is that of weights that sum to one; published clipping is of the terms of a sum."""
        softmax = isinstance(self.method, AangConfig) and self.method.jacobian == "softmax"
        if softmax and self.objectives.allocation == "published":
            raise ValueError("method.jacobian: softmax does not go with objectives.allocation: published; use identity")
        if self.method.own_direction and self.optim.clipping == "published":
            raise ValueError(
                "optim.clipping: published clips the terms of a weighted sum, and the update of "
                f"{self.method.name} is none; use sound"
            )
        return self

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: object) -> object:
        """`method: static` is short for `method: {name: static}`; settings without a name are AANG's."""
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" not in value:
            return {"name": "aang", **value}
        return value

    def identity(self) -> dict[str, Any]:
        """The part of the configuration that determines the result.

        Left out: the label, resources and the micro-batch (they change rounding, and which dropout masks are drawn),
        what is logged alone, names that a fingerprint of their content replaces, and, for a method without auxiliary
        objectives, everything that only auxiliary objectives use.
        """
        value = self.model_dump(mode="json")
        value.pop("label", None)
        defaults = type(self)().model_dump(mode="json")
        for section, names in ADDED.items():
            for name in names:
                if value[section][name] == defaults[section][name]:
                    del value[section][name]
        del value["resources"], value["batch"]["micro"], value["gradients"]["local_distances"]
        if self.final_finetune is None:
            del value["final_finetune"]
        prints = value["fingerprints"]
        if prints["data"]:
            for key in ("task", "in_domain", "out_of_domain", "neural_lm", "neural_lm_passages", "external"):
                value["data"].pop(key, None)
        if prints["encoder"]:
            del value["encoder"]["name"], value["encoder"]["revision"]
        if prints["space"]:
            del value["space"]
        if not self.method.auxiliary:
            for key in ("space", "n", "objectives", "gradients"):
                value.pop(key, None)
            del value["batch"]["auxiliary"], prints["space"]
        if not self.method.samples_dev:
            del value["batch"]["dev"], value["batch"]["dev_head"]
        return value

    @property
    def cell(self) -> str:
        """Name of the run everywhere: 16 hex digits of SHA-256 over `identity()`."""
        return _digest(self.identity())

    @property
    def group(self) -> str:
        """Name of the configuration without its seed: runs to average over share it."""
        value = self.identity()
        del value["seed"]
        return _digest(value)

    @property
    def task_name(self) -> str:
        """Short name of the end task: a card's, a folder's, a file's without its ending, or a data set's."""
        name = self.data.task.rstrip("/").rsplit("/", 1)[-1]
        return re.sub(r"\.(jsonl|csv|parquet)$", "", name)

    @property
    def row_name(self) -> str:
        """Name of the method's row in a table, for example `aang-td n=6`."""
        return self.label or row_name(self)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages at most."""
        final = self.final_finetune.steps if self.final_finetune is not None else 0
        return self.method.pretraining_steps + (self.schedule.steps or 0) + final


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
