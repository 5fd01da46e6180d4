"""The model card of an exported classifier: a README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from aang_ray.config.run import RunConfig
from aang_ray.store.schema import CellRecord, ResultRow, Scores, WeightRow

SHOWN = 5
"""Objectives of most weight, and of least, that the card lists."""
_LABELS = 20
_AFTER_SCORES = "\n## Training\n"
_VIEWS = {
    "dev": "dev, on which the model was chosen",
    "test": "test",
    "test_clean": "test without texts of train or dev",
}
_METRICS = {"accuracy": ("accuracy", "Accuracy"), "macro_f1": ("f1", "Macro-F1")}
"""Each score's name on the Hub, and for people."""
_LEFT_OUT = ("data.task", "encoder.name", "encoder.layers", "fingerprints.", "method.name", "resources.", "seed")
"""Settings that the card tells elsewhere, or that change nothing. Paths on the machine of the run help nobody."""


@dataclass(frozen=True)
class ModelFacts:
    """What a card says about the model in the folder."""

    labels: Sequence[str]
    base_model: str | None
    """Name of the encoder on the Hub; None for one that came from elsewhere."""
    layers: int | None
    pooling: str
    max_tokens: int
    pairs: bool
    own_code: bool
    """Whether Transformers needs the modelling file of the folder."""
    adapter: str | None = None
    """Folder of the encoder's adapters in the layout of peft; None for an encoder without."""


def model_card(record: CellRecord, facts: ModelFacts) -> str:
    """Return the card of a finished run: use, scores, method, what was learned about the objectives, and what to doubt.

    Args:
        record: The run.
        facts: What the folder holds.
    """
    result = record.result
    parts = [
        f"# {result.row} on {result.task}",
        _summary(result, facts),
        "## Use",
        _use(facts),
        *([_precision(result)] if result.precision != "fp32" else []),
        "## Scores",
        _scores(result),
        *_warnings(result),
        "## Training",
        _training(result),
        "## What was learned about the objectives",
        *_learned(record.weights),
        "## Licence",
        "Not stated: it follows from the licences of the base model and of the texts. Set `license` above before you "
        "publish the model.",
    ]
    return f"---\n{_metadata(result, facts)}\n---\n\n" + "\n\n".join(parts) + "\n"


def with_seeds(card: str, results: Sequence[ResultRow]) -> str:
    """Return a card with the scores of all seeds of the run's configuration, mean and standard deviation.

    Args:
        card: What `model_card` returned.
        results: The finished runs of the configuration, at least two.
    """
    metric = results[0].metric
    lines = []
    for view, title in _VIEWS.items():
        values = [100 * getattr(scores, metric) for one in results for scores in _given(getattr(one, view))]
        if len(values) > 1:
            lines.append(f"| {title} | {fmean(values):.2f} ± {stdev(values):.2f} |")
    seeds = ", ".join(str(one.seed) for one in sorted(results, key=lambda one: one.seed))
    header = [f"The same configuration with the seeds {seeds}:", "", f"| {metric} in % | mean ± standard deviation |"]
    return card.replace(_AFTER_SCORES, "\n".join(["", *header, "| --- | ---: |", *lines, _AFTER_SCORES]), 1)


def _metadata(result: ResultRow, facts: ModelFacts) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # late: takes a second to import

    found = [
        EvalResult(
            task_type="text-classification",
            dataset_type=result.task,
            dataset_name=result.task,
            dataset_config="without texts of train or dev" if view == "test_clean" else None,
            dataset_split="test",
            metric_type=metric,
            metric_name=name,
            metric_value=round(getattr(scores, key), 4),
        )
        for view in ("test", "test_clean")
        for scores in _given(getattr(result, view))
        for key, (metric, name) in _METRICS.items()
    ]
    data = ModelCardData(
        model_name=f"{result.row} on {result.task}",
        eval_results=found,
        base_model=facts.base_model,
        library_name="transformers",
        license="unknown",
        metrics=[metric for metric, _ in _METRICS.values()],
        pipeline_tag="text-classification",
        tags=["aang", "auxiliary-learning", *(["custom_code"] if facts.own_code else [])],
    )
    text: str = data.to_yaml()
    return text


def _given(scores: Scores | None) -> list[Scores]:
    return [] if scores is None or not scores.examples else [scores]


def _summary(result: ResultRow, facts: ModelFacts) -> str:
    labels = ", ".join(_code(label) for label in facts.labels[:_LABELS])
    more = f" and {len(facts.labels) - _LABELS} more" if len(facts.labels) > _LABELS else ""
    what = "pairs of texts" if facts.pairs else "texts"
    layers = "" if facts.layers is None else f", first {facts.layers} layers"
    name = facts.base_model or RunConfig.model_validate(result.config).encoder.name.rstrip("/").rsplit("/", 1)[-1]
    pooled = "first token" if facts.pooling == "first" else "mean over all tokens"
    return (
        f"A classifier of {what} into {len(facts.labels)} labels: {labels}{more}. Encoder: {name}{layers}; "
        f"the {pooled} goes through a head of one hidden layer. Texts are cut at {facts.max_tokens} tokens."
    )


def _code(label: str) -> str:
    """Return a label as code, on one line; a backtick would end it."""
    return f"`{' '.join(label.split()).replace('`', chr(39))}`"


