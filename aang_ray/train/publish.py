"""What else may be done with an exported model: write it as ONNX, and push it to the Hugging Face Hub.

Shape suffixes: B texts, C classes.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aang_ray.data.pretrained import first_line
from aang_ray.errors import RunFailure, UserError
from aang_ray.store.files import naming
from aang_ray.train.export import RUN, read_model

ONNX = "model.onnx"
TOLERANCE = 1e-4
"""Largest difference between a probability by onnxruntime and by PyTorch."""
_EXAMPLES = ("a text", "another one, which is longer than the first: padding must not count", "three")
_IN_ONE_FILE = 1_500_000_000
"""Bytes of parameters up to which one file holds all; the format ends at 2 GB."""


class _Logits(nn.Module):
    """The logits of a model of Transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Return the logits, [B, C], of token ids, their mask and their types, [B, L] each."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits_BC: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits
        return logits_BC


def check_onnx() -> None:
    """Check that the packages for ONNX are installed.

    Raises:
        UserError: One is missing.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise UserError(f"--onnx needs the package {package}: pip install 'aang-ray[onnx]'")


def write_onnx(folder: Path) -> Path:
    """Write an exported model as ONNX into its folder, and check it with onnxruntime.

    The inputs have the names of the tokenizer's outputs; batch size and length are free. The output, [B, C], is
    `logits`.

    Args:
        folder: The folder of an export.

    Returns:
        The file.

    Raises:
        UserError: A package is missing, or the folder is no complete export.
        RunFailure: The model cannot be written as ONNX, or computes something else there.
        NotWritten: The file cannot be written.
    """
    check_onnx()
    model, tokenizer = read_model(folder)
    model.config._attn_implementation = "eager"
    encoded = tokenizer(list(_EXAMPLES), padding=True, return_tensors="pt")
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in encoded]
    wrapped = _Logits(model).eval()
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # The exporter warns of packages for pictures that are not installed.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        naming(folder / ONNX),
        warnings.catch_warnings(action="ignore"),
        tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as draft,
    ):
        try:
            torch.onnx.export(
                wrapped,
                tuple(encoded[name] for name in names),
                f"{draft}/{ONNX}",
                input_names=names,
                output_names=["logits"],
                dynamic_shapes=dict.fromkeys(names, free),
                dynamo=True,
                external_data=size > _IN_ONE_FILE,
                verbose=False,
            )
        except OSError:
            raise
        except Exception as error:
            raise RunFailure(f"{folder}: cannot be written as ONNX: {first_line(error)}") from error
        worst = _difference(Path(draft) / ONNX, wrapped, tokenizer, names)
        if not worst <= TOLERANCE:
            raise RunFailure(f"{folder}: probabilities by ONNX differ by {worst:.1e}, more than {TOLERANCE:g}")
        for file in Path(draft).iterdir():
            os.replace(file, folder / file.name)
    return folder / ONNX


def _difference(path: Path, model: nn.Module, tokenizer: Any, names: Sequence[str]) -> float:
    """Return the largest difference of a probability, over batches of several sizes and lengths."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for texts in (list(_EXAMPLES), [_EXAMPLES[0]], [" ".join(_EXAMPLES), "", *_EXAMPLES, "x"]):
        encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            expected_BC = torch.softmax(model(*(encoded[name] for name in names)), dim=1).numpy()
        (logits_BC,) = session.run(None, {name: encoded[name].numpy() for name in names})
        found_BC = torch.softmax(torch.from_numpy(logits_BC), dim=1).numpy()
        worst = max(worst, float(np.abs(found_BC - expected_BC).max()))
    return worst


def check_push(repository: str) -> None:
    """Check what can be checked before a model is there: the name, the network's switch, and the login.

    Raises:
        UserError: The name is not valid, the Hub is switched off, or nobody is logged in.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, by its page

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repository}: {first_line(error)}") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push-to-hub: HF_HUB_OFFLINE is set, so nothing is sent")
    if get_token() is None:
        raise UserError("--push-to-hub: nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def push_to_hub(folder: Path, repository: str, *, private: bool = False) -> str:
    """Push an exported model to the Hub, all but `run.json`, which names paths of this machine.

    Args:
        folder: The folder of the export.
        repository: `USER/NAME`, or `NAME` for the user who is logged in. It is made if it does not exist.
        private: Make a new repository private.

    Returns:
        The address of the repository.

    Raises:
        RunFailure: The Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message="Model exported by aang_ray",
            ignore_patterns=[RUN, ".*"],
        )
    except (HfHubHTTPError, OSError, ValueError) as error:  # ValueError: what the Hub says about the card
        raise RunFailure(
            f"--push-to-hub {repository}: {first_line(error)}; the model is in {folder}; the same command tries again"
        ) from error
    return str(url)
