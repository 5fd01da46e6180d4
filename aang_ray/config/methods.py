"""The settings of every method, and what the rest of the program must know about each.

To add a method, write its section here, name the class that implements it (`implementation`), and add the section to
`MethodConfig` at the end of this file. docs/methods/README.md has the recipe.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from aang_ray.config.sections import Fraction, HalfOpen, MethodSection, OpenFraction, Semantics

Preference = Literal["uniform", "static"]
"""Weights p of m gradients or losses to start from: `uniform`, 1/m each; `static`, 1/2 for the end task."""
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class FinetuneConfig(MethodSection):
    """The end task alone."""

    name: Literal["finetune"] = "finetune"
    implementation: ClassVar[str] = "plain:Finetune"
    auxiliary: ClassVar[bool] = False


class StaticConfig(MethodSection):
    """Static multitask: lambda = 1/2, and every sampled objective weighs 1/n."""

    name: Literal["static"] = "static"
    implementation: ClassVar[str] = "plain:Static"


class MtTartanConfig(MethodSection):
    """MT-TARTAN (Dery et al. 2022): the end task and every sampled objective weigh 1/(1 + n)."""

    name: Literal["mt_tartan"] = "mt_tartan"
    implementation: ClassVar[str] = "plain:MtTartan"


class PretrainSection(MethodSection):
    """What the masked-LM stages have in common (Gururangan et al. 2020; docs/semantics.md, section 4).

    Fine-tuning follows with the run's own settings. The stages see no label, so their steps are not part of the
    budget of end-task examples. Their tokens and seconds count.
    """

    implementation: ClassVar[str] = "plain:MaskedLm"
    auxiliary: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]]
    """The data of each stage, in order."""
    lr: PositiveFloat = 1e-4
    """Learning rate of the body."""
    head_lr: PositiveFloat | None = None
    """Learning rate of the masked-LM head; null takes `lr`."""
    batch: PositiveInt = 256
    """Texts per step."""
    epochs: PositiveInt = 100
    """Passes over a stage's texts if its number of steps is not given."""
    mask_rate: OpenFraction = 0.15
    """Share of the real tokens that is selected."""

    def steps_of(self, text: str) -> int | None:
        """Steps of the stage on `end-task` or `in-domain` text; None if `epochs` decides."""
        value: int | None = getattr(self, STEPS[text])
        return value

    @property
    def pretraining_steps(self) -> int:
        return sum(self.steps_of(text) or 0 for text in self.texts)

    @property
    def pretraining_texts(self) -> int:
        return self.pretraining_steps * self.batch


STEPS = {"end-task": "tapt_steps", "in-domain": "dapt_steps"}
"""The setting that holds the number of steps of a stage, by the stage's data."""


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


class AangConfig(MethodSection):
    """AANG and META-TARTAN: factored weights and lambda, learned from the agreement of gradients with the dev loss."""

    name: Literal["aang"] = "aang"
    implementation: ClassVar[str] = "aang:Aang"
    samples_dev: ClassVar[bool] = True
    aux_lr: NonNegativeFloat = 0.1
    """Learning rate of the factors of the objectives' weights."""
    sopt_lr: NonNegativeFloat = 0.1
    """Learning rate of (a_E, a_X), the logits of lambda."""
    score: Literal["cosine", "dot"] = "cosine"
    """How the agreement of an objective's gradient with the dev gradient is measured."""
    jacobian: Literal["identity", "softmax"] = "identity"
    """`softmax` is the derivation through w and lambda; `identity` is what was published."""
    meta_every: PositiveInt = 3
    """Steps over which the meta-gradient is averaged before it is applied."""
    head_refit_every: PositiveInt = 1
    """Steps between fits of the dev head."""
    dev_head: Literal["refit", "live"] = "refit"
    """The dev loss goes through a freshly fitted head, or through the end-task head."""
    dev_sample: Semantics = "sound"
    """Where the dev head's examples come from: dev (`sound`) or train (`published`)."""
    auxiliary_score: Semantics = "sound"
    """Score of the joint auxiliary gradient: of sum w_k g_k, or of sum (active labels) g_k."""
    meta_dev_fraction: HalfOpen = 0.0
    """Part of dev set aside for the meta part alone; 0: all of dev serves both, as in the paper."""

    @property
    def uses_dev(self) -> bool:
        return self.aux_lr > 0 or self.sopt_lr > 0


