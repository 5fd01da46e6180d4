"""Objective-parallel training: each worker computes the gradients of its own objectives."""

from __future__ import annotations
