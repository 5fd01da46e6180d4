"""What holds for all tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest
from hypothesis import settings

# One thread: tiny tensors gain nothing from more, and threads that wait for a busy core cost much.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No test has a time limit of its own: a busy machine would make it fail.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A shell may start a job in the background with Ctrl-C ignored, and its children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = ("tests/frozen/test_traces.py", "tests/store/test_kill.py", "tests/sweep/test_presets.py", "tests/train/")
"""Tests of these files and folders take seconds each, and minutes together. `make check` leaves them out."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of `SLOW`."""
    for item in items:
        if item.nodeid.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _denormals_are_numbers() -> Iterator[None]:
    """A run on the command line flushes denormals in its process, which here goes on with other tests."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
