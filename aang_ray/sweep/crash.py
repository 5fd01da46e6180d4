"""What is known of a trial whose process died."""

from __future__ import annotations

LINES = 30
"""Of its log."""

CRASHED = (
    "the process ended unexpectedly: out of memory? lower batch.micro, or run fewer trials at once by a larger "
    "resources.cpus"
)


def describe_crash(account: str) -> str:
    """One line from Ray's account of a trial's end: the likely cause, or its own last line."""
    if "died" in account or "killed" in account.lower():
        return CRASHED
    lines = [line.strip() for line in account.splitlines() if line.strip()]
    return f"the trial could not run: {lines[-1] if lines else 'Ray gave no reason'}"


def last_lines(actor: str | None) -> list[str]:
    """The last lines that a process printed on stderr, from the node it ran on, or why there are none."""
    from ray.util.state import get_log
    from ray.util.state.exception import RayStateApiException

    if actor is None:
        return ["its process never came up"]
    try:
        return "".join(get_log(actor_id=actor, suffix="err", tail=LINES)).splitlines()
    except (RayStateApiException, OSError, TimeoutError) as error:
        return [f"its log could not be read: {type(error).__name__}: {error}"]