class AttittudConfig(MethodSection):
    """ATTITTUD (docs/semantics.md, section 6): static weights, and an auxiliary update split into three parts.

    (eta_perp, eta_plus, eta_minus) = (1, 1, 1) is static multitask, (0, 0, 0) trains the end task alone, and
    (1, 1, -1) reverses the part that harms.
    """

    name: Literal["attittud"] = "attittud"
    implementation: ClassVar[str] = "attittud:Attittud"
    own_direction: ClassVar[bool] = True
    eta_perp: float = 1.0
    """Weight of the part outside the end task's subspace."""
    eta_plus: float = 1.0
    """Weight of the part that lowers the end task's loss."""
    eta_minus: float = -1.0
    """Weight of the part that raises it."""
    rank: PositiveInt = 10
    """k: directions of the subspace; each costs one vector of the body's size, three while it is estimated."""
    refresh_every: PositiveInt = 10
    """Steps between estimates of the subspace."""
    subspace_examples: PositiveInt = 64
    """m: train examples whose gradients span the subspace."""
    primary_examples: PositiveInt = 32
    """Fresh train examples of every step; their mean gradient tells help from harm."""
    basis: Semantics = "sound"
    """`published` stops at the orthonormalised sketch; `sound` rotates it to the right singular vectors."""


class CosineGatingConfig(MethodSection):
    """Cosine gating (Du et al. 2018): an auxiliary gradient counts only if it agrees with the end task's."""

    name: Literal["cosine_gating"] = "cosine_gating"
    implementation: ClassVar[str] = "plain:CosineGating"
    own_direction: ClassVar[bool] = True
    mode: Literal["gate", "weigh"] = "gate"
    """`gate`: all of it or nothing; `weigh`: times max(0, cosine)."""


class GradnormConfig(MethodSection):
    """GradNorm (Chen et al. 2018): weights that bring all gradients to a common norm."""

    name: Literal["gradnorm"] = "gradnorm"
    implementation: ClassVar[str] = "gradnorm:GradNorm"
    alpha: NonNegativeFloat = 1.5
    """How strongly a loss that falls more slowly than the others is pulled up; 0: equal norms."""
    lr: NonNegativeFloat = 0.025
    """Learning rate of the weights, plain SGD; 0 leaves them equal."""


# Methods that TorchJD computes from the separate gradients (methods/torchjd.py). Defaults are TorchJD's.


class AggregationSection(MethodSection):
    """The body's update is an aggregation of g_E and of the sampled objectives' gradients."""

    implementation: ClassVar[str] = "torchjd:GramAggregation"
    own_direction: ClassVar[bool] = True


class PcgradConfig(AggregationSection):
    """PCGrad (Yu et al. 2020): each gradient loses what conflicts with the others, then all are added."""

    name: Literal["pcgrad"] = "pcgrad"


class MgdaConfig(AggregationSection):
    """MGDA (Désidéri 2012; Sener and Koltun 2018): the shortest convex combination."""

    name: Literal["mgda"] = "mgda"
    epsilon: PositiveFloat = 1e-3
    """Step of the Frank-Wolfe solver below which it stops."""
    max_iters: PositiveInt = 100
    """Most steps of the Frank-Wolfe solver."""


class CagradConfig(AggregationSection):
    """CAGrad (Liu et al. 2021): the best worst case within a ball around the mean."""

    name: Literal["cagrad"] = "cagrad"
    c: NonNegativeFloat = 0.5
    """Radius of the ball over the norm of the mean gradient; 0 is the mean."""


class NashMtlConfig(AggregationSection):
    """Nash-MTL (Navon et al. 2022): the bargaining solution."""

    name: Literal["nash_mtl"] = "nash_mtl"
    max_norm: NonNegativeFloat = 1.0
    """Longest update; 0: no limit."""
    optim_niter: PositiveInt = 20
    """Most rounds of the convex-concave procedure."""


class FairgradConfig(AggregationSection):
    """FairGrad (Ban and Ji 2024): the alpha-fair combination of the losses' improvements."""

    name: Literal["fairgrad"] = "fairgrad"
    alpha: NonNegativeFloat = 1.0
    """0 is the mean, 1 Nash-MTL's proportional fairness; larger values favour the loss that improves least."""
    max_iters: PositiveInt | None = None
    """Most evaluations of the solver; null: 100 for each gradient."""


class ImtlGConfig(AggregationSection):
    """IMTL-G (Liu et al. 2021): equal projections on all gradients."""

    name: Literal["imtl_g"] = "imtl_g"


class AlignedMtlConfig(AggregationSection):
    """Aligned-MTL (Senushkin et al. 2023): gradients made orthogonal and of one length, then averaged."""

    name: Literal["aligned_mtl"] = "aligned_mtl"
    scale_mode: Literal["min", "median", "rmse"] = "min"
    """That length: of the smallest singular value (`min`, the paper), the median, or their mean square (its code)."""
    preference: Preference = "uniform"


