"""What is checked of runs before one starts, also in a dry run: data, encoder, space, device, memory."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import psutil

from aang_ray.config.run import RunConfig
from aang_ray.config.sections import DataConfig, EncoderConfig
from aang_ray.data import load_task
from aang_ray.data.digits import ImageTask
from aang_ray.data.random_encoder import locate_encoder
from aang_ray.data.tasks import EndTask
from aang_ray.errors import UserError
from aang_ray.model.loading import EncoderSize, checkpoint_pooling, encoder_size
from aang_ray.train.device import device_of
from aang_ray.train.plan import check_n
from aang_ray.train.setup import check_dev
from aang_ray.train.text import space_file

FROZEN_BYTES = 4
"""Bytes that a parameter takes that is not trained: its value, in fp32."""
PARAMETER_BYTES = 20
"""Bytes that a trained one takes: value, gradient, two moments of Adam, and the best model so far, in fp32."""
TOKEN_BYTES = 64
"""Bytes that a batch holds of each token, at least: ids, positions, ranks and labels, of two batches at once."""
_LINES = 12


def check_runs(runs: Iterable[RunConfig], *, here: bool) -> list[str]:
    """Check resolved runs, and describe their data.

    Args:
        runs: The runs that are to start, resolved.
        here: Whether they run on this machine, so that its devices and its memory count.

    Returns:
        Lines for the user: what is trained on what, then warnings, each once.

    Raises:
        UserError: a run could not start; the message says what to change.
    """
    lines: dict[str, None] = {}
    warnings: dict[str, None] = {}
    used: set[tuple[str, str]] = set()
    given: dict[tuple[str, str], None] = {}
    # What many runs share is read once a call, not once a process: files may change between two calls.
    load, encoder = lru_cache(maxsize=64)(load_task), lru_cache(maxsize=64)(_encoder)
    for run in runs:
        if here:
            device_of(run)
        # Text of a language model is not written yet: that takes minutes.
        task = load(run.data.model_copy(update={"neural_lm": None}), run.encoder)
        check_dev(run, task)
        check_n(run)
        if isinstance(task, ImageTask):
            continue
        file = space_file(run, task)
        size, layers = encoder(run.data, run.encoder)
        if here:
            _check_memory(run, task, size)
        lines[_describe(run, task, layers)] = None
        warnings |= dict.fromkeys(f"warning: {task.name}: {line}" for line in task.manifest["warnings"])
        if file is not None:
            used |= {(task.name, data) for block in file.blocks for data in block.data}
            if task.manifest["kind"] != "embedded":
                given |= {(task.name, kind.replace("_", "-")): None for kind in _given_corpora(task)}
    warnings |= {
        f"warning: {task}: the {kind} text is given, but no objective uses it": None
        for task, kind in given
        if (task, kind) not in used
    }
    more = [f"and {len(lines) - _LINES} more combinations of data and encoder"] if len(lines) > _LINES else []
    return [*list(lines)[:_LINES], *more, *warnings]


def _encoder(data: DataConfig, config: EncoderConfig) -> tuple[EncoderSize, str]:
    """Return the sizes of an encoder, and its layers and adapters in words."""
    located = locate_encoder(data, config)
    if config.pooling == "auto":
        checkpoint_pooling(located)
    size = encoder_size(config, located)
    of_all = size.layers == size.checkpoint_layers
    words = f"all {size.layers} layers" if of_all else f"{size.layers} of {size.checkpoint_layers} layers"
    if config.adapter is not None:
        words += f", LoRA of rank {config.adapter.rank}: {size.trained:,} of {size.parameters:,} parameters are trained"
    return size, words


def _given_corpora(task: EndTask) -> list[str]:
    """Return the kinds of unlabelled text that files hold; what `train_size` leaves out is no file."""
    counts = task.manifest["corpora"].items()
    return [kind for kind, count in counts if count["passages"] > count.get("given_by_train", 0)]


def _check_memory(run: RunConfig, task: EndTask, encoder: EncoderSize) -> None:
    """Refuse sizes that cannot fit: what a run needs at least, against all the memory that this machine has."""
    batch = run.batch
    texts = (batch.end_task or 0) + (run.method.auxiliary and (batch.auxiliary or 0))
    texts += batch.dev + (batch.dev_head or 0) if run.method.uses_dev else 0
    longest = max(int(part.lengths.max(initial=1)) for part in (task.train.tokens, *task.corpora.values()))
    frozen = encoder.parameters if encoder.trained != encoder.parameters else 0
    need = FROZEN_BYTES * frozen + PARAMETER_BYTES * encoder.trained + TOKEN_BYTES * texts * longest
    there = psutil.virtual_memory().total
    if need > there:
        raise UserError(
            f"a run of {texts:,} texts a step and {encoder.parameters:,} parameters needs at least "
            f"{need / 2**30:,.0f} GiB of memory, this machine has {there / 2**30:,.0f}; lower batch.end_task, "
            "batch.auxiliary, batch.dev or encoder.layers"
        )


def _describe(run: RunConfig, task: EndTask, layers: str) -> str:
    manifest = task.manifest
    cut = manifest["truncated"]["train"]
    parts = [
        f"{task.name}: {len(task.train):,} of {manifest['sizes_given']['train']:,} train texts, {len(task.dev):,} dev "
        f"and {len(task.test):,} test texts, {len(task.label_names):,} classes",
        f"{run.encoder.name.rstrip('/').rsplit('/', 1)[-1]}, {layers}",
        f"{cut:,} train texts are cut at {manifest['max_tokens']} tokens" if cut else "no train text is cut",
        *(f"{count['passages']:,} {kind.replace('_', '-')} passages" for kind, count in manifest["corpora"].items()),
    ]
    return "; ".join(parts)
