"""The sections of a run's configuration. Each section configures one part of the program.

Defaults are those of the AANG paper (Tables 4-7) where it states them. The `published` switches select the behaviour of
the paper's research code where it differs from the sound interpretation (docs/semantics.md). A setting that is added
after release 0.1 is marked `Neutral` or `NotInName`, so that stored runs keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

Semantics = Literal["sound", "published"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
HalfOpen = Annotated[float, Field(ge=0.0, lt=1.0)]
OpenFraction = Annotated[float, Field(gt=0.0, lt=1.0)]


@dataclass(frozen=True)
class Neutral:
    """Marks a setting that was added later. With `value`, a run behaves as before the setting existed.

    The name of a run omits the setting if it has this value, so `value` must never change. A new default is a new name.
    A configuration in a store that does not state the setting has this value, whatever the default is now.
    """

    value: Any
    stored: bool = False
    """Whether a configuration that is written states the setting even if this value is its default, as those of
    release 0.1 do. A row that is written without a setting added since then is the row that release 0.1 would write."""


@dataclass(frozen=True)
class NotInName:
    """Marks a setting that cannot change a run's result beyond rounding. The name of a run omits it."""


STORED: Mapping[str, Any] = {"stored": True}
"""The context of a validation in which what is missing has its value of before, not its default."""


class Section(BaseModel):
    """A frozen part of the configuration. Unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values_as_numbers(cls, values: object) -> object:
        """Refuse `true` for a number. Python would treat it as 1, but `steps: true` is most likely a mistake."""
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise ValueError(f"{name} must be a number or a name, not {str(value).lower()}")
        return values

    @model_validator(mode="before")
    @classmethod
    def _what_a_store_leaves_out(cls, values: object, info: ValidationInfo) -> object:
        """Give settings that a stored configuration does not state the value that they had before they existed."""
        if not isinstance(values, dict) or info.context is not STORED:
            return values
        marks = ((name, mark) for name, field in cls.model_fields.items() for mark in field.metadata)
        return {name: mark.value for name, mark in marks if isinstance(mark, Neutral)} | values

    @model_serializer(mode="wrap")
    def _without_what_is_neutral(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out added settings that are neutral by default, and have that value."""
        values: dict[str, Any] = write(self)
        for name, field in type(self).model_fields.items():
            marks = [mark for mark in field.metadata if isinstance(mark, Neutral) and not mark.stored]
            if any(mark.value == getattr(self, name) == field.default for mark in marks):
                values.pop(name, None)
        return values

    def changed(self, **values: Any) -> Self:
        """Return a copy with other values of some settings, which are not validated."""
        return self.model_copy(update=values)

    def named_settings(self) -> dict[str, Any]:
        """Return the settings that enter the name of a run, as JSON values. The fields' marks leave some out."""
        values = self.model_dump(mode="json")
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if isinstance(value, Section):
                values[name] = value.named_settings()
            marks = field.metadata
            if any(
                isinstance(mark, NotInName) or (isinstance(mark, Neutral) and mark.value == value) for mark in marks
            ):
                values.pop(name, None)  # a label that is not set is missing already
        return values


class MethodSection(Section):
    """The settings of one method. The class attributes are properties of the method, not settings."""

    implementation: ClassVar[str]
    """`module:Class` of the method in `aang_ray.methods`; the module is imported when a run uses the method."""
    auxiliary: ClassVar[bool] = True
    """Whether the method trains on a space of auxiliary objectives."""
    samples_dev: ClassVar[bool] = False
    """Whether `batch.dev` and `batch.dev_head` can change the result."""
    own_direction: ClassVar[bool] = False
    """Whether the method computes the body's update itself from the separate gradients."""
    logs_weights: ClassVar[bool] = True
    """Whether every sampled objective has one weight (methods without a space have none in any case)."""

    @property
    def uses_dev(self) -> bool:
        """Whether a step computes the dev head and the dev gradient."""
        return False

    @property
    def pretraining_steps(self) -> int:
        """Number of optimiser steps of the pretraining stages."""
        return 0

    @property
    def pretraining_texts(self) -> int:
        """Number of texts in these steps."""
        return 0


