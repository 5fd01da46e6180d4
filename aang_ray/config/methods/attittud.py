"""ATTITTUD: what of the auxiliary update helps the end task, harms it, or does neither."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import PositiveInt

from aang_ray.config.methods.base import MethodSection
from aang_ray.config.section import Semantics


class AttittudConfig(MethodSection):
    """ATTITTUD (semantics section 6): static weights, and an auxiliary update that is decomposed and weighed anew.

    (eta_perp, eta_plus, eta_minus) = (1, 1, 1) is static multitask, (0, 0, 0) trains the end task alone,
    (1, 1, -1) turns round what harms.
    """

    name: Literal["attittud"] = "attittud"
    auxiliary: ClassVar[bool] = True
    own_direction: ClassVar[bool] = True
    eta_perp: float = 1.0
    """Weight of what lies outside the end task's subspace."""
    eta_plus: float = 1.0
    """Weight of what lowers the end task's loss."""
    eta_minus: float = -1.0
    """Weight of what raises it."""
    rank: PositiveInt = 10
    """k: directions of the subspace; each costs one vector of the body's size, three while it is estimated."""
    refresh_every: PositiveInt = 10
    """Steps between estimates of the subspace."""
    subspace_examples: PositiveInt = 64
    """m: train examples whose gradients span the subspace."""
    primary_examples: PositiveInt = 32
    """Fresh train examples of every step, whose mean gradient tells help from harm."""
    basis: Semantics = "sound"
    """`published` stops at the orthonormalised sketch; `sound` rotates it to the right singular vectors."""
