"""The configuration of one run, and the hash that names it everywhere.

Every section stands for one part of the program. Defaults are those of the AANG paper (Tables 4-7)
where it states them; `published` switches select what the released research code did where that
differs from the sound reading.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from aang_ray.config.final_finetune import FinalFinetuneConfig
from aang_ray.config.methods import AangConfig, MethodConfig
from aang_ray.config.row_name import row_name
from aang_ray.config.section import Fraction, HalfOpen, OpenFraction, Section, Semantics


class DataConfig(Section):
    """The end task and its texts."""

    task: str = "movie"
    """A built-in card, a folder with train/dev/test, one labelled file, or a Hugging Face dataset id."""
    text: str = "text"
    """Column of the text."""
    text_b: str | None = None
    """Column of the second text of a pair, where there is one."""
    label: str = "label"
    """Column of the label."""
    metric: Literal["accuracy", "macro_f1"] | None = None
    """Metric that dev decides by; null takes the card's, or accuracy."""
    train_size: PositiveInt | None = None
    """Keep this many train examples, stratified and nested; the rest becomes in-domain text."""
    max_tokens: PositiveInt | None = None
    """Longest text in tokens, special tokens included; null takes the encoder's limit."""
    in_domain: str | None = None
    """File of unlabelled in-domain text: one passage a line, or the column `text` of a table."""
    out_of_domain: str | None = None
    """File of unlabelled out-of-domain text."""
    neural_lm: str | None = None
    """Causal language model that writes neural-LM text: a Hub name, a folder, or `trained`: a small one made here."""
    neural_lm_passages: PositiveInt = 2000
    """How many passages it writes."""
    external: tuple[str, ...] = ()
    """Other end tasks (as in `task`) whose labels serve as auxiliary objectives, data `external:NAME`."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weights class c by N / (C * N_c) in the end-task loss."""
    split_seed: int = 0
    """Seed of the splits made from one labelled file and of `train_size`."""
    dev_fraction: OpenFraction = 0.15
    """Share of one labelled file that becomes dev."""
    test_fraction: OpenFraction = 0.25
    """Share of one labelled file that becomes test."""


class EncoderConfig(Section):
    """The shared body."""

    name: str = "roberta-base"
    """Hugging Face Hub name, a folder, or `package:NAME` for an encoder shipped in a Python package."""
    revision: str | None = None
    """Revision on the Hub."""
    layers: PositiveInt | None = None
    """Keep the first k layers; null keeps all."""
    pooling: Literal["auto", "first", "mean"] = "auto"
    """How a text's vector is read; `auto`: what the checkpoint was trained with."""
    dropout: Fraction | None = None
    """Dropout of the body; null keeps the checkpoint's own."""
    head_dropout: Fraction = 0.3
    """Dropout of the end-task head."""


class ObjectivesConfig(Section):
    """How sampled objectives become examples, inputs, labels and losses."""

    legality: Semantics = "sound"
    """`published` admits copying an uncorrupted, fully visible input."""
    allocation: Literal["equal", "published"] = "equal"
    """`equal`: floor(B/n) examples each; `published`: batch sizes follow the factors."""
    visibility: Semantics = "sound"
    """`published`: bidirectional attends to padding, random-factorized is one Bernoulli(0.6) matrix."""
    labels: Semantics = "sound"
    """`published`: no-op labels 15 % of the positions with their own, unchanged token."""
    heads: Literal["shared", "per_objective"] = "shared"
    """`per_objective`: one untied copy of the decoder for every objective, as published."""
    mask_rate: OpenFraction = 0.15
    """Share of the real tokens that is selected."""
    noise_scale: PositiveFloat = 1.0
    """Deviation of the noise of noised embeddings, relative to that of the table of embeddings at the start."""