class DataConfig(Section):
    """The end task and its texts."""

    task: str = "movie"
    """A built-in card, a folder with train/dev/test, a single labelled file, or a Hugging Face dataset id."""
    text: str = "text"
    """Column of the text."""
    text_b: str | None = None
    """Column of the second text of text pairs; null: single texts."""
    label: str = "label"
    """Column of the label."""
    metric: Literal["accuracy", "macro_f1"] | None = None
    """Metric for model selection on dev; null: that of the card, or accuracy."""
    train_size: PositiveInt | None = None
    """Number of train examples to keep, stratified and nested; the rest becomes in-domain text. null: all."""
    max_tokens: PositiveInt | None = None
    """Maximum number of tokens of a text, including special tokens; null: the encoder's limit."""
    in_domain: str | None = None
    """File of unlabelled in-domain text: one passage per line, or the column `text` of a table."""
    out_of_domain: str | None = None
    """File of unlabelled out-of-domain text."""
    neural_lm: Annotated[str | None, Neutral(None, stored=True)] = None
    """Model that generates neural-LM text: a Hub name, a folder, or `trained` for a small one trained on the spot."""
    neural_lm_passages: Annotated[PositiveInt, Neutral(2000, stored=True)] = 2000
    """Number of generated passages."""
    external: Annotated[tuple[str, ...], Neutral((), stored=True)] = ()
    """Other end tasks (as in `task`) whose labels are used as auxiliary objectives with data `external:NAME`.

    Their columns have the same names as those of the end task, or `text` and `label` if one of these is missing.
    """
    bad_rows: Annotated[Literal["refuse", "drop"], Neutral("refuse")] = "refuse"
    """`drop` leaves out rows with an empty text, without a label, or with a label in dev or test that train lacks."""
    external_size: Annotated[PositiveInt | None, Neutral(None)] = None
    """Maximum number of examples of each set in `external`, stratified by its labels; null: all."""
    retrieve_from: Annotated[str | None, Neutral(None)] = None
    """Pool of passages, a file as for `in_domain`; those nearest to the train texts are the data `retrieved`."""
    retrieve_k: Annotated[PositiveInt, Neutral(10)] = 10
    """Number of nearest passages for each train text."""
    class_weights: Literal["none", "balanced"] = "none"
    """`balanced` weights class c by N / (C * N_c) in the end-task loss."""
    split_seed: int = 0
    """Seed of the splits made from one labelled file and of `train_size`."""
    dev_fraction: OpenFraction = 0.15
    """Fraction of a single labelled file that becomes dev."""
    test_fraction: OpenFraction = 0.25
    """Fraction of a single labelled file that becomes test."""

    @field_validator("external", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: object) -> object:
        """`external: tweets` is short for `external: [tweets]`."""
        return (value,) if isinstance(value, str) else value


