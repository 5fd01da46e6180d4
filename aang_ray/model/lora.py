"""Low-rank adapters (LoRA, Hu et al. 2022, section 4.1) on linear layers of a body, through the library peft.

A layer y = W x + b becomes

    y = W x + b + (alpha / rank) B A x,      A: [rank, inputs],  B: [outputs, rank]

A and B are trained; W, b and all other parameters of the body are frozen. B starts at 0, so the body computes at first
what it computed before. A and B are linear layers of their own, for which the single pass has a rule.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

from aang_ray.errors import UserError

if TYPE_CHECKING:
    from aang_ray.config.sections import AdapterConfig

_QUERY_AND_VALUE = (
    "query",
    "value",
    "query_proj",
    "value_proj",
    "q_proj",
    "v_proj",
    "q_lin",
    "v_lin",
    "q",
    "v",
    "Wqkv",
)
"""Last names of the layers that compute queries and values, in the families of Transformers. `Wqkv`, of ModernBERT,
computes keys, too."""
_ALL_LINEAR = "all-linear"


def add_lora(body: nn.Module, config: AdapterConfig) -> None:
    """Put adapters on the configured layers of a body, and freeze all its other parameters.

    A is drawn from the global random state.

    Raises:
        UserError: peft is not installed, or the body lacks a layer that was asked for.
    """
    targets = lora_targets(body, config)
    from peft import LoraConfig, inject_adapter_in_model  # late: an extra, and takes seconds to import
    from peft.tuners.lora import LoraLayer

    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(targets), task_type="FEATURE_EXTRACTION"
    )
    inject_adapter_in_model(settings, body)
    for module in body.modules():
        if isinstance(module, LoraLayer):
            # Autocast chooses the type of the product. A cast to fp32 before it would be one more copy of the input.
            module.cast_input_dtype_enabled = False


def lora_targets(body: nn.Module, config: AdapterConfig) -> tuple[str, ...]:
    """Return the names of the layers that get adapters, in the form of peft's `target_modules`.

    A name stands for every module with this name, or whose dotted name ends with it.

    Raises:
        UserError: peft is not installed, or the body has no linear layer of a name that was asked for.
    """
    if find_spec("peft") is None:
        raise UserError("encoder.adapter: lora needs peft, not installed here; run: pip install 'aang-ray[adapters]'")
    settings: Any = body.config
    linear = {name for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    others = {name for name, _ in body.named_modules()} - linear
    last = sorted({name.rpartition(".")[2] for name in linear})
    there = f"an encoder of type {settings.model_type!r} has {', '.join(last)}, or use {_ALL_LINEAR}"
    if config.targets is None:
        found = tuple(name for name in _QUERY_AND_VALUE if _named(name, linear))
        if not found:
            raise UserError(f"encoder.adapter.targets: name linear layers: {there}")
        return found
    if _ALL_LINEAR in config.targets:
        # By their last names, unless another module has one of these.
        return tuple(sorted(linear) if any(_named(name, others) for name in last) else last)
    for name in config.targets:
        if not _named(name, linear) or _named(name, others):
            raise UserError(f"encoder.adapter.targets: {name!r} names no linear layers: {there}")
    return config.targets


def _named(target: str, names: set[str]) -> list[str]:
    return [name for name in names if name == target or name.endswith(f".{target}")]


def lora_size(body: nn.Module, config: AdapterConfig) -> int:
    """Return the number of entries of all A and B; the body may be on the meta device, and keeps its layers.

    Raises:
        UserError: As `lora_targets`.
    """
    targets = lora_targets(body, config)
    layers = {name: module for name, module in body.named_modules() if isinstance(module, nn.Linear)}
    chosen = {name for target in targets for name in _named(target, set(layers))}
    return sum(config.rank * (layers[name].in_features + layers[name].out_features) for name in chosen)


def has_lora(body: nn.Module) -> bool:
    """Return whether `add_lora` was called for the body."""
    return hasattr(body, "peft_config")


@torch.no_grad()
def merged_state(body: nn.Module) -> dict[str, Tensor]:
    """Return the body's `state_dict` with W + (alpha / rank) B A in place of W, under the names without adapters."""
    state: dict[str, Tensor] = body.state_dict()
    if not has_lora(body):
        return state
    from peft.tuners.lora import LoraLayer

    merged = {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
    for name, module in body.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + layer.get_delta_weight("default")
    return merged


def write_adapter(body: nn.Module, folder: Path, base: str | None, revision: str | None) -> None:
    """Write the adapters of a body in the layout that `peft.PeftModel.from_pretrained` reads.

    Args:
        body: A body with adapters.
        folder: A folder that does not exist.
        base: Name of the encoder on the Hub; None for one that came from elsewhere.
        revision: The encoder's revision on the Hub.
    """
    from peft import get_peft_model_state_dict

    adapted: Any = body
    settings = replace(
        adapted.peft_config["default"], base_model_name_or_path=base, revision=revision, inference_mode=True
    )
    settings.save_pretrained(folder)
    found = get_peft_model_state_dict(body)
    tensors = {f"base_model.model.{name}": value.contiguous() for name, value in found.items()}
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
