"""The sections of a run's configuration. Each section configures one part of the program.

Defaults are those of the AANG paper (Tables 4-7) where the paper states them. The `published` switches select what the
research code of the paper did where that differs from the sound reading (docs/semantics.md).

Two marks in a field's type say how the field enters the name (hash) of a run, see `Section.named_settings`. A setting that
is added after release 0.1 needs one of them: then runs that were stored before keep their names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

Semantics = Literal["sound", "published"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
HalfOpen = Annotated[float, Field(ge=0.0, lt=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]


@dataclass(frozen=True)
class Neutral:
    """Marks a setting that did not always exist: with `value`, a run is what it was before the setting existed.

    The name of a run leaves the setting out where it has this value. So `value` never changes. If the default of the
    setting changes later, the runs that rely on the new default get new names.
    """

    value: Any


@dataclass(frozen=True)
class NotInName:
    """Marks a setting that cannot change a run's result beyond rounding. The name of a run leaves it out."""


class Section(BaseModel):
    """A frozen part of the configuration. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values_as_numbers(cls, values: object) -> object:
        """Refuse `true` for a number: Python counts it as 1, but a person who writes `steps: true` means something else."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise ValueError(f"{name} must be a number or a name, not {str(value).lower()}")
        return values

    def named_settings(self) -> dict[str, Any]:
        """Return the settings that enter the name of a run, as JSON values.

        Left out are settings marked `NotInName`, and settings that have the value of their mark `Neutral`.
        """
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Section):
                values[name] = value.named_settings()
            if any(_leaves_out(mark, value) for mark in field.metadata):
                values.pop(name, None)  # a label that is not set is not among them
        return values


def _leaves_out(mark: object, value: object) -> bool:
    """Return whether a mark of a field keeps this value of the field out of the run's name."""
    return isinstance(mark, NotInName) or (isinstance(mark, Neutral) and bool(mark.value == value))


class MethodSection(Section):
    """The settings of one method. The class attributes are properties of the method, not settings."""

    implementation: ClassVar[str]
    """`module:Class` of the method in `aang_ray.methods`; the module is imported when a run needs it."""
    auxiliary: ClassVar[bool] = True
    """Whether the method trains on a space of auxiliary objectives."""
    samples_dev: ClassVar[bool] = False
    """Whether `batch.dev` and `batch.dev_head` can change the result."""
    own_direction: ClassVar[bool] = False
    """Whether the method makes the body's update itself, from the separate gradients."""
    logs_weights: ClassVar[bool] = True
    """Whether every sampled objective has one weight (methods without a space have none in any case)."""

    @property
    def uses_dev(self) -> bool:
        """Whether a step computes the dev head and the dev gradient."""
        return False

    @property
    def pretraining_steps(self) -> int:
        """Optimiser steps of the stages before the one that learns the end task."""
        return 0

    @property
    def pretraining_texts(self) -> int:
        """Number of texts that those steps put through the body."""
        return 0


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
    neural_lm: Annotated[str | None, Neutral(None)] = None
    """Causal language model that writes neural-LM text: a Hub name, a folder, or `trained`: a small one made here."""
    neural_lm_passages: Annotated[PositiveInt, Neutral(2000)] = 2000
    """How many passages it writes."""
    external: Annotated[tuple[str, ...], Neutral(())] = ()
    """Other end tasks (as in `task`) whose labels serve as auxiliary objectives, data `external:NAME`.

    Read by the columns of the end task, or by `text` and `label` where one of these is not there.
    """
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weights class c by N / (C * N_c) in the end-task loss."""
    split_seed: int = 0
    """Seed of the splits made from one labelled file and of `train_size`."""
    dev_fraction: OpenFraction = 0.15
    """Share of one labelled file that becomes dev."""
    test_fraction: OpenFraction = 0.25
    """Share of one labelled file that becomes test."""

    @field_validator("external", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: object) -> object:
        """`external: tweets` is short for `external: [tweets]`."""
        return (value,) if isinstance(value, str) else value


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
    noise_scale: Annotated[PositiveFloat, Neutral(1.0)] = 1.0
    """Standard deviation of the noise of noised embeddings, relative to that of the table of embeddings at the start."""


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
    micro: Annotated[PositiveInt | Literal["auto"], NotInName()] = "auto"
    """Largest number of texts in one forward pass. It changes rounding, and which dropout masks are drawn."""


class OptimConfig(Section):
    """The optimiser of body and heads."""

    algorithm: Annotated[Literal["adamw", "sgd"], Neutral("adamw")] = "adamw"
    """`sgd` uses `momentum`, not `betas` and `eps`, and adds weight decay to the gradient."""
    momentum: Annotated[HalfOpen, Neutral(0.9)] = 0.9
    """Momentum of `sgd`."""
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
    local_distances: Annotated[bool, NotInName()] = False
    """Log each objective's distance to the end task, ||g_k - g_E||^2, at every evaluation; training stays the same."""


class ResourcesConfig(Section):
    """Where a run runs. Nothing here changes its result beyond rounding, so the name of a run leaves it out."""

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


class Fingerprints(Section):
    """Hashes of what the names in a configuration stood for when the run was planned."""

    data: str = ""
    encoder: str = ""
    space: str = ""


class FinalFinetuneConfig(Section):
    """The optional last stage: fine-tuning on the end task alone, from the model that the run kept.

    The stage has an optimiser and a schedule of its own, and dev chooses among its models. Its end-task examples come on
    top of the run's own and count in the run's budget.
    """

    steps: PositiveInt
    """Optimiser steps."""
    body_lr: PositiveFloat = 2e-5
    """Learning rate of the body; the default is that of fine-tuning after TAPT (docs/semantics.md, section 4)."""
    head_lr: PositiveFloat | None = None
    """Learning rate of the end-task head; null: `optim.head_lr`."""
    patience: PositiveInt | None = None
    """Evaluations without improvement after which the stage stops; null: `schedule.patience`."""
