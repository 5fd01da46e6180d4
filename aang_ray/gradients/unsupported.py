"""What the single pass refuses."""

from __future__ import annotations

from aang_ray.errors import UserError


class UnsupportedModule(UserError):
    """A module whose segment gradients cannot be told apart exactly; the message has its qualified name."""

    def __init__(self, name: str, kind: str, reason: str) -> None:
        super().__init__(f"module {name!r} ({kind}) {reason}; set gradients.engine: loop, or replace the module")
