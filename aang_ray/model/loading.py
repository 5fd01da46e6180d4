"""Loads a pretrained encoder from a folder or the Hub, and checks that its attention follows a given visibility.

Shape suffixes: R rows, L columns, W width of the embeddings, H hidden size.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING, AutoConfig
from transformers.utils import logging as transformers_logging

from aang_ray.data.pretrained import encoder_fingerprint, first_line
from aang_ray.errors import UserError
from aang_ray.model.attention import TokenInputs
from aang_ray.model.encoder import Encoder, Pooling
from aang_ray.model.heads import MaskedLMHead, masked_lm_head
from aang_ray.model.lora import add_lora, lora_size

if TYPE_CHECKING:
    from aang_ray.config import EncoderConfig
    from aang_ray.data.pretrained import Located


_passed: set[tuple[str, int | None]] = set()
"""Fingerprint and depth of encoders that passed the leak test in this process. The test takes longer than loading."""


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder, and the masked-LM head of its checkpoint, if that has one."""

    encoder: Encoder
    mlm_head: MaskedLMHead | None


def load_encoder(config: EncoderConfig, located: Located) -> LoadedEncoder:
    """Load an encoder in fp32 on the CPU, run the leak test, and return the encoder in train mode.

    Weights are read from safetensors files only, and code in a checkpoint is not run.

    Raises:
        UserError: if the checkpoint cannot be read, lacks weights of the body, has fewer than the requested layers, or
            is of a family whose attention cannot be restricted; for adapters that the encoder cannot have.
    """
    with quiet_transformers(), _readable(located):
        model, missing = _read(_settings(config, located), located)
    body: Any = model.base_model
    # In a model with heads, the names of the body's parameters have a prefix.
    inside = "" if body is model else f"{model.base_model_prefix}."
    absent = sorted(name for name in missing if name.startswith(inside))
    if absent:
        raise UserError(f"encoder.name: {config.name} lacks {len(absent)} weights of the encoder, {absent[0]} first")
    pooling = checkpoint_pooling(located) if config.pooling == "auto" else config.pooling
    encoder = Encoder(body, pooling)
    content = (encoder_fingerprint(located), config.layers)
    if content not in _passed:
        check_no_leak(encoder)
        _passed.add(content)
    mlm_head = None if body is model else masked_lm_head(model, missing)
    if config.adapter is not None:
        add_lora(body, config.adapter)  # after the test: the first adapter of all changes nothing
    return LoadedEncoder(encoder.train(), mlm_head)


@dataclass(frozen=True)
class EncoderSize:
    """Sizes of an encoder."""

    parameters: int
    """Number of its own parameters, without adapters."""
    trained: int
    """Number of parameters that are trained: those of the adapters, or its own."""
    layers: int
    checkpoint_layers: int
    """Number of layers of the checkpoint, of which the first `layers` are kept."""


def encoder_size(config: EncoderConfig, located: Located) -> EncoderSize:
    """Return the sizes of an encoder, from the checkpoint's configuration alone.

    Raises:
        UserError: as `load_encoder`, but for what only the weights tell.
    """
    with quiet_transformers(), _readable(located):
        whole = _settings(config.model_copy(update={"layers": None}), located)
        settings = _settings(config, located)
        model_class = _class_of(MODEL_MAPPING, settings)
        with torch.device("meta"):
            model = model_class(settings, **_without_pooler(model_class))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained = parameters if config.adapter is None else lora_size(model, config.adapter)
    layers = (getattr(kept, "num_hidden_layers", 0) for kept in (settings, whole))
    return EncoderSize(parameters, trained, *layers)


@contextmanager
def _readable(located: Located) -> Iterator[None]:
    """Make an error of the block, which reads a checkpoint, one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        place = f"encoder.name: cannot read a pretrained encoder with safetensors from {located.source}"
        raise UserError(f"{place}: {first_line(error)}") from error


def _settings(config: EncoderConfig, located: Located) -> Any:
    """Return the checkpoint's configuration with the configured depth and dropout."""
    settings: Any = AutoConfig.from_pretrained(located.source, revision=located.revision, trust_remote_code=False)
    if settings.is_encoder_decoder or type(settings) not in MODEL_MAPPING:
        raise UserError(f"encoder.name: {config.name} is of type {settings.model_type!r}, which is no text encoder")
    if config.layers is not None:
        depth = getattr(settings, "num_hidden_layers", None)
        if depth is None:
            unknown = f"the layers of {config.name} ({settings.model_type!r}) cannot be counted"
            raise UserError(f"encoder.layers: {unknown}; leave it null")
        if config.layers > depth:
            raise UserError(f"encoder.layers: {config.name} has {depth} layers, {config.layers} were asked for")
        if getattr(settings, "layer_types", None) is not None:
            settings.layer_types = settings.layer_types[: config.layers]
        settings.num_hidden_layers = config.layers
    if config.dropout is not None:
        for key, value in settings.to_dict().items():
            if "dropout" in key and isinstance(value, int | float) and not isinstance(value, bool):
                setattr(settings, key, config.dropout)
    return settings