class BatchConfig(Section):
    """How many examples of each kind a step sees."""

    end_task: PositiveInt | None = None
    """End-task examples a step; null takes the card's, or 128."""
    auxiliary: PositiveInt | None = None
    """Auxiliary examples a step over all sampled objectives; null takes the card's, or 256."""
    dev: PositiveInt = 32
    """Examples of the dev gradient."""
    dev_head: PositiveInt | None = None
    """Examples that the dev head is fitted on; null takes the card's, or 32."""
    micro: PositiveInt | Literal["auto"] = "auto"
    """Most texts in one forward pass; accumulation does not change the result."""


class OptimConfig(Section):
    """The optimiser of body and heads."""

    algorithm: Literal["adamw", "sgd"] = "adamw"
    """`sgd` takes `momentum`, and no `betas` and `eps`; its weight decay is added to the gradient."""
    momentum: HalfOpen = 0.9
    """Of `sgd`."""
    body_lr: PositiveFloat = 1e-4
    head_lr: PositiveFloat = 1e-3
    body_weight_decay: NonNegativeFloat = 0.01
    head_weight_decay: NonNegativeFloat = 0.1
    betas: tuple[HalfOpen, HalfOpen] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    clip: PositiveFloat = 1.0
    """Largest norm of the body's update direction, and of each head's gradient."""
    clipping: Semantics = "sound"
    """`published`: each objective's body gradient at 10 first, and all heads jointly."""


class ScheduleConfig(Section):
    """How long, in optimiser steps; linear warm-up, then linear decay to 0."""

    steps: PositiveInt | None = None
    """Optimiser steps; null: `epochs` over the task and domain texts at the auxiliary batch size."""
    epochs: PositiveInt = 150
    warmup_fraction: Fraction = 0.06
    warmup_cap: PositiveInt = 700
    """Warm-up lasts min(warmup_fraction * steps, warmup_cap) steps."""
    eval_every: PositiveInt = 30
    patience: PositiveInt = 20
    """Evaluations without improvement on dev after which the run stops."""


class GradientsConfig(Section):
    """How the gradients of the objectives are computed."""

    engine: Literal["segments", "loop"] = "segments"
    """One pass for all, or a loop of backward passes (the reference)."""
    tied_in_scores: bool = False
    """Count the decoder's part of a tied table in scores and norms, too."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    local_distances: bool = False
    """Log each objective's distance to the end task, ||g_k - g_E||^2, at every evaluation; training stays the same."""


class ResourcesConfig(Section):
    """Where a run runs. Nothing here changes its result beyond rounding, so the hash leaves it out."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    """CPU threads of a run; null: the machine's cores divided by the trials at once."""
    cpus: PositiveFloat = 1.0
    """CPUs that a trial reserves."""
    gpus: NonNegativeFloat = 0.0
    """GPUs that a trial reserves; fractions share one."""
    workers: PositiveInt = 1
    """Processes that share a run: each computes the gradients of its own objectives."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs of each worker, where there are several."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs of each worker, where there are several."""
    optimizer_state: Literal["replicated", "sharded"] = "replicated"
    """`sharded`: each worker keeps its share of the optimiser's moments alone (ZeRO-1), and sends what it updated."""
    checkpoint_minutes: NonNegativeFloat = 5.0
    """Minutes between two checkpoints of a run; 0: after every step."""


ADDED: Mapping[str, tuple[str, ...]] = {
    "data": ("neural_lm", "neural_lm_passages", "external"),
    "objectives": ("noise_scale",),
    "optim": ("algorithm", "momentum"),
}
"""Settings by section that are younger than stored results: at their defaults they are no part of a run's name."""


class Fingerprints(Section):
    """Hashes of what the names in a configuration stood for when the run was planned."""

    data: str = ""
    encoder: str = ""
    space: str = ""


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

        Left out: resources and the micro-batch (they change rounding, and which dropout masks are drawn), what
        is logged alone, names that a fingerprint of their content replaces, and, for a method without auxiliary
        objectives, everything that only auxiliary objectives use.
        """
        value = self.model_dump(mode="json")
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
        return row_name(self)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages at most."""
        final = self.final_finetune.steps if self.final_finetune is not None else 0
        return self.method.pretraining_steps + (self.schedule.steps or 0) + final


def _digest(value: dict[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