class AdapterConfig(Section):
    """Low-rank adapters on linear layers of the body, which are trained in place of its own parameters."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    """The adapters' output is multiplied by alpha / rank."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names, or last parts of dotted names, of the linear layers that get adapters, or `all-linear`; null: those that
    compute the queries and values of attention."""

    @field_validator("targets", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, value: object) -> object:
        """`targets: query` is short for `targets: [query]`."""
        return (value,) if isinstance(value, str) else value


class EncoderConfig(Section):
    """The shared body."""

    name: str = "roberta-base"
    """A Hugging Face Hub name, a folder, `package:NAME` for an encoder in a Python package, or `random:LAYERSxHIDDEN`
    for one without pretraining, whose tokenizer is trained on the task's own texts."""
    revision: str | None = None
    """Revision on the Hub."""
    layers: PositiveInt | None = None
    """Keep the first k layers; null keeps all."""
    pooling: Literal["auto", "first", "mean"] = "auto"
    """Pooling of a text into a vector; `auto`: the pooling with which the checkpoint was trained."""
    dropout: Fraction | None = None
    """Dropout of the body; null keeps the checkpoint's own."""
    head_dropout: Fraction = 0.3
    """Dropout of the end-task head."""
    head: Annotated[Literal["tanh", "native"], Neutral("tanh")] = "tanh"
    """The end-task head. `tanh`: Linear, Tanh, Dropout, Linear, in every family. `native`: that of the family's own
    classifier, which is another one in DistilBERT, ELECTRA, DeBERTa and ModernBERT; with pooling by the first token."""
    adapter: Annotated[AdapterConfig | None, Neutral(None)] = None
    """Adapters that are trained in place of the body's own parameters, which stay as they are; null: none."""


class ObjectivesConfig(Section):
    """How examples, inputs, labels and losses are made from the sampled objectives."""

    legality: Semantics = "sound"
    """`published` allows objectives that copy an uncorrupted, fully visible input."""
    allocation: Literal["equal", "published"] = "equal"
    """`equal`: floor(B/n) examples each; `published`: batch sizes follow the factors."""
    visibility: Semantics = "sound"
    """`published`: padding is seen, except under left-to-right; random-factorized is one Bernoulli(0.6) matrix."""
    labels: Semantics = "sound"
    """`published`: the no-op transform labels 15 % of the positions with their own, unchanged token."""
    heads: Literal["shared", "per_objective"] = "shared"
    """`per_objective`: one untied copy of the decoder for every objective, as published."""
    mask_rate: OpenFraction = 0.15
    """Fraction of the tokens (without padding) that is selected."""
    noise_scale: Annotated[PositiveFloat, Neutral(1.0, stored=True)] = 1.0
    """Standard deviation of the noise of noised embeddings, relative to that of the embedding table at the start."""


class BatchConfig(Section):
    """Number of examples of each kind in a step."""

    end_task: PositiveInt | None = None
    """End-task examples per step; null: as in the card, or 128."""
    auxiliary: PositiveInt | None = None
    """Auxiliary examples per step over all sampled objectives; null: as in the card, or 256."""
    dev: PositiveInt = 32
    """Examples for the dev gradient."""
    dev_head: PositiveInt | None = None
    """Examples for fitting the dev head; null: as in the card, or 32."""
    micro: Annotated[PositiveInt | Literal["auto"], NotInName()] = "auto"
    """Maximum number of texts in one forward pass. It affects rounding and the random dropout masks."""


class OptimConfig(Section):
    """The optimiser of body and heads."""

    algorithm: Annotated[Literal["adamw", "sgd"], Neutral("adamw", stored=True)] = "adamw"
    """`sgd` uses `momentum`, not `betas` and `eps`, and adds weight decay to the gradient."""
    momentum: Annotated[HalfOpen, Neutral(0.9, stored=True)] = 0.9
    """Momentum of `sgd`."""
    body_lr: PositiveFloat = 1e-4
    head_lr: PositiveFloat = 1e-3
    body_weight_decay: NonNegativeFloat = 0.01
    head_weight_decay: NonNegativeFloat = 0.1
    betas: tuple[HalfOpen, HalfOpen] = (0.9, 0.98)
    eps: PositiveFloat = 1e-6
    head_warmup_steps: Annotated[NonNegativeInt, Neutral(0)] = 0
    """Steps at the start in which only heads are trained that the checkpoint did not bring: a random head does not
    disturb the body."""
    clip: PositiveFloat = 1.0
    """Maximum norm of the body's update direction, and of each head's gradient."""
    clipping: Semantics = "sound"
    """`published`: first clip each objective's body gradient to norm 10, and clip the heads jointly."""


