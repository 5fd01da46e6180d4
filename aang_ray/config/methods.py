"""What the configurations of all methods share."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from aang_ray.config.sections import Fraction, HalfOpen, OpenFraction, Section, Semantics


class MethodSection(Section):
    """A method's own settings, and what the rest of the program must know about it."""

    auxiliary: ClassVar[bool]
    """Whether it trains on a space of auxiliary objectives."""
    samples_dev: ClassVar[bool] = False
    """Whether `batch.dev` and `batch.dev_head` can change its result."""
    own_direction: ClassVar[bool] = False
    """Whether the body's update is no weighted sum of the losses' gradients."""

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
        """Texts that those steps put through the body."""
        return 0


# --- config.methods.plain: Methods without settings: fine-tuning and fixed weights.


class FinetuneConfig(MethodSection):
    """The end task alone."""

    name: Literal["finetune"] = "finetune"
    auxiliary: ClassVar[bool] = False


class StaticConfig(MethodSection):
    """Static multitask: lambda = 1/2, every sampled objective weighs 1/n."""

    name: Literal["static"] = "static"
    auxiliary: ClassVar[bool] = True


class MtTartanConfig(MethodSection):
    """MT-TARTAN (Dery et al. 2022): the end task and every sampled objective weigh 1/(1 + n)."""

    name: Literal["mt_tartan"] = "mt_tartan"
    auxiliary: ClassVar[bool] = True


# --- config.methods.tapt: Masked-LM stages before fine-tuning: TAPT on the task's text, DAPT on in-domain text, and DAPT then TAPT.


class PretrainSection(MethodSection):
    """What the masked-LM stages have in common (Gururangan et al. 2020; semantics section 4).

    Fine-tuning follows with the run's own settings. The stages see no label, so their steps are no part of the
    budget of end-task examples; their tokens and seconds count.
    """

    auxiliary: ClassVar[bool] = False
    texts: ClassVar[tuple[str, ...]]
    """Data of each stage, in order."""
    lr: PositiveFloat = 1e-4
    """Learning rate of the body."""
    head_lr: PositiveFloat | None = None
    """Learning rate of the masked-LM head; null takes `lr`."""
    batch: PositiveInt = 256
    """Texts a step."""
    epochs: PositiveInt = 100
    """Passes over a stage's texts, where its steps are not given."""
    mask_rate: OpenFraction = 0.15
    """Share of the real tokens that is selected."""

    def steps_of(self, text: str) -> int | None:
        """Steps of the stage on `end-task` or `in-domain` text; None where `epochs` decides."""
        value: int | None = getattr(self, STEPS[text])
        return value

    @property
    def pretraining_steps(self) -> int:
        return sum(self.steps_of(text) or 0 for text in self.texts)

    @property
    def pretraining_texts(self) -> int:
        return self.pretraining_steps * self.batch


STEPS = {"end-task": "tapt_steps", "in-domain": "dapt_steps"}
"""The setting that holds a stage's steps, by its data."""


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
    """DAPT, then TAPT, then fine-tuning."""

    name: Literal["tapt_dapt"] = "tapt_dapt"
    texts: ClassVar[tuple[str, ...]] = ("in-domain", "end-task")
    dapt_steps: PositiveInt | None = None
    """Masked-LM steps on in-domain text; null: `epochs` over it."""
    tapt_steps: PositiveInt | None = None
    """Masked-LM steps on task text; null: `epochs` over it."""


# --- config.methods.aang: AANG and META-TARTAN: learned weights.


class AangConfig(MethodSection):
    """AANG: factored weights and lambda learned by gradient agreement with the dev loss."""

    name: Literal["aang"] = "aang"
    auxiliary: ClassVar[bool] = True
    samples_dev: ClassVar[bool] = True
    aux_lr: NonNegativeFloat = 0.1
    """Learning rate of the factors of the objectives' weights."""
    sopt_lr: NonNegativeFloat = 0.1
    """Learning rate of (a_E, a_X), the logits of lambda."""
    score: Literal["cosine", "dot"] = "cosine"
    """Agreement of an objective's gradient with the dev gradient."""
    jacobian: Literal["identity", "softmax"] = "identity"
    """`softmax` is the derivation through w and lambda; `identity` what was published."""
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


# --- config.methods.attittud: ATTITTUD: what of the auxiliary update helps the end task, harms it, or does neither.


