"""The settings and properties of every method.

docs/methods/README.md describes how to add one: a section here, its class in `implementation`, and a place in
`MethodConfig`.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from aang_ray.config.sections import (
    Fraction,
    HalfOpen,
    MethodSection,
    Neutral,
    NotInName,
    OpenFraction,
    Section,
    Semantics,
)

Preference = Literal["uniform", "static"]
"""Preference weights of the m gradients or losses: `uniform`, 1/m each; `static`, 1/2 for the end task."""
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class FinetuneConfig(MethodSection):
    """Fine-tuning on the end task alone."""

    name: Literal["finetune"] = "finetune"
    implementation: ClassVar[str] = "plain:Finetune"
    auxiliary: ClassVar[bool] = False
    tied_compute: Annotated[bool, Neutral(False)] = False
    """See as many examples as a multitask run of the same `schedule.steps` does: (end_task + auxiliary) / end_task
    times as many steps."""


class WeightsConfig(Section):
    """Fixed weights of the losses: given as numbers, or those that earlier runs found (`from` and `row`).

    Planning replaces `from` and `row` by numbers, and only the numbers enter the name of a run.
    """

    store: Annotated[str | None, NotInName()] = None
    """The store of the earlier runs; in a file it is called `from`."""
    row: Annotated[str | None, NotInName()] = None
    """Name of their row in the table, with or without its n, such as `aang-td`."""
    drop_below: Annotated[Fraction, NotInName()] = 0.02
    """Objectives with a smaller share of the objectives' weights are dropped from the space."""
    end_task: OpenFraction | None = None
    """Weight of the end task, lambda; null: 1/2, or what the earlier runs found."""
    objectives: Annotated[dict[str, PositiveFloat] | None, Field(min_length=1)] = None
    """Relative weight of each objective by its key, such as `end-task/mask/bidirectional/denoise`; others are
    dropped."""

    @model_validator(mode="before")
    @classmethod
    def _from_is_the_store(cls, values: object) -> object:
        """Read `from`, which cannot be the name of a field in Python."""
        if isinstance(values, dict) and "from" in values and "store" not in values:
            return {"store" if name == "from" else name: value for name, value in values.items()}
        return values

    @model_validator(mode="after")
    def _weights_are_known(self) -> Self:
        if self.objectives is None and (self.store is None or self.row is None):
            raise ValueError("give from (a store) and row, or objectives with a number for each")
        return self


class StaticConfig(MethodSection):
    """Static multitask: lambda = 1/2, and every sampled objective weighs 1/n, unless `weights` gives others."""

    name: Literal["static"] = "static"
    implementation: ClassVar[str] = "plain:Static"
    weights: Annotated[WeightsConfig | None, Neutral(None)] = None
    """Weights of the end task and of the objectives; null: equal ones."""


class MtTartanConfig(MethodSection):
    """MT-TARTAN (Dery et al. 2022): the end task and every sampled objective weigh 1/(1 + n)."""

    name: Literal["mt_tartan"] = "mt_tartan"
    implementation: ClassVar[str] = "plain:MtTartan"


class StagesSection(MethodSection):
    """The common settings of methods with stages before fine-tuning.

    After these stages, the run fine-tunes with its own settings. The stages use no labels of the end task, so their
    steps do not count in the budget of end-task examples.
    """

    auxiliary: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]]
    """The data of each stage, in order: keys of `STEPS`."""
    lr: PositiveFloat = 1e-4
    """Learning rate of the body."""
    batch: PositiveInt = 256
    """Texts per step."""
    epochs: PositiveInt = 100
    """Passes over a stage's texts if its number of steps is not set."""

    def steps_of(self, text: str) -> int | None:
        """Return the steps of the stage on a kind of texts; None if `epochs` determines them."""
        value: int | None = getattr(self, STEPS[text])
        return value

    @property
    def pretraining_steps(self) -> int:
        return sum(self.steps_of(text) or 0 for text in self.texts)

    @property
    def pretraining_texts(self) -> int:
        return self.pretraining_steps * self.batch


STEPS = {"end-task": "tapt_steps", "in-domain": "dapt_steps", "external": "pooled_steps"}
"""Name of the setting with the number of steps of a stage, by the stage's data."""


class PretrainSection(StagesSection):
    """The common settings of methods with masked-LM stages (Gururangan et al. 2020; docs/semantics.md, section 4)."""

    implementation: ClassVar[str] = "plain:MaskedLm"
    head_lr: PositiveFloat | None = None
    """Learning rate of the masked-LM head; null: `lr`."""
    mask_rate: OpenFraction = 0.15
    """Share of the real tokens that is selected."""


