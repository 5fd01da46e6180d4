"""Objective-parallel training, in which each worker computes the gradients of its own objectives."""

from __future__ import annotations
