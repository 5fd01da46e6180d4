"""The default search of `aang`, named in full, so that a version with other defaults makes the same steps."""

from __future__ import annotations

from typing import Any

EVIDENCE: dict[str, Any] = {
    "name": "aang",
    "update": "evidence",
    "dev_head": "live",
    "dev_calibration": True,
    "dev_memory": 0.95,
    "aux_lr": 1.0,
    "sopt_lr": 0.1,
}
"""Weights that move on evidence only."""
