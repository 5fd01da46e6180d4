"""The sections of a run's configuration: each stands for one part of the program.

Defaults are those of the AANG paper (Tables 4-7) where it states them; `published` switches select what the
released research code did where that differs from the sound reading.
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, field_validator

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


class Fingerprints(Section):
    """Hashes of what the names in a configuration stood for when the run was planned."""

    data: str = ""
    encoder: str = ""
    space: str = ""
