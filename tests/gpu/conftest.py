"""The small run of the training room's tests."""

from tests.train.conftest import tiny

__all__ = ["tiny"]