class ScheduleConfig(Section):
    """Length of training and learning-rate schedule: linear warm-up, then linear decay to 0.

    With `until: converged` the rate stays after the warm-up, and the dev score decides when the run stops.
    """

    steps: PositiveInt | None = None
    """Optimiser steps; null: `epochs` epochs over train and in-domain texts at the auxiliary batch size."""
    epochs: PositiveInt = 150
    warmup_fraction: Fraction = 0.06
    warmup_cap: PositiveInt = 700
    """Warm-up lasts min(warmup_fraction * steps, warmup_cap) steps."""
    eval_every: PositiveInt = 30
    patience: PositiveInt = 20
    """Evaluations without improvement on dev after which the run stops."""
    until: Annotated[Literal["steps", "converged"], Neutral("steps")] = "steps"
    """`converged`: constant rate after the warm-up, until `patience` evaluations after it in a row have brought no
    better dev score, or until `steps` at the latest."""


class GradientsConfig(Section):
    """How the gradients of the objectives are computed."""

    engine: Literal["segments", "loop"] = "segments"
    """`segments`: one pass for all objectives; `loop`: one pass for each (the reference)."""
    tied_in_scores: bool = False
    """Include the decoder's part of a tied table's gradient in scores and norms."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    local_distances: Annotated[bool, NotInName()] = False
    """Log each objective's distance to the end task, ||g_k - g_E||^2, at every evaluation; training stays the same."""


class ResourcesConfig(Section):
    """Hardware resources of a run. They change its result only by rounding, so the name of a run omits them."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: PositiveInt | None = None
    """CPU threads of a run; null: the machine's cores divided by the number of concurrent trials."""
    cpus: PositiveFloat = 1.0
    """CPUs that a trial reserves."""
    gpus: NonNegativeFloat = 0.0
    """GPUs that a trial reserves; with fractions, trials share a GPU."""
    workers: PositiveInt = 1
    """Number of processes that train a run together; each computes the gradients of its own objectives."""
    cpus_per_worker: PositiveFloat = 1.0
    """CPUs of each worker, if there are several."""
    gpus_per_worker: NonNegativeFloat = 0.0
    """GPUs of each worker, if there are several."""
    optimizer_state: Literal["replicated", "sharded"] = "replicated"
    """`sharded`: each worker stores a part of the optimiser's state and sends the parameters it updates (ZeRO-1)."""
    checkpoint_minutes: NonNegativeFloat = 5.0
    """Minutes between two checkpoints of a run; 0: after every step."""
    keep_memory: Annotated[bool, Neutral(True)] = True
    """Whether trials, workers and `aang train` keep freed memory for the next step (glibc on Linux only). `false`:
    they return it to the system, which costs time."""


class Fingerprints(Section):
    """Hashes of the data, encoder and space that the configuration named when the run was planned."""

    data: str = ""
    encoder: str = ""
    space: str = ""
    token_types: Annotated[str, Neutral("")] = ""
    """`tokenizer` if the encoder reads the token types of text pairs; runs that were stored before it did have ``."""


class FinalFinetuneConfig(Section):
    """The optional last stage: fine-tuning on the end task alone, starting from the run's best model.

    It has its own optimiser and schedule. Its best model on dev is kept, and its end-task examples are counted.
    """

    steps: PositiveInt
    """Optimiser steps."""
    body_lr: PositiveFloat = 2e-5
    """Learning rate of the body; the default is that for fine-tuning after TAPT (docs/semantics.md, section 4)."""
    head_lr: PositiveFloat | None = None
    """Learning rate of the end-task head; null: `optim.head_lr`."""
    patience: PositiveInt | None = None
    """Evaluations without improvement after which the stage stops; null: `schedule.patience`."""
    keep_start: Annotated[bool, Neutral(False)] = False
    """Whether the model that the stage starts from is kept if no model of the stage has a better dev score."""
