"""The small run of tests/train."""

from tests.train.conftest import tiny

__all__ = ["tiny"]
