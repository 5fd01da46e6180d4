"""Questions to the Hugging Face Hub that end in one clear line when it does not answer."""

from __future__ import annotations

from typing import Literal

from aang_ray.errors import UserError

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