class TaptConfig(PretrainSection):
    """Task-adaptive pretraining, then fine-tuning."""

    name: Literal["tapt"] = "tapt"
    texts: ClassVar[tuple[str, ...]] = ("end-task",)
    tapt_steps: PositiveInt | None = None
    """Masked-LM steps on task text; null: `epochs` over it."""


class DaptConfig(PretrainSection):
    """Domain-adaptive pretraining, then fine-tuning."""

    name: Literal["dapt"] = "dapt"
    texts: ClassVar[tuple[str, ...]] = ("in-domain",)
    dapt_steps: PositiveInt | None = None
    """Masked-LM steps on in-domain text; null: `epochs` over it."""


class TaptDaptConfig(PretrainSection):
    """DAPT, then TAPT, then fine-tuning, with the settings of both."""

    name: Literal["tapt_dapt"] = "tapt_dapt"
    texts: ClassVar[tuple[str, ...]] = ("in-domain", "end-task")
    dapt_steps: PositiveInt | None = None
    tapt_steps: PositiveInt | None = None


class PooledConfig(StagesSection):
    """Supervised training on all other labelled sets (`data.external`) first, then fine-tuning (Phang et al. 2018).

    Every set has a head of its own, the same share of a batch, and the same weight.
    """

    name: Literal["pooled"] = "pooled"
    implementation: ClassVar[str] = "plain:Pooled"
    texts: ClassVar[tuple[str, ...]] = ("external",)
    head_lr: PositiveFloat | None = None
    """Learning rate of the sets' heads; null: `optim.head_lr`."""
    batch: PositiveInt = 128
    """Texts per step, of all sets together."""
    epochs: PositiveInt = 10
    """Passes over the sets' texts if the number of steps is not set."""
    pooled_steps: PositiveInt | None = None
    """Steps on the other sets; null: `epochs` over their texts."""


class AangConfig(MethodSection):
    """AANG and META-TARTAN: factored weights and lambda, learned from the alignment with the dev gradient."""

    name: Literal["aang"] = "aang"
    implementation: ClassVar[str] = "aang:Aang"
    samples_dev: ClassVar[bool] = True
    aux_lr: NonNegativeFloat = 1.0
    """Learning rate of the factors of the objectives' weights; 1 is a factor for each unit of evidence."""
    sopt_lr: NonNegativeFloat = 0.1
    """Learning rate of (a_E, a_X), the logits of lambda."""
    score: Literal["cosine", "dot"] = "cosine"
    """Measure of the alignment of an objective's gradient with the dev gradient."""
    jacobian: Literal["identity", "softmax"] = "identity"
    """`softmax` differentiates through w and lambda; `identity` omits these derivatives, as published."""
    meta_every: PositiveInt = 3
    """Steps over which the meta-gradient is averaged before it is applied."""
    head_refit_every: PositiveInt = 1
    """Steps between fits of the dev head."""
    dev_head: Literal["refit", "live"] = "live"
    """Head of the dev loss: `live`, the end-task head; `refit`, a newly fitted head, as published."""
    dev_sample: Semantics = "sound"
    """Source of the dev head's examples: dev (`sound`) or train (`published`)."""
    auxiliary_score: Semantics = "sound"
    """Joint auxiliary gradient for its score: sum w_k g_k (`sound`) or sum (number of labels) g_k (`published`)."""
    meta_dev_fraction: HalfOpen = 0.0
    """Fraction of dev reserved for the meta-gradient; 0: all of dev is used for both purposes, as in the paper."""
    update: Annotated[Literal["sgd", "evidence"], Neutral("sgd")] = "evidence"
    """How factors follow the scores: `aux_lr` times the evidence of all steps so far, or steps of SGD, as published."""
    dev_calibration: Annotated[bool, Neutral(False)] = True
    """Take the scale and the bias of the logits out of the dev loss before it is differentiated."""
    dev_memory: Annotated[HalfOpen, Neutral(0.0)] = 0.95
    """Weight of the earlier steps in the running mean of dev gradients that scores are computed with; 0: no mean."""
    dev_every: Annotated[PositiveInt, Neutral(1)] = 1
    """Steps between two dev batches; more than 1 needs `dev_memory`."""

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        """Refuse settings of the running mean that contradict others."""
        if self.dev_every > 1 and self.dev_memory == 0:
            raise ValueError("dev_every: steps without a dev batch need a running mean; set dev_memory")
        steps = sorted((self.dev_every, self.head_refit_every))
        if self.dev_head == "refit" and steps[1] % steps[0]:
            raise ValueError("dev_every and head_refit_every: one must be a multiple of the other")
        if self.dev_memory > 0 and self.auxiliary_score == "published":
            raise ValueError("dev_memory does not go with auxiliary_score: published; set dev_memory: 0")
        if self.update == "evidence" and self.jacobian == "softmax":
            raise ValueError("update: evidence uses the scores themselves; jacobian: softmax needs update: sgd")
        return self

    @property
    def uses_dev(self) -> bool:
        return self.aux_lr > 0 or self.sopt_lr > 0