class AttittudConfig(MethodSection):
    """ATTITTUD (semantics section 6): static weights, and an auxiliary update that is decomposed and weighed anew.

    (eta_perp, eta_plus, eta_minus) = (1, 1, 1) is static multitask, (0, 0, 0) trains the end task alone,
    (1, 1, -1) turns round what harms.
    """

    name: Literal["attittud"] = "attittud"
    auxiliary: ClassVar[bool] = True
    own_direction: ClassVar[bool] = True
    eta_perp: float = 1.0
    """Weight of what lies outside the end task's subspace."""
    eta_plus: float = 1.0
    """Weight of what lowers the end task's loss."""
    eta_minus: float = -1.0
    """Weight of what raises it."""
    rank: PositiveInt = 10
    """k: directions of the subspace; each costs one vector of the body's size, three while it is estimated."""
    refresh_every: PositiveInt = 10
    """Steps between estimates of the subspace."""
    subspace_examples: PositiveInt = 64
    """m: train examples whose gradients span the subspace."""
    primary_examples: PositiveInt = 32
    """Fresh train examples of every step, whose mean gradient tells help from harm."""
    basis: Semantics = "sound"
    """`published` stops at the orthonormalised sketch; `sound` rotates it to the right singular vectors."""


# --- config.methods.similarity: Methods that weigh objectives by how their gradients compare with the end task's.


class CosineGatingConfig(MethodSection):
    """Cosine gating (Du et al. 2018): an auxiliary gradient counts only where it agrees with the end task's."""

    name: Literal["cosine_gating"] = "cosine_gating"
    auxiliary: ClassVar[bool] = True
    own_direction: ClassVar[bool] = True
    mode: Literal["gate", "weigh"] = "gate"
    """`gate`: all of it or nothing; `weigh`: times max(0, cosine)."""


class GradnormConfig(MethodSection):
    """GradNorm (Chen et al. 2018): weights that bring all gradients to a common scale."""

    name: Literal["gradnorm"] = "gradnorm"
    auxiliary: ClassVar[bool] = True
    alpha: NonNegativeFloat = 1.5
    """How strongly a loss that falls more slowly than the others is pulled up; 0: equal norms."""
    lr: NonNegativeFloat = 0.025
    """Learning rate of the weights, plain SGD; 0 leaves them equal."""


SimilarityConfig = CosineGatingConfig | GradnormConfig


# --- config.methods.aggregations: Methods whose body update is an aggregation of the separate gradients, computed by TorchJD.


Preference = Literal["uniform", "static"]
"""Weights to start from: `uniform`, 1/m for each of the m gradients; `static`, 1/2 for the end task's."""


class AggregationSection(MethodSection):
    """An aggregation of g_E and of the sampled objectives' gradients."""

    auxiliary: ClassVar[bool] = True
    own_direction: ClassVar[bool] = True


class GramSection(AggregationSection):
    """One whose weights depend on inner products of the gradients alone."""


class PcgradConfig(GramSection):
    """PCGrad (Yu et al. 2020): each gradient loses what conflicts with the others, then all are added."""

    name: Literal["pcgrad"] = "pcgrad"


class MgdaConfig(GramSection):
    """MGDA (Désidéri 2012; Sener and Koltun 2018): the shortest convex combination."""

    name: Literal["mgda"] = "mgda"
    epsilon: PositiveFloat = 1e-3
    """Step of the Frank-Wolfe solver below which it stops."""
    max_iters: PositiveInt = 100
    """Most steps of the Frank-Wolfe solver."""


class CagradConfig(GramSection):
    """CAGrad (Liu et al. 2021): the best worst case within a ball around the mean."""

    name: Literal["cagrad"] = "cagrad"
    c: NonNegativeFloat = 0.5
    """Radius of the ball over the norm of the mean gradient; 0 is the mean."""


class NashMtlConfig(GramSection):
    """Nash-MTL (Navon et al. 2022): the bargaining solution."""

    name: Literal["nash_mtl"] = "nash_mtl"
    max_norm: NonNegativeFloat = 1.0
    """Longest update; 0: no limit."""
    optim_niter: PositiveInt = 20
    """Most rounds of the convex-concave procedure."""


class ImtlGConfig(GramSection):
    """IMTL-G (Liu et al. 2021): equal projections on all gradients."""

    name: Literal["imtl_g"] = "imtl_g"


