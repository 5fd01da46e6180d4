"""Auxiliary objectives: search spaces, the primitives of the four stages, sampling, batches and losses.

The modules are about text. Any other domain (images, say) is one module, registered below.
"""

from __future__ import annotations

from typing import Final

DOMAINS: Final[dict[str, str]] = {"images": "aang_ray.objectives.images"}
"""The module of every domain besides text, by the value of `domain:` in a space file.

The module has a constant `TAXONOMY`, an `aang_ray.objectives.space.Taxonomy`. It is imported when a space first asks
for its domain.
"""