def _use(facts: ModelFacts) -> str:
    trust = ", trust_remote_code=True" if facts.own_code else ""
    example = '{"text": "a text", "text_pair": "another"}' if facts.pairs else '"a text"'
    own = (
        "\n\n`trust_remote_code` lets Transformers run the one Python file of this folder: no class of Transformers "
        "has this pooling and this head."
        if facts.own_code
        else ""
    )
    adapter = (
        f"\n\nThe encoder was trained with low-rank adapters. They are merged into the model's weights, and "
        f"`{facts.adapter}` holds them alone, for `peft.PeftModel.from_pretrained` on the encoder's base model."
        if facts.adapter is not None
        else ""
    )
    return (
        "```python\nfrom transformers import pipeline\n\n"
        f'classify = pipeline("text-classification", "path/to/this/folder"{trust})\n'
        f"classify({example}, truncation=True, top_k=None)\n```{own}{adapter}"
    )


def _precision(result: ResultRow) -> str:
    return f"The run computed in {result.precision}; in another precision, probabilities differ in the third digit."


def _scores(result: ResultRow) -> str:
    lines = [
        f"| {title} | {100 * scores.accuracy:.2f} | {100 * scores.macro_f1:.2f} | {scores.examples:,} |"
        for view, title in _VIEWS.items()
        for scores in _given(getattr(result, view))
    ]
    low, high = result.test_clean_low, result.test_clean_high
    interval = (
        f" 95 % of resampled tests without texts of train or dev lie between {100 * low:.2f} and {100 * high:.2f} "
        f"{result.metric}."
        if low is not None and high is not None
        else ""
    )
    header = ["| scores in % | accuracy | macro-F1 | examples |", "| --- | ---: | ---: | ---: |"]
    return "\n".join([*header, *lines]) + f"\n\nOne run, seed {result.seed}.{interval}"


def _warnings(result: ResultRow) -> Iterator[str]:
    test, clean = result.test, result.test_clean
    if test is not None and clean is not None and clean.examples < test.examples:
        leaked = test.examples - clean.examples
        better = "believe the score without them" if clean.examples else "no test text is left without them"
        yield (
            f"> **Warning:** {leaked:,} of the {test.examples:,} test texts also stand in train or dev, so the score "
            f"on test rests on leaked texts: {better}."
        )
    if result.majority:
        yield "> **Warning:** on dev, the model never scored above the majority class."


def _training(result: ResultRow) -> str:
    """The method, its cost, the settings that differ from the defaults, and hashes of what was read."""
    config = RunConfig.model_validate(result.config)
    defaults = dict(_flat(RunConfig.model_validate({"method": {"name": result.method}}).model_dump(mode="json")))
    changed = {
        key: value
        for key, value in _flat(config.model_dump(mode="json"))
        if defaults.get(key) != value and not key.startswith(_LEFT_OUT)
    }
    prints = {name: value for name, value in config.fingerprints if name in ("data", "encoder", "space") and value}
    lines = [
        f"Method `{result.method}`, trained with aang_ray "
        f"{result.versions.get('aang-ray', '')}: {result.steps:,} steps, {result.examples:,} labelled examples and "
        f"{result.tokens:,} tokens in all, {result.seconds:,.0f} s on {result.device}. The model of step "
        f"{result.best_step} was the best on dev. Run `{result.cell}`.",
        "Settings that differ from the defaults:",
        "\n".join(["```", *(f"{key}: {value}" for key, value in changed.items()), "```"]),
        "Hashes of what was read: " + ", ".join(f"{name} `{value}`" for name, value in prints.items()) + ".",
    ]
    return "\n\n".join(lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _learned(weights: Sequence[WeightRow]) -> Iterator[str]:
    """Say how much the end task and the objectives counted in the second half of training."""
    if not weights:
        yield "None: the model was trained on the end task alone."
        return
    late = [row for row in weights if row.step > weights[-1].step / 2]
    shares: dict[str, list[float]] = defaultdict(list)
    for row in late:
        for name, weight in row.weights.items():
            shares[name].append(weight * len(row.weights))  # 1 is an even share among the sampled ones
    means = {name: fmean(values) for name, values in shares.items()}
    yield (
        f"The weight of the end task was {weights[0].end_task_weight:.3f} at first and "
        f"{fmean(row.end_task_weight for row in late):.3f} in the second half of training."
    )
    if not means:
        return
    if len(means) < 2 or math.isclose(max(means.values()), min(means.values()), rel_tol=1e-6):
        yield f"{len(means)} auxiliary objective{'s' * (len(means) > 1)} had equal weights."
        return
    order = sorted(means, key=lambda name: -means[name])
    chosen = order if len(order) <= 2 * SHOWN else [*order[:SHOWN], *order[-SHOWN:]]
    lines = [f"| {' · '.join(name.split('/'))} | {means[name]:.2f} |" for name in chosen]
    if len(chosen) < len(order):
        lines.insert(SHOWN, f"| … {len(order) - len(chosen)} more | |")
    yield "\n".join(["| auxiliary objective | weight, as a multiple of an even share |", "| --- | ---: |", *lines])
    yield (
        "These are the weights of one run: it cannot tell whether they are more than noise. `aang weights STORE` "
        "compares the seeds."
    )
