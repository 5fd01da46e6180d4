"""What `aang data show` prints."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from aang_ray.config import DataConfig, EncoderConfig
from aang_ray.data import describe, load_end_task, print_task


def test_numbers_of_a_small_task(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    path = folder("odd [name]")
    (path / "domain.txt").write_text("the actor\nthe\n")
    found = describe(load_end_task(DataConfig(task=str(path)), encoder))
    assert found["sizes"] == {"train": 4, "dev": 2, "test": 4}
    assert found["label_counts"]["train"] == {"neg": 1, "pos": 3}
    assert found["test_clean"] == {"size": 2, "label_counts": {"neg": 1, "pos": 1}}
    # Two passages of 4 and 3 tokens, of which two are special.
    expected = {"p5": 3.05, "p25": 3.25, "p50": 3.5, "p75": 3.75, "p95": 3.95, "max": 4, "total": 7}
    assert {key: round(value, 6) for key, value in found["tokens"]["in_domain"].items()} == expected
    assert found["corpora"]["in_domain"]["passages"] == 2
    assert json.loads(json.dumps(found)) == found


def test_the_printed_page(encoder: EncoderConfig, folder: Callable[..., Path]) -> None:
    path = folder("odd [name]")
    stream = io.StringIO()
    print_task(DataConfig(task=str(path)), encoder, Console(file=stream, width=200))
    page = stream.getvalue()
    assert "odd [name]" in page
    assert "1 of dev and 1 of test also in train, 1 of test also in dev; 2 test texts are in neither" in page
    assert "No unlabelled text." in page
    assert "neg" in page