class HalvingConfig(MethodSection):
    """Successive halving over short trials with one objective each, then training with the objectives that helped."""

    name: Literal["halving"] = "halving"
    implementation: ClassVar[str] = "plain:Static"
    trial_steps: PositiveInt = 50
    """Optimiser steps of a trial of the last rung; an earlier rung has trials of half as many as the next."""
    batch: PositiveInt | None = None
    """Auxiliary examples per step of a trial; null: `batch.auxiliary`."""
    finalists: PositiveInt = 3
    """Objectives of the last rung."""
    least_z: float = 2.0
    """How many standard errors of the dev loss an objective must gain over the end task alone to be kept."""
    candidates: Annotated[PositiveInt | None, NotInName()] = None
    """Objectives of the space. It serves estimates of the time, and is filled in when the run is planned."""

    def rungs(self, candidates: int) -> list[tuple[int, int]]:
        """Return number of objectives and steps of a trial for every rung."""
        sizes = [candidates]
        while sizes[-1] > self.finalists:
            sizes.append(max(self.finalists, (sizes[-1] + 1) // 2))
        return [(size, math.ceil(self.trial_steps / 2 ** (len(sizes) - 1 - rung))) for rung, size in enumerate(sizes)]

    @property
    def pretraining_steps(self) -> int:
        """At most: trials of several objectives are for those that help alone."""
        rungs = self.rungs(self.candidates or 1)
        finalists, steps = rungs[-1]
        return sum(size * steps for size, steps in rungs) + finalists * steps  # 1 alone, finalists - 1 of several


class AttittudConfig(MethodSection):
    """ATTITTUD (docs/semantics.md, section 6): static weights, and an auxiliary update split into three parts."""

    name: Literal["attittud"] = "attittud"
    implementation: ClassVar[str] = "attittud:Attittud"
    own_direction: ClassVar[bool] = True
    eta_perp: float = 1.0
    """Weight of the part outside the end task's subspace."""
    eta_plus: float = 1.0
    """Weight of the part that lowers the end task's loss."""
    eta_minus: float = -1.0
    """Weight of the part that raises the end task's loss."""
    rank: PositiveInt = 10
    """Number k of directions of the subspace. Each needs one body-sized vector, and three during estimation."""
    refresh_every: PositiveInt = 10
    """Steps between estimates of the subspace."""
    subspace_examples: PositiveInt = 64
    """Number m of train examples whose gradients span the subspace."""
    primary_examples: PositiveInt = 32
    """Number of new train examples in every step; their mean gradient determines which parts help or harm."""
    basis: Semantics = "sound"
    """`published` uses the orthonormalised sketch; `sound` rotates it to the right singular vectors."""
    subspace: Annotated[Literal["jacobian", "gradient"], Neutral("jacobian")] = "jacobian"
    """`gradient`: only the direction of the step's own g_E, instead of an estimated subspace. With eta_minus 0 this is
    PCGrad applied to the auxiliary gradient alone."""


class CosineGatingConfig(MethodSection):
    """Cosine gating (Du et al. 2018): auxiliary gradients with a negative cosine with the end task's are dropped."""

    name: Literal["cosine_gating"] = "cosine_gating"
    implementation: ClassVar[str] = "plain:CosineGating"
    own_direction: ClassVar[bool] = True
    mode: Literal["gate", "weigh"] = "gate"
    """`gate`: factor 1 or 0 on each gradient; `weigh`: factor max(0, cosine)."""


class GradnormConfig(MethodSection):
    """GradNorm (Chen et al. 2018): weights that bring all gradients to a common norm."""

    name: Literal["gradnorm"] = "gradnorm"
    implementation: ClassVar[str] = "gradnorm:GradNorm"
    alpha: NonNegativeFloat = 1.5
    """Strength with which slowly falling losses get larger gradient norms; 0: equal norms."""
    lr: NonNegativeFloat = 0.025
    """Learning rate of the weights (plain SGD); 0 keeps them equal."""


# Methods that TorchJD computes from the separate gradients (methods/torchjd.py). Defaults are TorchJD's.


class AggregationSection(MethodSection):
    """The body's update is an aggregation of g_E and of the sampled objectives' gradients."""

    implementation: ClassVar[str] = "torchjd:GramAggregation"
    own_direction: ClassVar[bool] = True


class PcgradConfig(AggregationSection):
    """PCGrad (Yu et al. 2020): components that conflict with other gradients are removed, then all are added."""

    name: Literal["pcgrad"] = "pcgrad"


class MgdaConfig(AggregationSection):
    """MGDA (Désidéri 2012; Sener and Koltun 2018): the convex combination with the smallest norm."""

    name: Literal["mgda"] = "mgda"
    epsilon: PositiveFloat = 1e-3
    """Step size below which the Frank-Wolfe solver stops."""
    max_iters: PositiveInt = 100
    """Maximum number of steps of the Frank-Wolfe solver."""


class CagradConfig(AggregationSection):
    """CAGrad (Liu et al. 2021): the update in a ball around the mean that maximises the smallest improvement."""

    name: Literal["cagrad"] = "cagrad"
    c: NonNegativeFloat = 0.5
    """Radius of the ball relative to the norm of the mean gradient; 0 gives the mean."""


class NashMtlConfig(AggregationSection):
    """Nash-MTL (Navon et al. 2022): the bargaining solution."""

    name: Literal["nash_mtl"] = "nash_mtl"
    max_norm: NonNegativeFloat = 1.0
    """Maximum norm of the update; 0: no limit."""
    optim_niter: PositiveInt = 20
    """Maximum number of iterations of the convex-concave procedure."""


class FairgradConfig(AggregationSection):
    """FairGrad (Ban and Ji 2024): the alpha-fair combination of the losses' improvements."""

    name: Literal["fairgrad"] = "fairgrad"
    alpha: NonNegativeFloat = 1.0
    """0 gives the mean, 1 Nash-MTL's proportional fairness; larger values favour the loss that improves least."""
    max_iters: PositiveInt | None = None
    """Maximum number of function evaluations of the solver; null: 100 for each gradient."""


class ImtlGConfig(AggregationSection):
    """IMTL-G (Liu et al. 2021): equal projections on all gradients."""

    name: Literal["imtl_g"] = "imtl_g"


class AlignedMtlConfig(AggregationSection):
    """Aligned-MTL (Senushkin et al. 2023): gradients are made orthogonal and of equal norm, then averaged."""

    name: Literal["aligned_mtl"] = "aligned_mtl"
    scale_mode: Literal["min", "median", "rmse"] = "min"
    """The common norm: the smallest singular value (`min`, the paper), the median, or their RMS (the paper's code)."""
    preference: Preference = "uniform"


class ConfigConfig(AggregationSection):
    """ConFIG (Liu, Chu and Thuerey 2024): equal cosines with all gradients, as long as the projections on it."""

    name: Literal["config"] = "config"
    preference: Preference = "uniform"


class UpgradConfig(AggregationSection):
    """UPGrad (Quinton and Rey 2024): the mean of the gradients, each projected onto directions that harm no loss."""

    name: Literal["upgrad"] = "upgrad"
    preference: Preference = "uniform"


class DualProjConfig(AggregationSection):
    """DualProj (Lopez-Paz and Ranzato 2017): the mean gradient, projected onto directions that harm no loss."""

    name: Literal["dualproj"] = "dualproj"
    preference: Preference = "uniform"


class KrumConfig(AggregationSection):
    """Multi-Krum (Blanchard et al. 2017): the mean of the gradients that are closest to their neighbours."""

    name: Literal["krum"] = "krum"
    n_byzantine: NonNegativeInt = 0
    """Number of gradients that may be outliers. Steps with fewer than this + 3 gradients use the mean of all."""
    n_selected: PositiveInt = 1
    """Number of gradients that are averaged."""


class GradvacConfig(AggregationSection):
    """GradVac (Wang et al. 2021): gradients are rotated until their cosines reach the running averages."""

    name: Literal["gradvac"] = "gradvac"
    implementation: ClassVar[str] = "torchjd:GradVac"
    beta: Fraction = 0.5
    """Weight of the current cosine in the running average."""


class PcdConfig(AggregationSection):
    """PCD (TMLR 2026): the smallest change to the end task's gradient that lets every objective improve."""

    name: Literal["pcd"] = "pcd"
    implementation: ClassVar[str] = "torchjd:PriorityConstrainedDescent"
    tau: Fraction = 0.02
    """Guaranteed improvement of each objective, relative to that of a step along its own gradient."""
    beta: HalfOpen = 0.999
    """Decay of the running averages of squared gradient norms."""


class CrMogmConfig(AggregationSection):
    """CR-MOGM (Zhou et al. 2022): the weights of another aggregation, averaged over steps."""

    name: Literal["cr_mogm"] = "cr_mogm"
    implementation: ClassVar[str] = "torchjd:CrMogm"
    weighting: Literal["mgda", "pcgrad", "cagrad", "imtl_g", "aligned_mtl", "upgrad", "dualproj"] = "mgda"
    """The aggregation, at its default settings."""
    alpha: Fraction = 0.9
    """Weight of the previous weights in the running average."""


class ExcessMtlConfig(AggregationSection):
    """ExcessMTL (He et al. 2024): weights grow with the estimated excess risk of each loss."""

    name: Literal["excess_mtl"] = "excess_mtl"
    implementation: ClassVar[str] = "torchjd:ExcessMtl"
    robust_step_size: PositiveFloat = 1.0
    """Step size of the exponentiated update of the weights."""
    warmup_steps: PositiveInt = 30
    """Number of samples of an objective for its initial excess risk; its weight is constant during this time."""


class GraddropConfig(AggregationSection):
    """GradDrop (Chen et al. 2020): every coordinate keeps only the entries of one randomly drawn sign."""

    name: Literal["graddrop"] = "graddrop"
    implementation: ClassVar[str] = "torchjd:Coordinatewise"
    logs_weights: ClassVar[bool] = False
    end_task_leak: Fraction = 0.0
    """Fraction of the end task's gradient that is never dropped."""


class TrimmedMeanConfig(AggregationSection):
    """Trimmed mean (Yin et al. 2018): in every coordinate the mean without the most extreme values."""

    name: Literal["trimmed_mean"] = "trimmed_mean"
    implementation: ClassVar[str] = "torchjd:Coordinatewise"
    logs_weights: ClassVar[bool] = False
    trim_number: NonNegativeInt = 1
    """Number of values dropped at each end; fewer if that would leave none."""


# Methods that TorchJD computes from the losses (methods/scalarizations.py).


class RandomConfig(MethodSection):
    """Random loss weighting (Lin et al. 2022): the softmax of normal random numbers, drawn at every step."""

    name: Literal["random"] = "random"
    implementation: ClassVar[str] = "scalarizations:RandomWeights"


class UncertaintyConfig(MethodSection):
    """Uncertainty weighting (Kendall et al. 2018): a learned log-variance for each loss."""

    name: Literal["uncertainty"] = "uncertainty"
    implementation: ClassVar[str] = "scalarizations:LearnedScales"
    lr: NonNegativeFloat = 0.1
    """Learning rate of the log-variances (plain SGD); 0 keeps all weights at 1/2."""


class ImtlLConfig(MethodSection):
    """IMTL-L (Liu et al. 2021): a learned scale for each loss."""

    name: Literal["imtl_l"] = "imtl_l"
    implementation: ClassVar[str] = "scalarizations:LearnedScales"
    lr: NonNegativeFloat = 0.1
    """Learning rate of the logarithms of the scales (plain SGD); 0 keeps all weights at 1."""


class DwaConfig(MethodSection):
    """Dynamic weight average (Liu et al. 2019): losses that fall more slowly get larger weights."""

    name: Literal["dwa"] = "dwa"
    implementation: ClassVar[str] = "scalarizations:DynamicWeightAverage"
    temperature: PositiveFloat = 2.0
    """Temperature of the softmax; larger values give more equal weights."""
    epoch_steps: PositiveInt = 30
    """Number of steps in an epoch. Mean losses of consecutive epochs are compared."""


class LossSection(AggregationSection):
    """The update is the gradient of a function of the step's losses."""

    implementation: ClassVar[str] = "scalarizations:LossAggregation"


class GeometricMeanConfig(LossSection):
    """Geometric loss strategy (Chennupati et al. 2019): the geometric mean of the losses."""

    name: Literal["geometric_mean"] = "geometric_mean"


class StchConfig(LossSection):
    """STCH (Lin et al. 2024): smooth Tchebycheff scalarization, close to the largest weighted loss."""

    name: Literal["stch"] = "stch"
    mu: PositiveFloat = 0.1
    """Smoothing; smaller values are closer to the maximum. The paper tries 0.01, 0.1, 0.5 and 1."""
    preference: Preference = "uniform"


class CosmosConfig(LossSection):
    """COSMOS (Ruchte and Grabocka 2021): the weighted sum minus lambda times the cosine of losses and weights."""

    name: Literal["cosmos"] = "cosmos"
    penalty: NonNegativeFloat = 1.0
    """lambda; 0 gives the weighted sum. The paper uses 0.01 to 8, depending on the data set."""
    preference: Preference = "uniform"


class PbiConfig(LossSection):
    """PBI (Zhang and Li 2007): the losses' projection on the weights plus a penalty on the distance from them."""

    name: Literal["pbi"] = "pbi"
    theta: NonNegativeFloat = 5.0
    """Factor of the penalty; the paper uses 5."""
    preference: Preference = "uniform"


class FamoConfig(LossSection):
    """FAMO (Liu et al. 2023): weights are adapted to the losses of later steps so that all losses fall equally fast."""

    name: Literal["famo"] = "famo"
    implementation: ClassVar[str] = "scalarizations:Famo"
    lr: PositiveFloat = 0.025
    """Learning rate of the logits of the weights (Adam)."""
    weight_decay: NonNegativeFloat = 1e-3
    """Weight decay of the logits, added to their gradient."""


class RoundsSection(MethodSection):
    """The common settings of methods that train in rounds (docs/semantics.md, section 7).

    The tasks are the end task and n objectives of the space, sampled once for the whole run. `schedule.steps` counts
    the optimiser steps of all tasks. Dev is scored only at the end of a round.
    """

    round_fraction: Share = 1.0
    """Fraction of each task's examples in a round; 1 is an epoch. The paper uses 0.25 for text."""
    round_steps: PositiveInt | None = None
    """Optimiser steps of each task in a round; null: determined by `round_fraction`."""


class AlphavilConfig(RoundsSection):
    """alphaVIL: mixes the tasks' parameter updates by gradient descent on the dev loss."""

    name: Literal["alphavil"] = "alphavil"
    implementation: ClassVar[str] = "rounds:Alphavil"
    alpha_steps: PositiveInt = 10
    """Number s of SGD steps on alpha in a round."""
    alpha_lr: PositiveFloat = 0.001
    """Learning rate of alpha; the paper uses 0.005 for images."""
    alpha_momentum: HalfOpen = 0.5
    task_weight: Semantics = "sound"
    """What w_i scales: the task's learning rate, or (`published`) its loss, which has almost no effect with AdamW."""


class DiwConfig(RoundsSection):
    """Discriminative importance weighting: dev scores change the task weights until the dev score improves."""

    name: Literal["diw"] = "diw"
    implementation: ClassVar[str] = "rounds:Diw"
    weight_lr: NonNegativeFloat = 0.1
    """Change of a weight per unit of difference between two dev scores."""
    tries: PositiveInt = 10
    """Maximum number of joint trainings in a round."""


# fmt: off
MethodConfig = Annotated[
    FinetuneConfig | StaticConfig | AangConfig | TaptConfig | DaptConfig | TaptDaptConfig | PooledConfig
    | MtTartanConfig | HalvingConfig
    | PcgradConfig | MgdaConfig | CagradConfig | NashMtlConfig | FairgradConfig | ImtlGConfig | AlignedMtlConfig
    | ConfigConfig | UpgradConfig | DualProjConfig | KrumConfig | GradvacConfig | PcdConfig | CrMogmConfig
    | ExcessMtlConfig | GraddropConfig | TrimmedMeanConfig
    | RandomConfig | UncertaintyConfig | ImtlLConfig | DwaConfig
    | GeometricMeanConfig | StchConfig | CosmosConfig | PbiConfig | FamoConfig
    | CosineGatingConfig | GradnormConfig | AttittudConfig
    | AlphavilConfig | DiwConfig,
    Field(discriminator="name"),
]
# fmt: on
"""The registry of methods: the union of all their sections, in the order of help texts."""


def method_sections() -> dict[str, type[MethodSection]]:
    """Return the section of every method, by the method's name."""
    union, _ = get_args(MethodConfig)
    return {str(section.model_fields["name"].default): section for section in get_args(union)}