class ConfigConfig(AggregationSection):
    """ConFIG (Liu, Chu and Thuerey 2024): equal cosines with all gradients, as long as the projections on it."""

    name: Literal["config"] = "config"
    preference: Preference = "uniform"


class UpgradConfig(AggregationSection):
    """UPGrad (Quinton and Rey 2024): each gradient is projected onto what harms no loss, then they are averaged."""

    name: Literal["upgrad"] = "upgrad"
    preference: Preference = "uniform"


class DualProjConfig(AggregationSection):
    """DualProj (Lopez-Paz and Ranzato 2017): the mean, projected onto what harms no loss."""

    name: Literal["dualproj"] = "dualproj"
    preference: Preference = "uniform"


class KrumConfig(AggregationSection):
    """Multi-Krum (Blanchard et al. 2017): the mean of the gradients that are closest to their neighbours."""

    name: Literal["krum"] = "krum"
    n_byzantine: NonNegativeInt = 0
    """Gradients that are ignored as neighbours; the mean of all is taken at steps with fewer than this plus 3."""
    n_selected: PositiveInt = 1
    """Gradients that are averaged."""


class GradvacConfig(AggregationSection):
    """GradVac (Wang et al. 2021): gradients are turned towards each other until their cosines are the usual ones."""

    name: Literal["gradvac"] = "gradvac"
    implementation: ClassVar[str] = "torchjd:GradVac"
    beta: Fraction = 0.5
    """How much of the average of a cosine is replaced at a step."""


class PcdConfig(AggregationSection):
    """PCD (TMLR 2026): the end task's gradient, changed as little as lets every objective progress."""

    name: Literal["pcd"] = "pcd"
    implementation: ClassVar[str] = "torchjd:PriorityConstrainedDescent"
    tau: Fraction = 0.02
    """Progress that each objective is guaranteed, as a share of that of a step along its own gradient."""
    beta: HalfOpen = 0.999
    """Decay of the averages of squared gradient norms."""


class CrMogmConfig(AggregationSection):
    """CR-MOGM (Zhou et al. 2022): the weights of another aggregation, averaged over steps."""

    name: Literal["cr_mogm"] = "cr_mogm"
    implementation: ClassVar[str] = "torchjd:CrMogm"
    weighting: Literal["mgda", "pcgrad", "cagrad", "imtl_g", "aligned_mtl", "upgrad", "dualproj"] = "mgda"
    """The aggregation, at its default settings."""
    alpha: Fraction = 0.9
    """Share of the last weights that is kept."""


class ExcessMtlConfig(AggregationSection):
    """ExcessMTL (He et al. 2024): weights grow with the estimated excess risk of each loss."""

    name: Literal["excess_mtl"] = "excess_mtl"
    implementation: ClassVar[str] = "torchjd:ExcessMtl"
    robust_step_size: PositiveFloat = 1.0
    """Step size of the exponentiated update of the weights."""
    warmup_steps: PositiveInt = 30
    """Samples of an objective that its initial excess risk is averaged over; its weight does not move before."""


class GraddropConfig(AggregationSection):
    """GradDrop (Chen et al. 2020): in every coordinate one sign, drawn by its share, survives."""

    name: Literal["graddrop"] = "graddrop"
    implementation: ClassVar[str] = "torchjd:Coordinatewise"
    logs_weights: ClassVar[bool] = False
    end_task_leak: Fraction = 0.0
    """Share of the end task's gradient that always passes."""


class TrimmedMeanConfig(AggregationSection):
    """Trimmed mean (Yin et al. 2018): in every coordinate the mean without the most extreme values."""

    name: Literal["trimmed_mean"] = "trimmed_mean"
    implementation: ClassVar[str] = "torchjd:Coordinatewise"
    logs_weights: ClassVar[bool] = False
    trim_number: NonNegativeInt = 1
    """Values dropped at either end; fewer where that would leave none."""


# Methods that TorchJD computes from the losses (methods/scalarizations.py).


class RandomConfig(MethodSection):
    """Random loss weighting (Lin et al. 2022): the softmax of normal numbers, drawn anew at every step."""

    name: Literal["random"] = "random"
    implementation: ClassVar[str] = "scalarizations:RandomWeights"


