"""`aang init`: a commented sweep file for given data, with sizes that fit the data and this machine."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from aang_ray.config import RunConfig, parse_config
from aang_ray.config.load import override
from aang_ray.config.sections import DataConfig
from aang_ray.data.describe import describe
from aang_ray.data.load import load_end_task
from aang_ray.data.modalities import modality_of
from aang_ray.data.sources import find_source
from aang_ray.data.tasks import TEXT, EndTask, card_of
from aang_ray.errors import UserError
from aang_ray.store.files import write_file
from aang_ray.sweep.plan import START_SECONDS, Need, duration, plan, trials_at_once
from aang_ray.sweep.recipe import RECIPE, SIZES, measure
from aang_ray.sweep.spec import SweepOverrides, expand, load_sweep

METHODS = {
    "finetune": "the end task alone: what the others must beat",
    "static": "all objectives count the same",
    "aang": "how much each objective counts is learned on dev",
}
SEEDS = (0, 1, 2)
LEAST_STEPS, MOST_STEPS = 100, 2000
"""Below 100 steps no method settles; 2,000 steps of 32 texts are 20 epochs of 3,200 texts."""
EPOCHS = 10
"""Epochs over train that a run takes where time allows."""
IMBALANCE = 1.5
"""How many times as frequent as the rarest class of train the most frequent one is, where accuracy misleads."""
_CLASSES = 6
_LONG = 0.6
"""Texts are cut if 95 % of them are shorter than this share of the longest: a batch is as slow as its longest text."""


@dataclass(frozen=True)
class Sizes:
    """What is chosen by the data and the machine."""

    layers: int
    steps: int
    end_task: int
    auxiliary: int
    dev: int
    dev_head: int
    gpus: int
    seconds: float = 0.0
    """What the sweep takes, by a measurement; 0: not measured."""


def write_sweep(
    task: str, file: Path | None, encoder: str, settings: Sequence[str], hours: float, console: Console
) -> Path:
    """Look at the data, time some steps, and write a sweep file that `aang sweep` takes.

    Args:
        task: A folder, a labelled file, or whatever else `data.task` may name.
        file: The file to write; None: the task's name in the working directory. An existing file is never replaced.
        encoder: Name of the encoder, as `encoder.name`.
        settings: Settings of `data` as `data.KEY=VALUE`, such as the names of columns.
        hours: How long the sweep may take on this machine.
        console: Where progress is printed.

    Returns:
        The path of the file.

    Raises:
        UserError: The data, the encoder or a setting is not valid, or the file exists.
    """
    for text in settings:
        if not text.startswith("data.") or text.startswith("data.task"):
            raise UserError(f"init: --set {text}: only settings of the data (data.text, data.label, ...) are read here")
    if not 0 < hours < math.inf:
        raise UserError(f"--hours {hours:g}: must be above 0 and finite")
    given = override({"data": {"task": task}, "encoder": {"name": encoder}}, settings)
    config = parse_config(given, "init")
    if (modality := modality_of(config.data)) != TEXT:
        raise UserError(f"init: {task} is a task of {modality}; start from jobs/digits.yaml")
    source = find_source(config.data)
    path = file or Path(f"{Path(source.name).name}.yaml")
    if path.exists():
        raise UserError(f"init: {path} exists already; give another file with -o FILE")
    loaded = load_end_task(config.data, config.encoder)
    space = "td_ed" if "in_domain" in source.corpora else "td"
    data = _data(given["data"], config.data, loaded)
    facts = describe(loaded)

    def draft(sizes: Sizes) -> str:
        return render(encoder, _layers(config), space, data, sizes, facts, hours)

    sizes = _fit(draft, loaded, _layers(config), hours, console)
    try:
        write_file(path.absolute(), draft(sizes).encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return path


def _layers(config: RunConfig) -> int:
    from aang_ray.data.random_encoder import locate_encoder
    from aang_ray.model.loading import encoder_size

    return encoder_size(config.encoder, locate_encoder(config.data, config.encoder)).layers


def _data(given: Mapping[str, Any], config: DataConfig, task: EndTask) -> dict[str, Any]:
    """Return the settings of the data: those that were given, the metric, and the length at which texts are cut."""
    data = dict(given)
    for key in ("task", "in_domain", "out_of_domain", "retrieve_from"):
        path = Path(str(data.get(key))).expanduser()
        if key in data and path.exists():
            data[key] = str(path.resolve())  # the file shall mean the same in every folder
    if card_of(config) is None:
        data.setdefault("metric", "macro_f1" if _imbalance(task) > IMBALANCE else "accuracy")
    lengths = describe(task)["tokens"]["train"]
    cut = max(16, 16 * math.ceil(lengths["p95"] / 16))
    if config.max_tokens is None and cut < _LONG * lengths["max"]:
        data["max_tokens"] = cut
    return data


def _imbalance(task: EndTask) -> float:
    counts = list(describe(task)["label_counts"]["train"].values())
    ratio: float = max(counts) / max(min(counts), 1)
    return ratio


def _fit(draft: Callable[[Sizes], str], task: EndTask, layers: int, hours: float, console: Console) -> Sizes:
    """Return the largest sizes for which the sweep takes at most so many hours here, by timing steps of each method."""
    import torch

    train, dev = len(task.train), len(task.dev)
    gpus = int(torch.cuda.is_available())
    recipe = {"end_task": 128, "auxiliary": 256} if gpus else RECIPE["base"]["batch"]
    end_task = min(recipe["end_task"], max(4, train // 4))
    head = max(1, min(32, dev // 2))
    wanted = min(MOST_STEPS, max(SIZES[0].steps, math.ceil(EPOCHS * train / end_task)))
    sizes = Sizes(layers, wanted, end_task, recipe["auxiliary"], max(1, min(32, dev - head)), head, gpus)
    for kept in dict.fromkeys((layers, max(1, layers // 2), max(1, layers // 3))):
        sizes = replace(sizes, layers=kept, steps=wanted)
        fixed, per_step = _seconds(draft(sizes), console)
        steps = min(wanted, int((hours * 3600 - fixed) / per_step))
        sizes = replace(sizes, steps=max(LEAST_STEPS, steps // 10 * 10))
        sizes = replace(sizes, seconds=fixed + per_step * sizes.steps)
        if steps >= min(wanted, SIZES[0].steps):
            break
    return sizes


def _seconds(text: str, console: Console) -> tuple[float, float]:
    """Check a sweep as a dry run does, and measure its seconds: those that depend on no step, and those a step."""
    import torch

    from aang_ray.train.check import check_runs
    from aang_ray.train.plan import resolve

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "init.yaml"
        file.write_text(text, encoding="utf-8")
        spec = load_sweep(file, SweepOverrides())
    cells = plan(expand(spec, SweepOverrides(), "init"), spec.seeds, {}, resolve)
    check_runs({cell.config.group: cell.config for cell in cells}.values(), here=True)
    cores = len(os.sched_getaffinity(0))
    machine = {"CPU": float(cores), "GPU": float(torch.cuda.device_count())}
    at_once = trials_at_once([Need.of(cell.config) for cell in cells], [machine])
    configs = {cell.config.row_name: cell.config for cell in cells}
    console.print(f"timing up to three steps of each method ({cells[0].config.encoder.layers} layers)", highlight=False)
    paces = dict(zip(configs, measure(list(configs.values()), at_once, max(1, cores // at_once)), strict=True))
    each = [paces[cell.config.row_name] for cell in cells]
    fixed = START_SECONDS + sum(pace.start + pace.score for pace in each) / at_once
    return fixed, sum(pace.step for pace in each) / at_once


def render(
    encoder: str,
    layers: int,
    space: str,
    data: Mapping[str, Any],
    sizes: Sizes,
    facts: Mapping[str, Any],
    hours: float,
) -> str:
    """Return the text of the sweep file.

    Args:
        encoder: Name of the encoder.
        layers: How many layers it has.
        space: Name of the search space.
        data: Settings of the data.
        sizes: The chosen sizes.
        facts: What `describe` says of the data.
        hours: How long the sweep may take.
    """
    count = facts["sizes"]
    epochs = sizes.steps * sizes.end_task / max(count["train"], 1)
    tokens = facts["tokens"]["train"]
    in_domain = "in_domain" in facts["corpora"]
    about = "; ".join(
        [
            f"{count['train']:,} train, {count['dev']:,} dev and {count['test']:,} test texts",
            f"half of the train texts have at most {tokens['p50']:g} tokens, 95 % at most {tokens['p95']:g}, "
            f"the longest {tokens['max']:,}",
        ]
    )
    metric = {
        "macro_f1": "the classes differ in size: every class counts the same",
        "accuracy": "the share of texts with the right label; macro_f1: every class counts the same",
    }
    why = {
        "metric": metric.get(str(data.get("metric")), ""),
        "max_tokens": f"95 % of the texts are shorter; the longest has {tokens['max']:,} tokens",
    }
    lines = [
        f"# Do auxiliary objectives help on {_comment(facts['name'])}? `aang init` chose the sizes for this machine.",
        "#   aang sweep FILE --dry-run   checks everything and shows the runs",
        "#   aang sweep FILE             runs them; stop it at any time, the same command continues",
        "#   aang table, aang report     afterwards",
        "#",
        f"# {about}.",
        f"# Labels in train: {_labels(facts['label_counts']['train'])}.",
        f"# Test texts that are also in train: {facts['duplicates']['test_in_train']:,}.",
        f"# {_time(sizes, hours)}",
        "base:",
        "  encoder:",
        f"    name: {_value(encoder)}  # the paper's: roberta-base, from the Hugging Face Hub; it wants a GPU",
        f"    layers: {sizes.layers}  # of {layers}; fewer are faster, and worse",
        f"  space: {space}  # `aang space show {space}` lists its objectives"
        + ("" if in_domain else "; td_ed also wants unlabelled text: data.in_domain"),
        "  n: 6  # objectives a step; all: every one of the space",
        "  batch:",
        f"    end_task: {sizes.end_task}  # labelled texts a step",
        f"    auxiliary: {sizes.auxiliary}  # texts a step over all its objectives",
        f"    dev: {sizes.dev}  # dev texts a step that judge the objectives",
        f"    dev_head: {sizes.dev_head}  # further dev texts, for the head that judges",
        "  optim: {body_lr: 1.0e-4, head_lr: 1.0e-3}  # the paper's; 2.0e-5 to 1.0e-4 are usual for the body",
        "  schedule:",
        f"    steps: {sizes.steps}  # {epochs:.1f} epochs over train",
        f"    eval_every: {max(5, sizes.steps // 10)}  # steps; the model with the best dev score is kept",
        *([f"  resources: {{gpus: {sizes.gpus}}}  # of a run; 0.5: two runs share a GPU"] if sizes.gpus else []),
        "tasks:",
        *(
            f"  {'-' if not number else ' '} {key}: {_value(value)}{f'  # {why[key]}' if key in why else ''}"
            for number, (key, value) in enumerate(sorted(data.items(), key=lambda item: item[0] != "task"))
        ),
        "methods:",
        *(f"  - {name}  # {text}" for name, text in METHODS.items()),
        f"seeds: [{', '.join(map(str, SEEDS))}]  # more seeds decide smaller differences; those that ran are kept",
        "# grid: {data.train_size: [100, 300, 1000]}  # a learning curve: how much do more labels bring?",
    ]
    return "\n".join(lines) + "\n"


def _time(sizes: Sizes, hours: float) -> str:
    if not sizes.seconds:
        return "Time: not measured."
    text = f"Time: about {duration(sizes.seconds)} on this machine, by timing some steps"
    return f"{text}; that is above --hours {hours:g}." if sizes.seconds > 1.01 * 3600 * hours else f"{text}."


def _labels(counts: Mapping[str, int]) -> str:
    most = sorted(counts, key=lambda name: -counts[name])
    more = f" and {len(most) - _CLASSES:,} more" if len(most) > _CLASSES else ""
    return ", ".join(f"{_comment(name)} {counts[name]:,}" for name in most[:_CLASSES]) + more


def _comment(text: str) -> str:
    """Return a text of the data as a part of one line of a comment, which it cannot end."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"


def _value(value: Any) -> str:
    """Return a value as YAML on one line: JSON is YAML. Plain names need no quotes."""
    plain = isinstance(value, str) and value.replace("_", "").isalpha() and value.lower() not in _WORDS
    return str(value) if plain else json.dumps(value, ensure_ascii=True)


_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
