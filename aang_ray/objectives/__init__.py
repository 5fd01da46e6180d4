"""Auxiliary objectives: search spaces, the primitives of the four stages, sampling, batches and losses."""

from __future__ import annotations

from typing import Final

DOMAINS: Final[dict[str, str]] = {"images": "aang_ray.objectives.images"}
"""The module of every domain besides text, by the value of `domain:` in a space file (docs/taxonomy.md)."""