class UncertaintyConfig(MethodSection):
    """Uncertainty weighting (Kendall et al. 2018): a learned log-variance for each loss."""

    name: Literal["uncertainty"] = "uncertainty"
    implementation: ClassVar[str] = "scalarizations:LearnedScales"
    lr: NonNegativeFloat = 0.1
    """Learning rate of the log-variances, plain SGD; 0 leaves all weights at 1/2."""


class ImtlLConfig(MethodSection):
    """IMTL-L (Liu et al. 2021): a learned scale for each loss."""

    name: Literal["imtl_l"] = "imtl_l"
    implementation: ClassVar[str] = "scalarizations:LearnedScales"
    lr: NonNegativeFloat = 0.1
    """Learning rate of the logarithms of the scales, plain SGD; 0 leaves all weights at 1."""


class DwaConfig(MethodSection):
    """Dynamic weight average (Liu et al. 2019): a loss that falls more slowly than the others weighs more."""

    name: Literal["dwa"] = "dwa"
    implementation: ClassVar[str] = "scalarizations:DynamicWeightAverage"
    temperature: PositiveFloat = 2.0
    """Larger is closer to equal weights."""
    epoch_steps: PositiveInt = 30
    """Steps whose losses are averaged before they are compared with the averages before."""


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
    """Smoothing; smaller is closer to the maximum. The paper tries 0.01, 0.1, 0.5 and 1."""
    preference: Preference = "uniform"


class CosmosConfig(LossSection):
    """COSMOS (Ruchte and Grabocka 2021): a weighted sum less a multiple of the losses' cosine with the weights."""

    name: Literal["cosmos"] = "cosmos"
    penalty: NonNegativeFloat = 1.0
    """lambda; 0 is the weighted sum. The paper takes 0.01 to 8, by data set."""
    preference: Preference = "uniform"


class PbiConfig(LossSection):
    """PBI (Zhang and Li 2007): the losses' length along the weights, and a penalty on their distance from them."""

    name: Literal["pbi"] = "pbi"
    theta: NonNegativeFloat = 5.0
    """The penalty; the paper takes 5."""
    preference: Preference = "uniform"


class FamoConfig(LossSection):
    """FAMO (Liu et al. 2023): all losses fall at an equal rate, by what the losses of later steps show."""

    name: Literal["famo"] = "famo"
    implementation: ClassVar[str] = "scalarizations:Famo"
    lr: PositiveFloat = 0.025
    """Learning rate of the logits of the weights, Adam."""
    weight_decay: NonNegativeFloat = 1e-3
    """Weight decay of the logits, added to their gradient."""


class RoundsSection(MethodSection):
    """What methods of rounds have in common (docs/semantics.md, section 7).

    The tasks are the end task and n objectives of the space, drawn once for the whole run (`n: all`: every one).
    `schedule.steps` counts the optimiser steps of all tasks. Dev is scored at the ends of rounds only.
    """

    round_fraction: Share = 1.0
    """Part of each task's examples that a round trains on: 1 is an epoch; the paper takes 0.25 for text."""
    round_steps: PositiveInt | None = None
    """Optimiser steps of each task in a round; null: as many as `round_fraction` takes."""


class AlphavilConfig(RoundsSection):
    """alphaVIL: mixes the tasks' parameter updates by gradient descent on the dev loss."""

    name: Literal["alphavil"] = "alphavil"
    implementation: ClassVar[str] = "rounds:Alphavil"
    alpha_steps: PositiveInt = 10
    """s: steps of SGD on alpha in a round."""
    alpha_lr: PositiveFloat = 0.001
    """Its learning rate; the paper takes 0.005 for images."""
    alpha_momentum: HalfOpen = 0.5
    task_weight: Semantics = "sound"
    """What w_i scales under AdamW: the task's learning rate, or (`published`) its loss, which changes nothing there."""


class DiwConfig(RoundsSection):
    """Discriminative importance weighting: task weights moved by dev scores, tried again until dev improves."""

    name: Literal["diw"] = "diw"
    implementation: ClassVar[str] = "rounds:Diw"
    weight_lr: NonNegativeFloat = 0.1
    """How far a difference of two dev scores moves a weight."""
    tries: PositiveInt = 10
    """Most trainings of one round with new weights."""


# fmt: off
MethodConfig = Annotated[
    FinetuneConfig | StaticConfig | AangConfig | TaptConfig | DaptConfig | TaptDaptConfig | MtTartanConfig
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
"""The registry: a method is known by its section's place in this union. The order is that of help texts."""


def method_sections() -> dict[str, type[MethodSection]]:
    """The section of every method, by the method's name."""
    union, _ = get_args(MethodConfig)
    return {str(section.model_fields["name"].default): section for section in get_args(union)}
