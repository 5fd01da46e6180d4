"""Neural-LM text: passages that a causal language model writes, once, kept in the cache.

A data primitive of the AANG paper's Figure 1. `data.neural_lm` names any Hugging Face causal language model (a Hub
name or a folder), or `trained`: a small one that is trained on the task's own unlabelled and train texts. How likely
held-out passages of that text are to it is recorded beside the passages: a model that has not learned the domain shows.
Of the trained model, half of the held-out passages choose the epoch, and the other half is what is recorded: of fewer
than 60 passages one each, and `held_out` in the report says so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from aang_ray.config import DataConfig
from aang_ray.data.cache import cache_folder, content_key, made_once
from aang_ray.data.pretrained import encoder_fingerprint, locate_model
from aang_ray.errors import UserError

TRAINED = "trained"
RECIPE, TRAINED_RECIPE = 1, 2
"""Versions of how passages are made, by a model as it is and by the trained one: a change makes new ones."""
SEED = 0
HELD_OUT, MOST_HELD_OUT, FEWEST = 0.05, 500, 20
"""Share of the domain's passages that is held out, its limit, and the least text to learn from."""
LENGTH = 128
"""Longest generated passage, in tokens of the causal model."""
_TEXT, _REPORT = "passages.parquet", "report.json"


@dataclass(frozen=True)
class NeuralText:
    """What a causal language model wrote."""

    passages: list[str]
    model: str
    perplexity: float
    """Of a token of held-out domain passages."""
    held_out: int
    """How many passages that was measured on; those that chose the trained model's epoch are not among them."""

    def report(self) -> dict[str, object]:
        """All but the passages, as JSON values."""
        return {name: value for name, value in vars(self).items() if name != "passages"}


def neural_fingerprint(data: DataConfig) -> list[object]:
    """What decides the generated text besides the domain's: the model, how many passages, and the recipe.

    Raises:
        UserError: for a model that is not there.
    """
    recipe = TRAINED_RECIPE if data.neural_lm == TRAINED else RECIPE
    return [_model_fingerprint(data), data.neural_lm_passages, recipe]


def neural_text(data: DataConfig, domain: Sequence[str]) -> NeuralText:
    """The passages for this domain text, from the cache or generated now.

    Raises:
        UserError: for a model that cannot be loaded, or too little text to learn from.
    """
    if len(domain) < FEWEST:
        raise UserError(f"data.neural_lm: {len(domain)} passages of domain text are too few, {FEWEST} are needed")
    text = cache_folder() / "neural_lm" / content_key({"made": neural_fingerprint(data), "domain": list(domain)})
    folder = made_once(text, lambda draft: _make(draft, data, domain))
    report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    return NeuralText(parquet.read_table(folder / _TEXT).column("text").to_pylist(), **report)


def _make(folder: Path, data: DataConfig, domain: Sequence[str]) -> None:
    from rich.console import Console
    from rich.progress import Progress

    from aang_ray.data.causal import generate, load_causal, perplexity, train_small

    held_out, rest = _held_out(domain, least=2 if data.neural_lm == TRAINED else 1)
    measured = held_out
    console = Console(stderr=True)
    with Progress(*Progress.get_default_columns(), console=console, transient=True) as progress:
        if data.neural_lm == TRAINED:
            training = progress.add_task("training a causal language model (once)")
            # What chose the epoch is likelier under it than other text is.
            choosing, measured = held_out[: len(held_out) // 2], held_out[len(held_out) // 2 :]
            causal = train_small(
                rest, choosing, SEED, lambda done, total: progress.update(training, completed=done, total=total)
            )
        else:
            causal = load_causal(locate_model(str(data.neural_lm), "data.neural_lm", "model"))
        passages = generate(causal, data.neural_lm_passages, rest, LENGTH, SEED)
        shown = progress.track(passages, data.neural_lm_passages, description="writing neural-LM text (once)")
        found = [passage.strip() for passage in shown]
        report = NeuralText([], str(data.neural_lm), perplexity(causal, measured), len(measured))
    parquet.write_table(
        pa.table({"text": pa.array([passage for passage in found if passage], pa.string())}), folder / _TEXT
    )
    (folder / _REPORT).write_text(json.dumps(report.report()), encoding="utf-8")


def _held_out(domain: Sequence[str], least: int) -> tuple[list[str], list[str]]:
    """The passages that nothing is learned from, `least` or more of them, and all others."""
    order = np.random.default_rng(SEED).permutation(len(domain))
    size = max(least, min(int(HELD_OUT * len(domain)), MOST_HELD_OUT))
    return [domain[i] for i in order[:size]], [domain[i] for i in order[size:]]


def _model_fingerprint(data: DataConfig) -> str:
    if data.neural_lm == TRAINED:
        return TRAINED
    return encoder_fingerprint(locate_model(str(data.neural_lm), "data.neural_lm", "model"))