def _read(settings: Any, located: Located) -> tuple[Any, frozenset[str]]:
    """Return the model, with a masked-LM head if the family has one, and the names that the checkpoint lacks.

    A body that starts from random weights has no such head, and lacks nothing.
    """
    if located.random:
        return _class_of(MODEL_MAPPING, settings)(settings, add_pooling_layer=False), frozenset()
    family = MODEL_FOR_MASKED_LM_MAPPING if type(settings) in MODEL_FOR_MASKED_LM_MAPPING else MODEL_MAPPING
    model_class = _class_of(family, settings)
    model, info = model_class.from_pretrained(
        located.source,
        revision=located.revision,
        config=settings,
        dtype=torch.float32,
        use_safetensors=True,
        attn_implementation="sdpa" if model_class._supports_sdpa else "eager",
        output_loading_info=True,
        **_without_pooler(model_class),
    )
    return model, frozenset(info["missing_keys"])


def _without_pooler(model_class: Any) -> dict[str, bool]:
    """Return the arguments that leave out a bare model's pooler: it would be unused, but weight decay would change it.

    Masked-LM models have none.
    """
    takes = inspect.signature(model_class.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in takes else {}


def _class_of(family: Any, settings: Any) -> Any:
    """Return the class of a configuration in a table of models."""
    choices = family[type(settings)]
    return choices[0] if isinstance(choices, tuple) else choices


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence Transformers inside the block: no progress bars, and no reports of weights that are not loaded."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


_FILE = "1_Pooling/config.json"
# Earlier releases of sentence-transformers write one flag for each mode, later releases the name of the mode.
_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "cls": "first",
    "mean": "mean",
}


def checkpoint_pooling(located: Located) -> Pooling:
    """Return the pooling that `pooling: auto` chooses (docs/semantics.md, section 4).

    A sentence-embedding checkpoint names its pooling in the file `1_Pooling/config.json`. For other encoders it is
    `first`.

    Raises:
        UserError: if the file names another pooling than `first` and `mean`, is not valid JSON, or cannot be fetched.
    """
    path = Path(located.source) / _FILE if located.local else _on_hub(located)
    if path is None or not path.is_file():
        return "first"
    try:
        stated: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"encoder.pooling: {_FILE} of {located.source} is not valid JSON: {error}") from error
    fields: dict[str, Any] = stated if isinstance(stated, dict) else {}
    modes = [key for key, value in fields.items() if key.startswith("pooling_mode_") and value is True]
    if (mode := fields.get("pooling_mode")) is not None:
        modes = [str(entry) for entry in mode] if isinstance(mode, list) else [str(mode)]
    if len(modes) == 1 and modes[0] in _MODES:
        return _MODES[modes[0]]
    raise UserError(
        f"encoder.pooling: {_FILE} of {located.source} states {' + '.join(modes) or 'no mode'}; "
        "choose encoder.pooling first or mean"
    )


