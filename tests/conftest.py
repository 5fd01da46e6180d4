"""What holds for all tests."""

from __future__ import annotations

import os

# One thread: tiny tensors gain nothing from more, and threads that wait for a busy core cost much.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