class AlignedMtlConfig(GramSection):
    """Aligned-MTL (Senushkin et al. 2023): gradients made orthogonal and of one length, then averaged."""

    name: Literal["aligned_mtl"] = "aligned_mtl"
    scale_mode: Literal["min", "median", "rmse"] = "min"
    """That length: of the smallest singular value (`min`, the paper), the median, or their mean square (its code)."""
    preference: Preference = "uniform"


class UpgradConfig(GramSection):
    """UPGrad (Quinton and Rey 2024): each gradient is projected onto what harms nobody, then they are averaged."""

    name: Literal["upgrad"] = "upgrad"
    preference: Preference = "uniform"


class DualProjConfig(GramSection):
    """DualProj (Lopez-Paz and Ranzato 2017): the mean, projected onto what harms nobody."""

    name: Literal["dualproj"] = "dualproj"
    preference: Preference = "uniform"


class GraddropConfig(AggregationSection):
    """GradDrop (Chen et al. 2020): in every coordinate one sign, drawn by its share, survives."""

    name: Literal["graddrop"] = "graddrop"
    end_task_leak: Fraction = 0.0
    """Share of the end task's gradient that always passes."""


AggregationConfig = (
    PcgradConfig
    | MgdaConfig
    | CagradConfig
    | NashMtlConfig
    | ImtlGConfig
    | AlignedMtlConfig
    | UpgradConfig
    | DualProjConfig
    | GraddropConfig
)


# --- config.methods.scalarizations: Methods that weigh the losses by the losses themselves, or by chance, through TorchJD's scalarizations.


class RandomConfig(MethodSection):
    """Random loss weighting (Lin et al. 2022): the softmax of normal numbers, drawn anew at every step."""

    name: Literal["random"] = "random"
    auxiliary: ClassVar[bool] = True


class UncertaintyConfig(MethodSection):
    """Uncertainty weighting (Kendall et al. 2018): a learned log-variance for each loss."""

    name: Literal["uncertainty"] = "uncertainty"
    auxiliary: ClassVar[bool] = True
    lr: NonNegativeFloat = 0.1
    """Learning rate of the log-variances, plain SGD; 0 leaves all weights at 1/2."""


class DwaConfig(MethodSection):
    """Dynamic weight average (Liu et al. 2019): a loss that falls more slowly than the others weighs more."""

    name: Literal["dwa"] = "dwa"
    auxiliary: ClassVar[bool] = True
    temperature: PositiveFloat = 2.0
    """Larger is closer to equal weights."""
    epoch_steps: PositiveInt = 30
    """Steps whose losses are averaged before they are compared with the averages before."""


ScalarizationConfig = RandomConfig | UncertaintyConfig | DwaConfig


# --- config.methods.rounds: Methods that train task by task in rounds: alphaVIL and DIW.


Share = Annotated[float, Field(gt=0.0, le=1.0)]


class RoundsSection(MethodSection):
    """What methods of rounds have in common (semantics section 7).

    The tasks are the end task and n objectives of the space, drawn once for the whole run (`n: all`: every one).
    `schedule.steps` counts the optimiser steps of all tasks; dev is scored at the ends of rounds alone.
    """

    auxiliary: ClassVar[bool] = True
    round_fraction: Share = 1.0
    """Part of each task's examples that a round trains on: 1 is an epoch; the paper takes 0.25 for text."""
    round_steps: PositiveInt | None = None
    """Optimiser steps of each task in a round; null: as many as `round_fraction` takes."""


class AlphavilConfig(RoundsSection):
    """alphaVIL: mixes the tasks' parameter updates by gradient descent on the dev loss."""

    name: Literal["alphavil"] = "alphavil"
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
    weight_lr: NonNegativeFloat = 0.1
    """How far a difference of two dev scores moves a weight."""
    tries: PositiveInt = 10
    """Most trainings of one round with new weights."""


# --- config.methods: The methods by name, one file for each family, and what each can be told.


MethodConfig = Annotated[
    FinetuneConfig
    | StaticConfig
    | AangConfig
    | TaptConfig
    | DaptConfig
    | TaptDaptConfig
    | MtTartanConfig
    | AggregationConfig
    | ScalarizationConfig
    | SimilarityConfig
    | AttittudConfig
    | AlphavilConfig
    | DiwConfig,
    Field(discriminator="name"),
]


def method_sections() -> dict[str, type[MethodSection]]:
    """Each method's section by the method's name."""
    union, _ = get_args(MethodConfig)
    return {str(section.model_fields["name"].default): section for section in get_args(union)}