def _on_hub(located: Located) -> Path | None:
    """Return the pooling file of a checkpoint on the Hub, from the local cache if possible; None if there is none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(located.source, _FILE, revision=located.revision)
    if cached is not None:
        # If it is not a path, the cache has recorded that the Hub has no such file.
        return Path(cached) if isinstance(cached, str) else None
    try:
        return Path(hf_hub_download(located.source, _FILE, revision=located.revision))
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"encoder.pooling: auto needs {_FILE} of {located.source}, and the Hub cannot be asked; "
            "choose encoder.pooling first or mean"
        ) from error
    except EntryNotFoundError:
        return None


# The leak test's batch has a row for each visibility: a text of five tokens, one of four, and two columns of padding.
_LENGTHS = (5, 4)
_COLUMNS = 11
# For each visibility the ranks and key ranks of the longer text; the shorter text uses the first four. A first token
# with rank -9 is seen by all and sees only itself. With rank 9 it sees all and is seen by no other (docs/semantics.md,
# section 2, step 5).
_RANKS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "bidirectional": ((0, 0, 0, 0, 0), (0, 0, 0, 0, 0)),
    "left-to-right": ((-9, 2, 4, 6, 8), (-9, 2, 4, 6, 8)),
    "right-to-left": ((-9, 8, 6, 4, 2), (-9, 8, 6, 4, 2)),
    "random-factorized": ((-9, 6, 2, 8, 4), (-9, 6, 2, 8, 4)),
    "random-factorized (first token last)": ((9, 6, 2, 8, 4), (9, 6, 2, 8, 4)),
    "random-factorized (with queries)": ((-9, 4, 2, 3, 1), (-9, 4, 2, 9, 9)),
}


def check_no_leak(encoder: Encoder) -> None:
    """Refuse an encoder whose attention does not follow the given visibility (docs/semantics.md, section 8).

    For every position i and every token j that i must not see, the derivative of i's output with respect to j's
    embedding must be exactly 0 through all layers. That for at least one visible token other than i must not be 0,
    since otherwise the test would show nothing. The encoder's mode, its gradients and the random state do not change.

    Raises:
        UserError: if an output depends on a hidden token, or on no other token than its own.
    """
    table, kind = encoder.word_embeddings, f"encoder of type {encoder.model_type!r}"
    inputs = _probe(encoder.vocab_size).to(table.weight.device)
    with _eval_mode(encoder), torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        try:
            influence_RLL = _influence(encoder, table, inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise UserError(f"{kind} cannot be told who sees whom: {error}") from error
    visible_RLL = inputs.visibility_RLL()
    self_LL = torch.eye(_COLUMNS, dtype=torch.bool, device=visible_RLL.device)
    leaks_R = ((influence_RLL != 0) & ~visible_RLL).flatten(1).any(1).tolist()
    context_RL = (visible_RLL & ~self_LL).any(2)
    used_RL = ((influence_RLL != 0) & visible_RLL & ~self_LL).any(2)
    ignores_R = (context_RL & ~used_RL & (inputs.texts_RL >= 0)).any(1).tolist()
    for name, leaks, ignores in zip(_RANKS, leaks_R, ignores_R, strict=True):
        under = f"under {name} visibility an output depends on"
        if leaks:
            raise UserError(f"{kind} does not obey its attention mask: {under} a token that it must not see")
        if ignores:
            raise UserError(f"{kind} ignores its context: {under} no token but its own")


def _probe(vocab_size: int) -> TokenInputs:
    rows = len(_RANKS)
    padding = _COLUMNS - sum(_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    ranks, key_ranks = (
        torch.tensor([order[k] + order[k][: _LENGTHS[1]] + (0,) * padding for order in _RANKS.values()]) for k in (0, 1)
    )
    firsts = [row * _COLUMNS + start for row in range(rows) for start in (0, _LENGTHS[0])]
    positions = [*range(_LENGTHS[0]), *range(_LENGTHS[1]), *[0] * padding]
    texts = [[2 * row] * _LENGTHS[0] + [2 * row + 1] * _LENGTHS[1] + [-1] * padding for row in range(rows)]
    return TokenInputs(
        ids_RL=torch.randint(vocab_size, (rows, _COLUMNS), generator=generator),
        positions_RL=torch.tensor(positions).expand(rows, -1).contiguous(),
        ranks_RL=ranks.int(),
        key_ranks_RL=key_ranks.int(),
        texts_RL=torch.tensor(texts, dtype=torch.int32),
        first_E=torch.tensor(firsts),
        lengths_E=torch.tensor(_LENGTHS * rows),
    )


def _influence(encoder: Encoder, table: nn.Embedding, inputs: TokenInputs) -> Tensor:
    """Return the largest derivative of a random projection of output i by the embedding of token j, [R, L, L]."""
    embedded: list[Tensor] = []

    def capture(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    handle = table.register_forward_hook(capture)
    try:
        with torch.autocast(inputs.ids_RL.device.type, enabled=False):
            hidden_RLH = encoder(inputs)
    finally:
        handle.remove()
    projected_RL = hidden_RLH @ torch.randn(encoder.hidden_size, dtype=hidden_RLH.dtype, device=hidden_RLH.device)
    columns = []
    for column in range(_COLUMNS):
        # Rows are independent, so one backward pass gives the derivatives of this column for all rows.
        (gradient_RLW,) = torch.autograd.grad(projected_RL[:, column].sum(), embedded[0], retain_graph=True)
        columns.append(gradient_RLW.abs().amax(2))
    return torch.stack(columns, dim=1)


@contextmanager
def _eval_mode(encoder: Encoder) -> Iterator[None]:
    training = {name: module.training for name, module in encoder.named_modules()}
    encoder.eval()
    try:
        yield
    finally:
        for name, module in encoder.named_modules():
            module.training = training[name]
