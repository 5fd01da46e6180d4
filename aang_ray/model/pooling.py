"""How a checkpoint was trained to read a text's vector, from the file that says so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aang_ray.errors import UserError
from aang_ray.model.encoder import Pooling

if TYPE_CHECKING:
    from aang_ray.data.pretrained import Located

_FILE = "1_Pooling/config.json"
# Earlier releases of the sentence-transformers layout have a flag a mode, later ones the mode's name.
_FLAGS: Mapping[str, Pooling] = {"pooling_mode_cls_token": "first", "pooling_mode_mean_tokens": "mean"}
_MODES: Mapping[str, Pooling] = {"cls": "first", "mean": "mean"}


def checkpoint_pooling(located: Located) -> Pooling:
    """What `pooling: auto` stands for (semantics section 4).

    A sentence-embedding checkpoint carries `1_Pooling/config.json`; without one the first token's
    vector is what a pretrained encoder offers.

    Raises:
        UserError: the file names a pooling that there is not here, or cannot be fetched.
    """
    path = Path(located.source) / _FILE if located.local else _on_hub(located)
    if path is None or not path.is_file():
        return "first"
    try:
        stated: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"encoder.pooling: {_FILE} of {located.source} is not valid JSON: {error}") from error
    modes = _modes(stated)
    known = {**_FLAGS, **_MODES}
    if len(modes) == 1 and modes[0] in known:
        return known[modes[0]]
    raise UserError(
        f"encoder.pooling: {_FILE} of {located.source} states {' + '.join(modes) or 'no mode'}; "
        "choose encoder.pooling first or mean"
    )


def _modes(stated: Any) -> list[str]:
    if not isinstance(stated, dict):
        return []
    mode = stated.get("pooling_mode")
    if mode is None:
        return [key for key, value in stated.items() if key.startswith("pooling_mode_") and value is True]
    return [str(entry) for entry in mode] if isinstance(mode, list) else [str(mode)]


def _on_hub(located: Located) -> Path | None:
    """The file on the Hub, from the cache where it was asked for before; None where there is none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(located.source, _FILE, revision=located.revision)
    if cached is not None:
        # Anything but a path is the mark that the Hub was asked and has no such file.
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
